"""Buckets and schedules: a bucket is a message-sized piece of gradient, a schedule is a way to move it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from ..aggregators import Memory
from ..collectives import Collectives, Pending
from ..ops import Tensor, ops_for

if TYPE_CHECKING:
    from ..costs import Rates

__all__ = ["Bucket", "Combination", "DenseBucket", "Done", "Schedule", "Segment", "Share", "Transfer"]


class Segment(NamedTuple):
    """The elements ``start`` to ``stop`` of a bucket belong to group ``group``."""

    start: int
    stop: int
    group: int


class Share(NamedTuple):
    """One worker's share of one group's statistics; shares add up over buckets and workers.

    ``table`` is ``[N, k]`` with a row for each worker, or ``[k]``: the row of this worker alone.
    k is N for a Gramian, else 2; see :meth:`Statistics.read`.
    """

    group: int
    table: Tensor


@dataclass(frozen=True)
class Combination:
    """How the gradients of one step are combined."""

    #: ``[groups, N]``, or ``[groups, N + m]``: the weights of the workers' gradients, and then those of the means kept.
    weights: Tensor
    #: ``[groups, N]``: the weights that make this step's mean, and ``[1]``, where it is kept.
    mean: Tensor = None
    slot: Tensor = None
    #: In place of weights: the combined elements of a group, of everyone's rows.
    elements: Callable[[Tensor, int], Tensor] | None = None


# --- schedules: how a dense bucket travels ------------------------------------------------------


class Schedule:
    """One way to move dense buckets. Stateless: each bucket has a :class:`Transfer` of its own."""

    name: ClassVar[str]
    #: Whether the statistics are as exact as arithmetic allows.
    exact: ClassVar[bool] = True
    #: Whether every worker sees everything, so that shares need no summing over workers.
    complete: ClassVar[bool] = False
    #: Whether each element of all workers' gradients comes together somewhere. That is what the Gramian, a history of
    #: mean gradients and aggregators that work element by element take.
    sees_all: ClassVar[bool] = False
    #: Whether a bucket may begin before the others are filled.
    overlaps: ClassVar[bool] = True
    #: Whether it needs no collective but sums, the only ones that Horovod still has once a worker
    #: has left with ``hvd.join()``.
    only_sums: ClassVar[bool] = False

    def __init__(self, collectives: Collectives, predivide: float = 1.0, history: int = 0) -> None:
        self.collectives = collectives
        self.predivide = predivide
        #: How many steps' mean gradients its buckets keep.
        self.history = history

    @property
    def multiple(self) -> int:
        """What the length of a bucket must be a multiple of, so that shards have equal length."""
        return self.collectives.size

    def transfer(self, bucket: DenseBucket) -> Transfer:
        """Make the object that moves this one bucket in every step."""
        raise NotImplementedError

    def kept(self, length: int) -> tuple[int, int]:
        """The part of a bucket whose mean gradients this worker keeps, where it ``sees_all``."""
        raise NotImplementedError

    @classmethod
    def cost(cls, rates: Rates, size: float, bucket: float, gramian: bool = False, history: int = 0) -> float:
        """Seconds one step's collectives and arithmetic take, for ``size`` bytes of float32 gradient per worker that
        are sent in messages of ``bucket`` bytes, for an aggregator that needs the Gramian or a history."""
        raise NotImplementedError


def passes(workers: int, history: int) -> float:
    """How often each of the two passes over the gradients of ``workers`` reads as much as these take.

    With a history the gradients are read twice, once with the means of earlier steps and once without.
    """
    return 2 + history / workers if history else 1.0


class Transfer:
    """One bucket's way through a step, by one schedule. Owns the scratch memory that takes."""

    #: The result of the first collective, once it is finished.
    arrived: Tensor = None
    #: Whether the first collective is no sum, and so must not begin before it is known that all workers are here.
    needs_all: bool = False
    #: Whether it goes the direct way.
    direct: bool = False
    #: Memory for the bucket's content from which it need not be copied; None if any memory is as good.
    place: Tensor = None
    #: Whether what it has begun can be forgotten without the other workers.
    can_forget: bool = False

    def __init__(self, schedule: Schedule) -> None:
        self.collectives = schedule.collectives
        self.predivide = schedule.predivide
        self._scratch: dict[str, Tensor] = {}

    def begin(self, bucket: DenseBucket) -> Pending:
        """Start the first collective."""
        raise NotImplementedError

    def shares(self, bucket: DenseBucket, gramian: bool) -> Iterator[Share]:
        """Look at what arrived, once for every segment of which this worker has a part."""
        raise NotImplementedError

    def combine(self, bucket: DenseBucket, combination: Combination) -> Pending:
        """Combine the gradients and start the last collective."""
        raise NotImplementedError

    def scratch(
        self, bucket: DenseBucket, purpose: str, length: int, like: Tensor = None, half: bool = False
    ) -> Tensor | None:
        """Memory for a result, the same in every step; None where the framework decides.

        Its elements are those of ``like``, by default the bucket's buffer, or of half precision.
        """
        if purpose not in self._scratch:
            like = bucket.buffer if like is None else like
            self._scratch[purpose] = ops_for(like).room(like, length, half)
        return self._scratch[purpose]


