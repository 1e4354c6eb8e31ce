"""The mean gradient, shortened where workers or recent steps vary much: a second-order step from inner products.

``docs/method.md`` derives the rule, and ``docs/evidence.md`` says for whom it is worth its price.
"""

from __future__ import annotations

from ..ops import Tensor, ops_for
from .base import NONFINITE_POLICIES, Aggregator, Decision, Statistics, average_weights, count_present, one_of
from .checkpoint import Memory

__all__ = ["Curvature"]

#: Inner products of float32 gradients are known to about this fraction of the largest squares. A ridge that is smaller
#: than this times the trace leaves a system whose solution is made of rounding.
ROUNDING = 1e-6


class Curvature(Aggregator):
    """The mean gradient, multiplied by the inverse of a damped matrix of second moments.

    With the workers' gradients g_1 .. g_N of this step and the mean gradients p_1 .. p_m of the steps before, the
    result's direction is::

        (1/N sum_i g_i g_i^T  +  1/m sum_k p_k p_k^T  +  damping * c / N)^-1  gbar,      c = 1/N sum_i ||g_i||^2

    It lies in the span of these N + m vectors, so all it takes is their inner products and a linear system of that
    size. Of m, those count that there are yet.

    Args:
        memory: m, how many steps' mean gradients are kept. They take m d / N numbers on each of N workers with the
            schedule ``one-pass``, and m d with ``gather``. 0 keeps none.
        damping: how much of the identity is added, relative to the mean square of the workers' gradients. Much of it
            gives the mean's direction.
        workers: whether the workers' gradients are in the matrix. Without them it is made of past means alone.
        length: how long the result is: ``"unit"``, one; ``"agreement"``, ``||gbar|| / rms(n_i)``; ``"average"``,
            ``||gbar||``.
        nonfinite: see :attr:`Aggregator.nonfinite`.

    Where gradients are all zero, or so much smaller than those of the steps before that the system is ill-conditioned,
    the step is the average, and counted as a fallback.

    >>> import torch
    >>> noisy_in_one_direction = torch.tensor([[1.0, 2.0], [1.0, -1.0]])
    >>> print([round(x, 2) for x in Curvature(length="average")(noisy_in_one_direction).tolist()])
    [1.09, 0.24]
    """

    pure = True

    def __init__(
        self,
        memory: int = 8,
        damping: float = 1.0,
        workers: bool = True,
        length: str = "unit",
        nonfinite: str = "propagate",
    ) -> None:
        if isinstance(memory, bool) or not isinstance(memory, int) or memory < 0:
            raise ValueError(f"memory must be a whole number of steps, or 0, got {memory!r}")
        if isinstance(damping, bool) or not isinstance(damping, (int, float)) or not 0 < damping < float("inf"):
            raise ValueError(f"damping must be a positive number, got {damping!r}")
        if not isinstance(workers, bool):
            raise ValueError(f"workers must be True or False, got {workers!r}")
        if not workers and not memory:
            raise ValueError(
                "workers=False and memory=0 leave nothing to make a matrix of; NormalizedMean() is what remains"
            )
        self.memory = memory
        self.damping = float(damping)
        self.workers = workers
        self.length = one_of("length", length, ("unit", "agreement", "average"))
        self.nonfinite = one_of("nonfinite", nonfinite, NONFINITE_POLICIES)

    @property
    def history(self) -> int:  # type: ignore[override]
        return self.memory

    @property
    def needs_gramian(self) -> bool:  # type: ignore[override]
        return self.workers

    def weigh(self, statistics: Statistics, memory: Memory) -> Decision:
        ops = ops_for(statistics.squares)
        average = average_weights(statistics.present)
        spread = ops.total(average * statistics.squares)
        ridge = self.damping * spread
        weights, past, square, ill = (
            self._by_workers(statistics, ridge)
            if self.workers
            else self._by_past(statistics, ridge / count_present(statistics.present))
        )
        one = ops.ones_like(square)
        fallback = ill | (square <= 0)
        factor = one / ops.sqrt(ops.where(fallback, one, square))
        if self.length != "unit":
            factor = factor * ops.sqrt(ops.where(fallback, one, statistics.mean_square))
        if self.length == "agreement":
            factor = factor / ops.sqrt(ops.where(fallback, one, spread))
        return Decision(weights * factor, memory, fallback, past_weights=None if past is None else past * factor)

    def _by_workers(self, s: Statistics, ridge: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """The weights, those of the past, the squared length of what they give, and where that means nothing.

        With R the rows g_i and p_k sqrt(N/m), and r the ridge: (R^T R + r)^-1 R^T e = R^T w where (R R^T + r) w = e,
        and e is one for the workers and zero for the past. The square of its length is w R R^T w = w e - r w w.
        """
        ops = ops_for(s.squares)
        here = ops.wide(s.present)
        table: Tensor = s.gramian
        right, scale = here, None
        if not self.memory:
            table = table + 0  # a copy, because solve() may overwrite it
        else:
            count = ops.clip(s.past_count, 1, self.memory)
            scale = ops.sqrt(count_present(s.present) / count)
            across = s.past * scale[..., None]
            past = s.past_gramian * (scale * scale)[..., None]
            table = ops.bordered(table, across, past)
            right = ops.join([here, ops.zeros_like(past[..., 0])], -1)
        ill = ridge <= ROUNDING * ops.total(ops.diagonal(table))
        ridge = ops.where(ill, ops.total(ops.diagonal(table)) + 1, ridge)
        w = ops.solve(table, right, ridge)
        square = ops.total(w * right) - ridge * ops.total(w * w)
        workers = ops.shape(here)[-1]
        return w[..., :workers], None if scale is None else w[..., workers:] * scale, square, ill

    def _by_past(self, s: Statistics, ridge: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same with the past alone: (P^T P + r)^-1 gbar = (gbar - P^T y) / r where (P P^T + r) y = P gbar.

        P has the rows p_k / sqrt(m). The factor 1 / r does not matter.
        """
        ops = ops_for(s.squares)
        average = average_weights(s.present)
        count = ops.clip(s.past_count, 1, self.memory)
        scale = 1 / ops.sqrt(count)
        table = s.past_gramian * (scale * scale)[..., None]
        # <gbar, p_k> is the mean of <g_i, p_k>.
        right = ops.total(ops.transposed(s.past))[..., 0] / count_present(s.present) * scale
        ill = ridge <= ROUNDING * ops.total(ops.diagonal(table))
        ridge = ops.where(ill, ops.total(ops.diagonal(table)) + 1, ridge)
        y = ops.solve(table, right, ridge)
        square = s.mean_square - ops.total(y * right) - ridge * ops.total(y * y)
        return average, -y * scale, square, ill | (square <= ROUNDING * s.mean_square)
