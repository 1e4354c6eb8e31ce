"""The base of every aggregator: statistics of N workers' gradients in, N weights out, made safe and counted.

All tensors here are small, ``[..., N]`` float64: N workers on the last axis, any number of groups
of parameters before it, so that ten thousand layers cost as many operations as one. Nothing
branches on a tensor's value, so the same lines run eagerly, inside a ``tf.function`` and on an
accelerator without waiting for it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from ..ops import Tensor, ops_for
from .checkpoint import Memory, pack_memory, unpack_memory

__all__ = [
    "NONFINITE_POLICIES",
    "Aggregator",
    "Decision",
    "Statistics",
    "average_weights",
    "count_present",
    "one_of",
    "table_of",
]

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
    #: ``<g_i, p_k>``, ``[..., N, m]``, with the mean gradients of m steps before this one; this and the next two only
    #: for aggregators with a ``history`` of m.
    past: Tensor | None = None
    #: ``<p_k, p_l>``, ``[..., m, m]``.
    past_gramian: Tensor | None = None
    #: ``[..., 1]``: how many of the m there are yet. What belongs to the others is zero.
    past_count: Tensor | None = None

    @classmethod
    def of(
        cls, gradients: Tensor, gramian: bool = False, present: Tensor | None = None, past: Tensor | None = None
    ) -> Statistics:
        """Compute them from an N x d matrix that is already in one place.

        ``past`` are the rows that ``ops.past_room`` makes: the means of m earlier steps, and one row more.
        """
        ops = ops_for(gradients)
        table = table_of(gradients, gramian, past)
        if present is None:
            present = ops.booleans((ops.shape(table)[0],), True, table)
        return cls.read(table, present, gramian, 0 if past is None else ops.shape(past)[0] - 1)

    @classmethod
    def read(cls, table: Tensor, present: Tensor, gramian: bool, history: int = 0) -> Statistics:
        """Read them off the table the schedules exchange.

        The table is the Gramian, ``[..., N, N]``, or else ``[..., N, 2]`` with
        ``<g_i, sum_j g_j>`` and ``<g_i, g_i>``; workers not present contribute zeros to either. Where there is a
        history, ``<g_i, p_k>`` follow in ``history`` more columns.
        """
        ops = ops_for(table)
        count = count_present(present)
        past = None
        if history:
            width = ops.shape(table)[-1] - history
            table, past = table[..., :width], table[..., width:]
        if gramian:
            return cls(ops.total(table)[..., 0] / count, ops.diagonal(table), present, table, past)
        return cls(table[..., 0] / count, table[..., 1], present, None, past)

    @property
    def norms(self) -> Tensor:
        """``n_i``, the length of worker i's gradient."""
        return ops_for(self.squares).sqrt(self.squares)

    def scaled(self, factor: Tensor | float) -> Statistics:
        """The statistics of the same gradients, each multiplied by ``factor``; earlier steps' stay as they are."""
        square = factor * factor
        gramian = None if self.gramian is None else self.gramian * square
        past = None if self.past is None else self.past * factor
        return replace(self, dots=self.dots * square, squares=self.squares * square, gramian=gramian, past=past)

    @property
    def mean_square(self) -> Tensor:
        """``[..., 1]``: the squared length of the mean gradient, which is the mean of the inner products with it."""
        ops = ops_for(self.dots)
        here = ops.where(self.present, self.dots, ops.zeros_like(self.dots))
        return ops.total(here) / count_present(self.present)


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
    #: ``[..., m]``: to the aggregated gradient, ``sum_k past_weights_k p_k`` is added. None without a history.
    past_weights: Tensor | None = None
    #: ``[1]``: which of the m mean gradients this step's takes the place of; m if it is not kept. None without a
    #: history. :meth:`Aggregator.decide` sets it.
    slot: Tensor | None = None
    #: ``[..., N]``, boolean: the workers that the aggregator reckoned with. :meth:`Aggregator.decide` sets it.
    present: Tensor | None = None
    #: Numbers for :meth:`Aggregator.tell`, flat: the first N of them are not zero where there is news of a worker.
    news: Tensor | None = None


