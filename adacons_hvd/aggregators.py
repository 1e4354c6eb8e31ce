"""The mathematics: statistics of N workers' gradients in, N weights out.

This module reads beside section 3 of *Adaptive Consensus Gradients Aggregation* (arXiv
2411.03742) and beside ``docs/method.md``, which lists every place where the paper leaves a choice
and what is done there. It knows nothing of frameworks (operations come from
:mod:`adacons_hvd.ops`), of communication (:mod:`adacons_hvd.schedules` produces the statistics and
applies the weights) or of optimizers.

All tensors here are small, ``[..., N]`` float64: N workers on the last axis, any number of groups
of parameters before it, so that ten thousand layers cost as many operations as one. Nothing
branches on a tensor's value, so the same lines run eagerly, inside a ``tf.function`` and on an
accelerator without waiting for it.

To add an aggregator, subclass :class:`Aggregator` and write one method:

>>> import torch
>>> class InverseNorm(Aggregator):
...     '''Weigh each worker by one over its gradient's length.'''
...     def weights(self, statistics):
...         inverse = 1 / statistics.norms
...         return inverse / inverse.sum(-1, keepdim=True)
>>> InverseNorm()(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
tensor([0.7500, 0.7500])
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .ops import Tensor, ops_for

__all__ = ["AdaCons", "Aggregator", "Decision", "Mean", "Memory", "Statistics", "resample"]

#: What an aggregator carries from step to step: named float64 tensors, empty at first.
Memory = dict[str, Tensor]

#: Eq. 13 divides by the sum of the coefficients. Below this fraction of the sum of their absolute
#: values they cancel rather than agree: the quotient would be a step a hundred times too long, or
#: one uphill, and in float32 have lost two of its seven digits.
CANCELLATION = 1e-2

NONFINITE_POLICIES = ("propagate", "exclude", "raise")


@dataclass(frozen=True)
class Statistics:
    """What is known about N workers' gradients, for one group of parameters or several.

    >>> import torch
    >>> g = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    >>> Statistics.of(g).norms
    tensor([5., 1.], dtype=torch.float64)
    """

    #: ``s_i``, ``[..., N]``: the inner product of worker i's gradient with the mean gradient.
    dots: Tensor
    #: ``n_i ** 2``, ``[..., N]``: the squared norm of worker i's gradient.
    squares: Tensor
    #: ``[..., N]``, boolean: who takes part in this step. Others are no part of the mean either.
    present: Tensor
    #: ``<g_i, g_j>``, ``[..., N, N]``; only for aggregators that set ``needs_gramian``.
    gramian: Tensor | None = None

    @classmethod
    def of(cls, gradients: Tensor, gramian: bool = False, present: Tensor | None = None) -> Statistics:
        """Compute them from an N x d matrix that is already in one place."""
        ops = ops_for(gradients)
        table = ops.gramian(gradients) if gramian else ops.consensus(gradients)
        if present is None:
            present = ops.zeros((ops.shape(table)[0],), table) == 0
        return cls.read(table, present, gramian)

    @classmethod
    def read(cls, table: Tensor, present: Tensor, gramian: bool) -> Statistics:
        """Read them off the table the schedules exchange.

        The table is the Gramian, ``[..., N, N]``, or else ``[..., N, 2]`` with
        ``<g_i, sum_j g_j>`` and ``<g_i, g_i>``; workers not present contribute zeros to either.
        """
        ops = ops_for(table)
        count = _count(present)
        if gramian:
            return cls(ops.total(table)[..., 0] / count, ops.diagonal(table), present, table)
        return cls(table[..., 0] / count, table[..., 1], present)

    @property
    def norms(self) -> Tensor:
        """``n_i``, the length of worker i's gradient."""
        return ops_for(self.squares).sqrt(self.squares)

    def scaled(self, factor: Tensor | float) -> Statistics:
        """The statistics of the same gradients, each multiplied by ``factor``."""
        square = factor * factor
        gramian = None if self.gramian is None else self.gramian * square
        return Statistics(self.dots * square, self.squares * square, self.present, gramian)


@dataclass(frozen=True)
class Decision:
    """The outcome of one step: the weights, and how they came about."""

    #: ``gamma``, ``[..., N]``: the aggregated gradient is ``sum_i gamma_i g_i``.
    weights: Tensor
    #: What the aggregator carries to the next step.
    memory: Memory
    #: ``[..., 1]``, boolean: this step is the plain average, because the aggregator had no answer.
    fallback: Tensor
    #: The stages on the way to the weights, by name, in order.
    stages: Mapping[str, Tensor] = field(default_factory=dict)


