"""The base of every aggregator: statistics of N workers' gradients in, N weights out, made safe and counted.

All tensors here are small, ``[..., N]`` float64: N workers on the last axis, any number of groups
of parameters before it, so that ten thousand layers cost as many operations as one. Nothing
branches on a tensor's value, so the same lines run eagerly, inside a ``tf.function`` and on an
accelerator without waiting for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..ops import Tensor, ops_for
from .checkpoint import Memory, pack_memory, unpack_memory

__all__ = ["NONFINITE_POLICIES", "Aggregator", "Decision", "Statistics", "count_present", "one_of"]

NONFINITE_POLICIES = ("propagate", "exclude", "raise")


@dataclass(frozen=True)
class Statistics:
    """The inner products of N workers' gradients, for one group of parameters or several.

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
            present = ops.booleans((ops.shape(table)[0],), True, table)
        return cls.read(table, present, gramian)

    @classmethod
    def read(cls, table: Tensor, present: Tensor, gramian: bool) -> Statistics:
        """Read them off the table the schedules exchange.

        The table is the Gramian, ``[..., N, N]``, or else ``[..., N, 2]`` with
        ``<g_i, sum_j g_j>`` and ``<g_i, g_i>``; workers not present contribute zeros to either.
        """
        ops = ops_for(table)
        count = count_present(present)
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
    #: The memory that the aggregator carries to the next step.
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

    #: Set to True, in the very class that has the mathematics, if it uses nothing but operators and the small
    #: operations of ``ops_for(...)``. It is then computed on Python's own numbers where these are faster: for few
    #: workers whose gradients are on the host.
    portable: ClassVar[bool] = False

    #: The effect of a gradient that holds NaN or infinity: ``"propagate"`` (the step is the plain
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
        no = ops.booleans((*ops.shape(statistics.squares)[:-1], 1), False, weights)
        return Decision(weights, memory, fallback=no)

    def resize(self, memory: Memory, workers: int) -> Memory:
        """Return ``memory`` made for another number of workers; by default it starts afresh."""
        return {}

    @property
    def is_portable(self) -> bool:
        """Whether this very class says that it is; one that is derived from it may compute in another way."""
        return bool(vars(type(self)).get("portable", False))

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
        length = ops.sqrt(ops.total(squares) / count_present(present & known))
        statistics = _zero_unless(finite, statistics)
        if len(memory) == len(_COMMON) or not memory.keys() >= set(_COMMON):
            # The first step, or what another aggregator or an earlier version has left.
            memory = {**self.started(statistics), **memory}
        own = _own(memory)
        decision = self.weigh(statistics, own)
        self._check_weights(decision.weights, statistics)
        usable = finite & ops.every(ops.isfinite(decision.weights))
        fallback = decision.fallback | ~usable
        average = ops.wide(present) / count_present(present)
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


def count_present(present: Tensor) -> Tensor:
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


#: The names in every aggregator's memory; the rest is its own.
_COMMON = ("steps", "fallbacks", "length")


def _own(memory: Memory) -> Memory:
    """The part of a memory that is the aggregator's own."""
    return {name: value for name, value in memory.items() if name not in _COMMON}


def one_of(argument: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{argument} must be one of {', '.join(choices)}, got {value!r}")
    return value
