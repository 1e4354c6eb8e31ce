"""Adaptive consensus, the paper's method.

This file reads beside section 3 of *Adaptive Consensus Gradients Aggregation* (arXiv 2411.03742) and beside
``docs/method.md``, which lists every place where the paper leaves a choice and what is done there.
"""

from __future__ import annotations

from ..ops import Tensor, ops_for
from .base import NONFINITE_POLICIES, Aggregator, Decision, Statistics, count_present, one_of
from .checkpoint import Memory

__all__ = ["CANCELLATION", "AdaCons", "resample"]

#: Eq. 13 divides by the sum of the coefficients. Below this fraction of the sum of their absolute
#: values they cancel rather than agree: the quotient would be a step a hundred times too long, or
#: one uphill, and in float32 have lost two of its seven digits.
CANCELLATION = 1e-2


class AdaCons(Aggregator):
    """Adaptive consensus: each worker counts by how much it agrees with the mean.

    Args:
        momentum: ``beta`` of Eq. 11, in [0, 1). 0 leaves the momentum out.
        normalize: whether Eq. 13 makes the coefficients sum to one.
        scale: ``"unit"``, the paper: with ``normalize`` the result is a direction, at most one
            long, whatever the length of the gradients. ``"average"`` gives it the length an
            average has: equal gradients give exactly the average.
        nonfinite: see :attr:`Aggregator.nonfinite`.

    The paper's ablation, in order: ``AdaCons(momentum=0, normalize=False)``,
    ``AdaCons(normalize=False)``, ``AdaCons(momentum=0)``, ``AdaCons()``.

    >>> import torch
    >>> agreeing_and_not = torch.tensor([[1.0, 0.1], [1.0, -0.1], [0.0, 1.0]])
    >>> decision, _ = AdaCons().explain(agreeing_and_not)
    >>> print([round(w, 2) for w in decision.weights.tolist()])
    [0.42, 0.38, 0.2]
    """

    portable = True
    pure = True

    def __init__(
        self,
        momentum: float = 0.99,
        normalize: bool = True,
        scale: str = "unit",
        nonfinite: str = "propagate",
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, got {momentum!r}")
        if not isinstance(normalize, bool):
            raise ValueError(f"normalize must be True or False, got {normalize!r}")
        self.momentum = float(momentum)
        self.normalize = normalize
        self.scale = one_of("scale", scale, ("unit", "average"))
        self.nonfinite = one_of("nonfinite", nonfinite, NONFINITE_POLICIES)

    def start(self, statistics: Statistics) -> Memory:
        if not self.momentum:
            return {}
        ops = ops_for(statistics.squares)
        shape = ops.shape(statistics.squares)
        return {
            "curve": ops.zeros(shape, statistics.squares),
            "updates": ops.zeros((*shape[:-1], 1), statistics.squares),
        }

    def weigh(self, statistics: Statistics, memory: Memory) -> Decision:
        ops = ops_for(statistics.squares)
        present = statistics.present
        n = statistics.norms
        alive = n > 0
        n_or_1 = ops.where(alive, n, ops.ones_like(n))
        zero = ops.zeros_like(n)
        silent = ~ops.any_of(alive)  # no worker has a gradient: there is nothing to agree on

        # Eq. 7
        alpha = ops.where(alive, statistics.dots / n_or_1, zero)
        stages = {"first-order": alpha}

        # Eq. 11. With S the sort, S^-1(beta m + (1 - beta) S(alpha)) gives each worker the m of its
        # rank and its own alpha; written so, it also holds where only some of N are present.
        if self.momentum:
            beta = self.momentum
            curve, rank = _sort(alpha, present)
            m = memory["curve"]
            first = memory["updates"] == 0
            smoothed = beta * _read_at(m, rank) + (1 - beta) * alpha
            alpha = ops.where(present & ~first, smoothed, alpha)
            memory = {
                "curve": ops.where(silent, m, ops.where(first, curve, beta * m + (1 - beta) * curve)),
                "updates": memory["updates"] + ops.wide(~silent),
            }
            stages["momentum"] = alpha

        # Eq. 13
        fallback = silent
        if self.normalize:
            whole = ops.total(alpha)
            fallback = silent | (whole <= CANCELLATION * ops.total(ops.absolute(alpha)))
            alpha = alpha / ops.where(fallback, ops.ones_like(whole), whole)
            stages["normalized"] = alpha

        # Eq. 12
        gamma = ops.where(alive, alpha / n_or_1, zero)
        if self.scale == "average":
            # Equal gradients have gamma_i = 1 / (N n) with Eq. 13 and 1 without it.
            count = count_present(present)
            gamma = gamma * (ops.total(n) / count if self.normalize else 1 / count)
        return Decision(gamma, memory, fallback, stages)

    def resize(self, memory: Memory, workers: int) -> Memory:
        return {**memory, "curve": resample(memory["curve"], workers)}


def resample(curve: Tensor, workers: int) -> Tensor:
    """Stretch sorted coefficients to another number of workers by linear interpolation.

    The momentum of Eq. 11 is a sorted curve, in effect a quantile function, so it can be read at
    any number of evenly spaced points.

    >>> import torch
    >>> resample(torch.tensor([0.0, 1.0, 2.0]), 5)
    tensor([0.0000, 0.5000, 1.0000, 1.5000, 2.0000], dtype=torch.float64)
    """
    ops = ops_for(curve)
    shape = ops.shape(curve)
    step = (shape[-1] - 1) / max(workers - 1, 1)
    positions = ops.zeros((*shape[:-1], workers), curve)
    positions = positions + ops.like([k * step for k in range(workers)], curve)
    return _read_at(ops.wide(curve), positions)


def _read_at(curve: Tensor, position: Tensor) -> Tensor:
    """Interpolate linearly between a curve's points; whole positions give exactly its values."""
    ops = ops_for(curve)
    last = ops.shape(curve)[-1] - 1
    low = ops.clip(ops.floor(position), 0, last)
    high = ops.clip(low + 1, 0, last)
    below, above = ops.take(curve, low), ops.take(curve, high)
    return below + (position - low) * (above - below)


def _sort(alpha: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """The operator S of Eq. 11: ``alpha`` in ascending order, and each worker's place in it.

    The sorted values are always N, as the momentum is. Where only A of N workers are present,
    their A values are stretched to N, and places are between those of the N.
    """
    ops = ops_for(alpha)
    workers = ops.shape(alpha)[-1]
    # How far apart N values are, in steps of A. One value alone is stretched to N equal ones.
    step = (ops.total(ops.wide(present)) - 1) / max(workers - 1, 1)
    order = ops.argsort(ops.where(present, alpha, ops.zeros_like(alpha) + float("inf")))
    place = ops.wide(ops.argsort(order)) / ops.where(step > 0, step, ops.ones_like(step))
    number = ops.zeros_like(alpha) + ops.like(range(workers), alpha)
    curve = _read_at(ops.take(alpha, order), number * step)
    return curve, ops.where(present, place, ops.zeros_like(alpha))