class _Itself:
    """A value as a key, equal to no other's: some values cannot be keys, or take themselves for equal to others."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


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

    #: Set to True, in the very class that has the mathematics, if what it decides depends on nothing but its arguments
    #: and the settings in its ``repr``, and if it reads no number and changes nothing. On a GPU the operations of a
    #: decision are then recorded once and repeated by one launch, and TensorFlow makes their graph once for all models.
    pure: ClassVar[bool] = False

    #: How many steps' mean gradients the aggregator wants to be kept for it, sharded over the workers. It then finds
    #: ``statistics.past`` and may give the means weights of their own, ``Decision.past_weights``. The same schedules
    #: can do it as have the Gramian.
    history: int = 0

    #: The effect of a gradient that holds NaN or infinity: ``"propagate"`` (the step is the plain
    #: average, so every rank sees the value and a loss scaler skips the step everywhere),
    #: ``"exclude"`` (that worker sits this step out) or ``"raise"`` (an error on every rank).
    nonfinite: str = "propagate"

    # The memory used by a call, and only by it.
    _memory: Memory = {}  # noqa: RUF012 - replaced, never changed
    _workers: int = 0
    _past: Tensor = None

    # --- what a subclass provides ---------------------------------------------------------------

    def weights(self, statistics: Statistics) -> Tensor:
        """Return the ``[..., N]`` weights. The statistics are finite."""
        raise NotImplementedError(f"{type(self).__name__} must override weights() or weigh()")

    def combine(self, rows: Tensor, present: Tensor) -> Tensor:
        """Return the aggregated gradient of some elements, ``[L]``, from everyone's gradient for them, ``[N, L]``.

        For aggregators whose result is not a weighted sum, in place of :meth:`weights`. What is computed of an element
        must not depend on the others, because workers see different parts of the gradient. ``present`` is ``[N]``, and
        the rows of workers who are not are zeros. Only the schedules that have the Gramian can do this.
        """
        raise NotImplementedError(f"{type(self).__name__} combines gradients by weights")

    def start(self, statistics: Statistics) -> Memory:
        """Return the memory to begin with; ``statistics`` shows the shapes."""
        return {}

    def weigh(self, statistics: Statistics, memory: Memory) -> Decision:
        """Return the weights and the new memory. The default is for aggregators without one."""
        weights = average_weights(statistics.present) if self.elementwise else self.weights(statistics)
        ops = ops_for(weights)
        no = ops.booleans((*ops.shape(statistics.squares)[:-1], 1), False, weights)
        return Decision(weights, memory, fallback=no)

    def resize(self, memory: Memory, workers: int) -> Memory:
        """Return ``memory`` made for another number of workers; by default it starts afresh."""
        return {}

    def tell(self, news: Sequence[float], first: bool) -> None:
        """Tell the user what a decision's ``news`` says. All workers call it; ``first`` is true on one."""

    @property
    def is_portable(self) -> bool:
        """Whether this very class says that it is; one that is derived from it may compute in another way."""
        return bool(vars(type(self)).get("portable", False))

    @property
    def is_pure(self) -> bool:
        """Whether this very class says that it is."""
        return bool(vars(type(self)).get("pure", False))

    @property
    def identity(self) -> Hashable:
        """Equal for aggregators that decide alike, if they are pure: the class and the settings, also of those inside.

        Functions are in it besides their addresses in the ``repr``, which could be those of others later.
        """
        callables = [value for value in vars(self).values() if callable(value)]
        inside = tuple(value.identity if isinstance(value, Aggregator) else _Itself(value) for value in callables)
        return type(self), repr(self), inside

    # --- what every aggregator shares -----------------------------------------------------------

    @property
    def elementwise(self) -> bool:
        """Whether the aggregator combines gradients element by element, and not by weights."""
        return type(self).combine is not Aggregator.combine

    @property
    def needs(self) -> str:
        """What the aggregator needs and not every schedule sees, in words; empty if dots and squares are enough."""
        needs = [
            "the Gramian of all gradients" if self.needs_gramian else "",
            "the mean gradients of earlier steps" if self.history else "",
            "every worker's gradient element by element" if self.elementwise else "",
        ]
        return " and ".join(filter(None, needs))

    def decide(self, statistics: Statistics, memory: Memory) -> Decision:
        """Turn one step's statistics into weights: :meth:`weigh`, made safe and counted.

        Statistics that are not finite make the step a plain average and leave the memory as it
        was. The memory gains two counters: ``steps``, and ``fallbacks`` to the average; and the
        gradients' ``length``, root mean square over the workers, which tells schedules what to
        expect of the next step. An empty ``memory`` is the state before the first step. With a
        history it gains ``kept``, how many means were kept so far, and ``past``, their Gramian.
        """
        ops = ops_for(statistics.squares)
        present = statistics.present
        known = ops.isfinite(statistics.squares)
        finite = ops.every(ops.isfinite(statistics.dots) & known)
        squares = ops.where(known, statistics.squares, ops.zeros_like(statistics.squares))
        length = ops.sqrt(ops.total(squares) / count_present(present & known))
        statistics = _zero_unless(finite, statistics)
        if len(memory) == len(_COMMON) or not memory.keys() >= {*_COMMON, *(_PAST if self.history else ())}:
            # The first step, or what another aggregator or an earlier version has left.
            memory = {**self.started(statistics), **memory}
        if self.history:
            count = ops.clip(memory["kept"], 0, self.history)
            statistics = replace(statistics, past_gramian=memory["past"], past_count=count)
        own = _own(memory)
        decision = self.weigh(statistics, own)
        self._check_weights(decision.weights, statistics)
        usable = finite & ops.every(ops.isfinite(decision.weights))
        past_weights, slot = decision.past_weights, None
        kept: Memory = {}
        if self.history:
            if past_weights is None:
                past_weights = ops.zeros_like(memory["past"][..., 0])
            usable = usable & ops.every(ops.isfinite(past_weights))
            slot, kept = self._keep(statistics, memory, finite)
        fallback = decision.fallback | ~usable
        if past_weights is not None:
            past_weights = ops.where(fallback, ops.zeros_like(past_weights), past_weights)
        return Decision(
            weights=ops.where(fallback | ~present, average_weights(present), decision.weights),
            memory={
                "steps": memory["steps"] + 1,
                "fallbacks": memory["fallbacks"] + ops.wide(fallback),
                "length": ops.where(length > 0, length, memory["length"]),
                **kept,
                **{k: ops.where(usable, new, own[k]) for k, new in decision.memory.items()},
            },
            fallback=fallback,
            stages=decision.stages,
            past_weights=past_weights,
            slot=slot,
            present=present,
        )

    def _keep(self, statistics: Statistics, memory: Memory, finite: Tensor) -> tuple[Tensor, Memory]:
        """Find a place for this step's mean gradient, and its inner products with those kept.

        It is kept in all groups or in none, and not where a gradient is not finite or all are zero.
        """
        ops = ops_for(statistics.squares)
        steps = self.history
        keep = ops.every(ops.reshape(finite, (-1,))) & ops.any_of(ops.reshape(statistics.squares > 0, (-1,)))
        place = ops.reshape(memory["kept"], (-1,))[:1]
        slot = ops.where(keep, place - steps * ops.floor(place / steps), ops.zeros_like(place) + steps)
        # <gbar, p_k> is the mean of <g_i, p_k>.
        products = ops.total(ops.transposed(statistics.past))[..., 0] / count_present(statistics.present)
        here = ops.like(range(steps), place) == slot
        row = ops.where(here, statistics.mean_square, products)
        past = ops.where(here, row[..., :, None], memory["past"])
        past = ops.where(here[:, None], row[..., None, :], past)
        return slot, {"kept": memory["kept"] + ops.wide(keep), "past": past}

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
        taken = sorted(set(own) & {*_COMMON, *_PAST})
        if taken:
            raise ValueError(f"{type(self).__name__}.start() returns {taken}, names that every aggregator's memory has")
        return {**dict.fromkeys(_COMMON, zero), **self.no_past(zero), **own}

    def no_past(self, like: Tensor) -> Memory:
        """What a memory holds of earlier steps' means before any was kept; ``like`` is ``[..., 1]``."""
        ops = ops_for(like)
        steps = self.history
        zero = ops.zeros_like(like)
        return {"kept": zero, "past": ops.zeros((*ops.shape(like)[:-1], steps, steps), like)} if steps else {}

    def adopted(self, memory: Memory) -> Memory:
        """Return a memory that was loaded, without what it holds of another number of earlier steps."""
        if "past" in memory and ops_for(memory["past"]).shape(memory["past"])[-1] != self.history:
            return {name: value for name, value in memory.items() if name not in _PAST}
        return memory

    def resized(self, memory: Memory, workers: int) -> Memory:
        """Return a whole memory, counters included, made for another number of workers."""
        own = _own(memory)
        if not own:
            return memory
        resized = self.resize(own, workers)
        common = {name: value for name, value in memory.items() if name not in own}
        return {**common, **resized} if resized or self.history else {}

    def explain(self, gradients: Tensor) -> tuple[Decision, Tensor]:
        """Decide on the rows of an N x d matrix, and return the rows the weights are for.

        These are the given rows, unless ``nonfinite="exclude"`` replaced some with zeros.
        """
        decision, rows, _ = self._aggregate(gradients)
        return decision, rows

    def __call__(self, gradients: Tensor) -> Tensor:
        """Aggregate the rows of an N x d matrix, with this instance's own memory.

        For notebooks, tests and studies of many simulated workers; no cluster needed.
        """
        return self._aggregate(gradients)[2]

    def _aggregate(self, gradients: Tensor) -> tuple[Decision, Tensor, Tensor]:
        ops = ops_for(gradients)
        rows = ops.floating(gradients)
        workers, length = ops.shape(rows)
        past = self._past
        if self.history and (past is None or ops.shape(past)[1] != length):
            # Parameters have changed, so there is nothing to compare with any more.
            past, self._memory = ops.past_room(rows[0], self.history, length), {}
        statistics = Statistics.of(rows, self.needs_gramian, past=past)
        finite = ops.isfinite(statistics.squares)
        if self.nonfinite == "raise":
            self.refuse([rank for rank, fine in enumerate(ops.to_list(finite)) if not fine])
        if self.nonfinite == "exclude":
            rows = ops.where(finite[:, None], rows, ops.zeros_like(rows))
            statistics = Statistics.of(rows, self.needs_gramian, finite, past)
        memory = self._memory
        if memory and workers != self._workers:
            memory = self.resized(memory, workers)
        decision = self.decide(statistics, memory)
        self._memory, self._workers = decision.memory, workers
        weights, present = decision.weights, decision.present
        if decision.news is not None:
            self.tell(ops.to_list(decision.news), True)
        if self.elementwise:
            average = ops.combine(weights, rows)
            return decision, rows, ops.where(decision.fallback, average, self.combine(rows, present))
        if past is None:
            return decision, rows, ops.combine(weights, rows)
        result = ops.combine_segments(rows, [(0, length, ops.concat([weights, decision.past_weights]))], None, past)
        mean = ops.combine(average_weights(present), ops.working(rows))
        self._past = ops.keep_row(past, decision.slot, mean)
        return decision, rows, result

    def refuse(self, ranks: Sequence[int | str]) -> None:
        """Raise the error of ``nonfinite="raise"`` if any ranks are given."""
        if ranks:
            raise FloatingPointError(
                f"the gradient of rank {', '.join(map(str, ranks))} holds NaN or infinity "
                f"(or is so large that its square overflows), and {self!r} was told to raise"
            )

    def state_dict(self) -> dict[str, Any]:
        """This instance's own memory, as plain tensors and numbers."""
        return pack_memory(self._memory, self._workers) | ({} if self._past is None else {"means": self._past})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned."""
        self._past = state.get("means")
        self._memory, self._workers = unpack_memory(state)

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if k[0] != "_")
        return f"{type(self).__name__}({settings})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))


def table_of(rows: Tensor, gramian: bool, past: Tensor | None = None) -> Tensor:
    """What :meth:`Statistics.read` reads, of everyone's gradients or of the same part of each."""
    ops = ops_for(rows)
    table = ops.gramian(rows) if gramian else ops.consensus(rows)
    return table if past is None else ops.join([table, ops.cross(rows, past[: ops.shape(past)[0] - 1])], -1)