class Aggregator:
    """How N gradients become one. Subclasses say which weights; everything else is done here.

    The simplest subclass overrides :meth:`weights`. One that remembers earlier steps overrides
    :meth:`start` and :meth:`weigh`, and :meth:`resize` if what it remembers survives a change in
    the number of workers. An instance can be called on an N x d matrix of gradients; it then keeps
    its own memory. A binding keeps the memory itself, per optimizer, so one instance may serve
    several.
    """

    #: Set to True to be given ``statistics.gramian``. Schedules that can only produce dots and
    #: squares then refuse to run, and ``schedule="auto"`` chooses among the others.
    needs_gramian: ClassVar[bool] = False

    #: What a gradient that holds NaN or infinity does: ``"propagate"`` (the step is the plain
    #: average, so every rank sees the value and a loss scaler skips the step everywhere),
    #: ``"exclude"`` (that worker sits this step out) or ``"raise"`` (an error on every rank).
    nonfinite: str = "propagate"

    # The memory used by a call, and only by it.
    _memory: Memory = {}  # noqa: RUF012 - replaced, never changed
    _workers: int = 0

    # --- what a subclass provides ---------------------------------------------------------------

    def weights(self, statistics: Statistics) -> Tensor:
        """Return the ``[..., N]`` weights. The statistics are finite."""
        raise NotImplementedError(f"{type(self).__name__} must override weights() or weigh()")

    def start(self, statistics: Statistics) -> Memory:
        """Return the memory to begin with; ``statistics`` shows the shapes."""
        return {}

    def weigh(self, statistics: Statistics, memory: Memory) -> Decision:
        """Return the weights and the new memory. The default is for aggregators without one."""
        weights = self.weights(statistics)
        ops = ops_for(weights)
        never = ops.total(statistics.squares) < 0
        return Decision(weights, memory, never)

    def resize(self, memory: Memory, workers: int) -> Memory:
        """Return ``memory`` made for another number of workers; by default it starts afresh."""
        return {}

    # --- what every aggregator shares -----------------------------------------------------------

    def decide(self, statistics: Statistics, memory: Memory) -> Decision:
        """Turn one step's statistics into weights: :meth:`weigh`, made safe and counted.

        Statistics that are not finite make the step a plain average and leave the memory as it
        was. The memory gains two counters: ``steps``, and ``fallbacks`` to the average; and the
        gradients' ``length``, root mean square over the workers, which tells schedules what to
        expect of the next step. An empty ``memory`` is the state before the first step.
        """
        ops = ops_for(statistics.squares)
        present = statistics.present
        known = ops.isfinite(statistics.squares)
        finite = ops.every(ops.isfinite(statistics.dots) & known)
        squares = ops.where(known, statistics.squares, ops.zeros_like(statistics.squares))
        length = ops.sqrt(ops.total(squares) / _count(present & known))
        statistics = _zero_unless(finite, statistics)
        if len(memory) == len(_COMMON) or not memory.keys() >= set(_COMMON):
            # The first step, or what another aggregator or an earlier version has left.
            memory = {**self.started(statistics), **memory}
        own = _own(memory)
        decision = self.weigh(statistics, own)
        self._check_weights(decision.weights, statistics)
        usable = finite & ops.every(ops.isfinite(decision.weights))
        fallback = decision.fallback | ~usable
        average = ops.wide(present) / _count(present)
        return Decision(
            weights=ops.where(fallback | ~present, average, decision.weights),
            memory={
                "steps": memory["steps"] + 1,
                "fallbacks": memory["fallbacks"] + ops.wide(fallback),
                "length": ops.where(length > 0, length, memory["length"]),
                **{k: ops.where(usable, new, own[k]) for k, new in decision.memory.items()},
            },
            fallback=fallback,
            stages=decision.stages,
        )

    def _check_weights(self, weights: Tensor, statistics: Statistics) -> None:
        found, expected = ops_for(weights).shape(weights), ops_for(weights).shape(statistics.squares)
        if found != expected:
            raise ValueError(
                f"{self!r} returned weights of shape {found}, but there must be one for each worker of each group, "
                f"{expected}"
            )

    def started(self, statistics: Statistics) -> Memory:
        """Return a whole memory to begin with; ``statistics`` shows the shapes."""
        ops = ops_for(statistics.squares)
        zero = ops.zeros((*ops.shape(statistics.squares)[:-1], 1), statistics.squares)
        own = self.start(statistics)
        taken = sorted(set(own) & set(_COMMON))
        if taken:
            raise ValueError(f"{type(self).__name__}.start() returns {taken}, names that every aggregator's memory has")
        return {**dict.fromkeys(_COMMON, zero), **own}

    def resized(self, memory: Memory, workers: int) -> Memory:
        """Return a whole memory, counters included, made for another number of workers."""
        own = _own(memory)
        if not own:
            return memory
        resized = self.resize(own, workers)
        return {**{name: value for name, value in memory.items() if name not in own}, **resized} if resized else {}

    def explain(self, gradients: Tensor) -> tuple[Decision, Tensor]:
        """Decide on the rows of an N x d matrix, and return the rows the weights are for.

        These are the given rows, unless ``nonfinite="exclude"`` replaced some with zeros.
        """
        ops = ops_for(gradients)
        gradients = ops.floating(gradients)
        statistics = Statistics.of(gradients, self.needs_gramian)
        finite = ops.isfinite(statistics.squares)
        if self.nonfinite == "raise":
            self.refuse([rank for rank, fine in enumerate(ops.to_list(finite)) if not fine])
        if self.nonfinite == "exclude":
            gradients = ops.where(finite[:, None], gradients, ops.zeros_like(gradients))
            statistics = Statistics.of(gradients, self.needs_gramian, finite)
        workers = ops.shape(gradients)[0]
        memory = self._memory
        if memory and workers != self._workers:
            memory = self.resized(memory, workers)
        decision = self.decide(statistics, memory)
        self._memory, self._workers = decision.memory, workers
        return decision, gradients

    def __call__(self, gradients: Tensor) -> Tensor:
        """Aggregate the rows of an N x d matrix, with this instance's own memory.

        For notebooks, tests and studies of many simulated workers; no cluster needed.
        """
        decision, rows = self.explain(gradients)
        return ops_for(rows).combine(decision.weights, rows)

    def refuse(self, ranks: Sequence[int]) -> None:
        """Raise the error of ``nonfinite="raise"`` if any ranks are given."""
        if ranks:
            raise FloatingPointError(
                f"the gradient of rank {', '.join(map(str, ranks))} holds NaN or infinity "
                f"(or is so large that its square overflows), and {self!r} was told to raise"
            )

    def state_dict(self) -> dict[str, Any]:
        """This instance's own memory, as plain tensors and numbers."""
        return pack_memory(self._memory, self._workers)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned."""
        self._memory, self._workers = unpack_memory(state)

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if k[0] != "_")
        return f"{type(self).__name__}({settings})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))


class Mean(Aggregator):
    """The plain average: what Horovod computes, through the same machinery as the others.

    >>> import torch
    >>> Mean()(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([2., 3.])
    """

    def __init__(self, nonfinite: str = "propagate") -> None:
        self.nonfinite = _one_of("nonfinite", nonfinite, NONFINITE_POLICIES)

    def weights(self, statistics: Statistics) -> Tensor:
        ops = ops_for(statistics.squares)
        return ops.wide(statistics.present) / _count(statistics.present)


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
        self.scale = _one_of("scale", scale, ("unit", "average"))
        self.nonfinite = _one_of("nonfinite", nonfinite, NONFINITE_POLICIES)

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
            count = _count(present)
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


def _count(present: Tensor) -> Tensor:
    """How many take part, ``[..., 1]``; at least 1, to divide by."""
    ops = ops_for(present)
    count = ops.total(ops.wide(present))
    return ops.where(count > 0, count, ops.ones_like(count))


def _zero_unless(condition: Tensor, s: Statistics) -> Statistics:
    """``s`` where ``condition`` (``[..., 1]``) holds, zeros elsewhere."""
    ops = ops_for(s.squares)
    zero = ops.zeros_like(s.squares)
    gramian = s.gramian
    if gramian is not None:
        gramian = ops.where(condition[..., None], gramian, ops.zeros_like(gramian))
    return Statistics(ops.where(condition, s.dots, zero), ops.where(condition, s.squares, zero), s.present, gramian)


#: What is in every aggregator's memory; the rest is its own.
_COMMON = ("steps", "fallbacks", "length")


def _own(memory: Memory) -> Memory:
    """What in a memory is the aggregator's own."""
    return {name: value for name, value in memory.items() if name not in _COMMON}


#: The layout of :func:`pack_memory`, raised when a change would misread older states.
STATE_VERSION = 1


def pack_memory(memory: Memory, workers: int) -> dict[str, Any]:
    """A memory as a checkpoint holds it: a flat dict of numbers and tensors."""
    return {"version": STATE_VERSION, "workers": workers, **memory}


def unpack_memory(state: Mapping[str, Any]) -> tuple[Memory, int]:
    """Undo :func:`pack_memory`, refusing what a later version wrote or something else."""
    if "version" not in state or "workers" not in state:
        raise ValueError(
            f"this is not the state of an aggregator: it has {sorted(state)}, but neither 'version' nor 'workers'"
        )
    if int(state["version"]) > STATE_VERSION:
        raise ValueError(
            f"this aggregator state is of version {int(state['version'])}, written by a later "
            f"adacons_hvd; this one reads up to version {STATE_VERSION}. Upgrade adacons_hvd"
        )
    memory = {name: value for name, value in state.items() if name not in ("version", "workers")}
    for name, value in memory.items():
        if not all(map(math.isfinite, _flat(value))):
            raise ValueError(
                f"this aggregator state is damaged: {name!r} holds NaN or infinity, which none is saved with"
            )
    return memory, int(state["workers"])


def _flat(value: Any) -> Iterator[float]:
    """The numbers in a tensor or an array, of whatever library, or in lists of lists."""
    if isinstance(value, list):
        for item in value:
            yield from _flat(item)
    elif isinstance(value, (int, float)):
        yield value
    else:
        yield from _flat(value.tolist() if hasattr(value, "tolist") else value.numpy().tolist())


def _one_of(argument: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{argument} must be one of {', '.join(choices)}, got {value!r}")
    return value