@dataclass(frozen=True)
class Done:
    """A :class:`Pending` with nothing left to do."""

    result: Tensor

    def wait(self) -> Tensor:
        return self.result

    def done(self) -> bool:
        return True


# --- buckets: what travels ----------------------------------------------------------------------


class Bucket:
    """A message-sized piece of the gradient."""

    name: str
    #: Whether every worker ends up with the statistics of all.
    complete: bool
    #: Whether it must not begin before it is known that all workers are here.
    needs_all: bool = False
    #: Whether the first collective goes the direct way.
    direct: bool = False
    begun: bool = False
    #: The aggregator's memory of earlier steps, and the factor that gradients had to be multiplied by
    #: to undo a loss scale: in this step, or in the last if this one begins during backward.
    memory: Memory
    unscale: Tensor | float

    @property
    def reference(self) -> Tensor:
        """Some tensor of this bucket, for its framework and device."""
        raise NotImplementedError

    def begin(self) -> None:
        """Start the first collective. The content must not change until it is finished."""
        raise NotImplementedError

    def abandon(self) -> None:
        """Finish the first collective and forget it, so that the bucket can begin again."""
        raise NotImplementedError

    def shares(self, gramian: bool) -> list[Share]:
        """Finish the first collective and return this worker's shares of the statistics."""
        raise NotImplementedError

    def combine(self, combination: Combination) -> None:
        """Combine the gradients and start the last collective."""
        raise NotImplementedError

    def finish(self) -> None:
        """Finish the last collective; the bucket then holds the aggregated gradient."""
        raise NotImplementedError

    def square(self) -> Tensor:
        """``<g, g>`` of this worker's part; before ``begin``."""
        raise NotImplementedError

    def blank_unless(self, condition: Tensor) -> None:
        """Replace the content by zeros unless ``condition`` holds; before ``begin``."""
        raise NotImplementedError


@dataclass
class DenseBucket(Bucket):
    """A flat tensor, whose length is a multiple of the schedule's ``multiple``.

    ``buffer`` holds this worker's gradient and, after ``finish``, the aggregated one, still to be
    multiplied by ``restore`` of its group if that is set. ``past`` holds the mean gradients of earlier steps, of the
    part that :meth:`Schedule.kept` says, where the schedule has a history; see ``ops.past_room``.
    """

    name: str
    buffer: Tensor
    segments: Sequence[Segment]
    schedule: Schedule
    #: ``[groups, 1]`` or None: what the result still has to be multiplied by.
    restore: Tensor | None = None
    past: Tensor | None = None
    memory: Memory = field(default_factory=dict)
    unscale: Tensor | float = 1.0
    _pending: Pending | None = None

    def __post_init__(self) -> None:
        ops = ops_for(self.buffer)
        (self.length,) = ops.shape(self.buffer)
        self.bytes = self.length * ops.width(self.buffer)
        self.half = ops.is_half(self.buffer)
        self.complete = self.schedule.complete
        self._transfer = self.schedule.transfer(self)
        self.needs_all, self.direct = self._transfer.needs_all, self._transfer.direct
        if self.schedule.history and self.past is None:
            start, stop = self.schedule.kept(self.length)
            self.past = ops.past_room(self.buffer, self.schedule.history, stop - start)

    @property
    def reference(self) -> Tensor:
        return self.buffer

    @property
    def place(self) -> Tensor | None:
        """Memory for the content, in which it costs one copy less; None if any memory is as good."""
        return self._transfer.place

    def remembered(self, name: str) -> Tensor:
        """``[groups, 1]`` of the memory; zeros before the first step."""
        if name in self.memory:
            return ops_for(self.buffer).beside(self.memory[name], self.buffer)
        groups = 1 + max(segment.group for segment in self.segments)
        return ops_for(self.buffer).zeros((groups, 1), self.buffer)

    def begin(self) -> None:
        self._pending = self._transfer.begin(self)
        self.begun = True

    def abandon(self) -> None:
        if self._transfer.can_forget:
            self._pending = None
        else:
            self._wait()
        self.begun = False

    def shares(self, gramian: bool) -> list[Share]:
        self._transfer.arrived = self._wait()
        return list(self._transfer.shares(self, gramian))

    def combine(self, combination: Combination) -> None:
        if self.half and combination.elements is None:
            # A half-precision result shorter than about 1e-5 loses its digits on the way, and
            # AdaCons' unit-length ones are. So half-precision buckets carry a convex combination
            # of gradients, which needs the range the gradients have, and are stretched on arrival.
            weights = combination.weights
            ops = ops_for(weights)
            size = ops.total(ops.absolute(weights))
            self.restore = ops.where(size > 0, size, ops.ones_like(size))
            combination = replace(combination, weights=weights / self.restore)
        self._pending = self._transfer.combine(self, combination)

    def finish(self) -> None:
        self.buffer, self._transfer.arrived = self._wait(), None
        self.begun = False

    def square(self) -> Tensor:
        return ops_for(self.buffer).square(self.buffer[: self.segments[-1].stop])

    def blank_unless(self, condition: Tensor) -> None:
        self.buffer = ops_for(self.buffer).blank_unless(condition, self.buffer)

    def _wait(self) -> Tensor:
        assert self._pending is not None, f"bucket {self.name} has nothing under way"
        result, self._pending = self._pending.wait(), None
        return result