def average_weights(present: Tensor) -> Tensor:
    """The weights of the plain average."""
    return ops_for(present).wide(present) / count_present(present)


def count_present(present: Tensor) -> Tensor:
    """How many take part, ``[..., 1]``; at least 1, to divide by."""
    ops = ops_for(present)
    count = ops.total(ops.wide(present))
    return ops.where(count > 0, count, ops.ones_like(count))


def _zero_unless(condition: Tensor, s: Statistics) -> Statistics:
    """``s`` where ``condition`` (``[..., 1]``) holds, zeros elsewhere."""
    ops = ops_for(s.squares)
    zero = ops.zeros_like(s.squares)
    # One zero, because a thousand workers' Gramian takes longer to fill with zeros than to read.
    nothing = zero[..., :1, None] if s.gramian is not None or s.past is not None else None
    gramian, past = (
        None if table is None else ops.where(condition[..., None], table, nothing) for table in (s.gramian, s.past)
    )
    dots, squares = ops.where(condition, s.dots, zero), ops.where(condition, s.squares, zero)
    return replace(s, dots=dots, squares=squares, gramian=gramian, past=past)


#: The names in every aggregator's memory; the rest is its own.
_COMMON = ("steps", "fallbacks", "length")

#: And in that of every aggregator with a history.
_PAST = ("kept", "past")


def _own(memory: Memory) -> Memory:
    """The part of a memory that is the aggregator's own."""
    return {name: value for name, value in memory.items() if name not in {*_COMMON, *_PAST}}


def one_of(argument: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{argument} must be one of {', '.join(choices)}, got {value!r}")
    return value
