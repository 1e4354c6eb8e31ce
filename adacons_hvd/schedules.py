"""How gradients move: the same weights, by different sequences of collectives.

A *bucket* is a flat piece of every worker's gradient that travels as one message. A *group* is the
set of parameters that shares one weight per worker; a bucket can hold segments of several groups,
and a group can span several buckets. One step is :meth:`Step.run`:

1. every bucket's first collective begins (bindings call :meth:`Bucket.begin` as soon as backward
   has filled a bucket, long before the rest of the step);
2. each bucket yields its share of the statistics, and one small sum over the workers completes
   them;
3. the aggregator turns statistics into weights;
4. every bucket combines the gradients with the weights.

A *schedule* says what 1, 2 and 4 are. The first three compute the same thing; the others differ
from ``two-pass`` in what the first pass sends, and so know the inner products only nearly:

============  =====================================  ====================  ======================
schedule      1                                      2, local part         4
============  =====================================  ====================  ======================
``two-pass``  allreduce the gradient                 own moments           scale, allreduce
``one-pass``  alltoall: everyone's k-th shard to k   moments of the shard  combine, allgather
``gather``    allreduce everyone's rows, mostly 0    moments of it all     combine
``half``      allreduce it in half precision         own moments           scale, allreduce
``sketch``    allreduce a random sketch of it        own moments           scale, allreduce
============  =====================================  ====================  ======================

``docs/schedules.md`` compares what they send. This module never names a framework or a
communication library; gradients come in through :mod:`adacons_hvd.collectives` and arithmetic
happens in :mod:`adacons_hvd.ops`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from .aggregators import Aggregator, Decision, Memory, Statistics
from .collectives import Collectives, Pending
from .ops import Tensor, ops_for

__all__ = ["SCHEDULES", "Bucket", "DenseBucket", "Schedule", "Segment", "SparseBucket", "Step"]


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


# --- schedules: how a dense bucket travels ------------------------------------------------------


class Schedule:
    """One way to move a dense bucket. Stateless: what is under way is kept in the bucket."""

    name: ClassVar[str]
    #: Whether the statistics are as exact as arithmetic allows.
    exact: ClassVar[bool] = True
    #: Whether every worker sees everything, so that shares need no summing over workers.
    complete: ClassVar[bool] = False
    #: Whether it can give an aggregator the Gramian.
    gives_gramian: ClassVar[bool] = True
    #: Whether a bucket may begin before the others are filled.
    overlaps: ClassVar[bool] = True
    #: Whether it needs no collective but sums, the only ones that Horovod still has once a worker
    #: has left with ``hvd.join()``.
    only_sums: ClassVar[bool] = False

    def __init__(self, collectives: Collectives, predivide: float = 1.0) -> None:
        self.collectives = collectives
        self.predivide = predivide

    def begin(self, bucket: DenseBucket) -> Pending:
        """Start the first collective."""
        raise NotImplementedError

    def shares(self, bucket: DenseBucket, gramian: bool) -> Iterator[Share]:
        """Look at what arrived, once for every segment of which this worker has a part."""
        raise NotImplementedError

    def combine(self, bucket: DenseBucket, weights: Tensor) -> Pending:
        """Apply the ``[groups, N]`` weights and start the last collective."""
        raise NotImplementedError


class TwoPass(Schedule):
    """The paper's Algorithm 1. Twice the traffic of an average, whatever the topology."""

    name = "two-pass"
    gives_gramian = False
    only_sums = True

    def begin(self, bucket: DenseBucket) -> Pending:
        return self.collectives.allreduce(
            bucket.buffer,
            f"{bucket.name}.sum",
            prescale=1 / self._divisor(bucket),
            out=bucket.room("sum", bucket.length),
        )

    def shares(self, bucket: DenseBucket, gramian: bool) -> Iterator[Share]:
        ops = ops_for(bucket.buffer)
        undo = ops.like([self._divisor(bucket), 1.0], bucket.buffer)
        for start, stop, group in bucket.segments:
            row = ops.moments(bucket.buffer[start:stop], bucket.arrived[start:stop])
            yield Share(group, row * undo)

    def combine(self, bucket: DenseBucket, weights: Tensor) -> Pending:
        rank = self.collectives.rank
        own = [(start, stop, weights[group, rank]) for start, stop, group in bucket.segments]
        scaled = ops_for(bucket.buffer).scale_segments(bucket.buffer, own)
        return self.collectives.allreduce(
            scaled,
            f"{bucket.name}.result",
            prescale=1 / self.predivide,
            postscale=self.predivide,
            out=scaled,
        )

    def _divisor(self, bucket: DenseBucket) -> float:
        # The sum of N half-precision gradients may overflow where their mean does not.
        if self.predivide == 1.0 and bucket.half:
            return float(self.collectives.size)
        return self.predivide


class OnePass(Schedule):
    """Each worker aggregates one shard for all. The traffic of one average.

    An allreduce that uses its bandwidth well consists of an alltoall, an addition and an allgather;
    here the worker that would have added N shards looks at them first. Worker k holds shard k of
    everyone's gradient, so the shares of the statistics add up over the workers.
    """

    name = "one-pass"

    def begin(self, bucket: DenseBucket) -> Pending:
        return self.collectives.alltoall(
            bucket.buffer, f"{bucket.name}.shards", out=bucket.room("shards", bucket.length)
        )

    def shares(self, bucket: DenseBucket, gramian: bool) -> Iterator[Share]:
        ops = ops_for(bucket.buffer)
        rows = ops.reshape(bucket.arrived, (self.collectives.size, -1))
        for start, stop, group in self._pieces(bucket):
            part = rows[:, start:stop]
            yield Share(group, ops.gramian(part) if gramian else ops.consensus(part))

    def combine(self, bucket: DenseBucket, weights: Tensor) -> Pending:
        ops = ops_for(bucket.buffer)
        rows = ops.reshape(bucket.arrived, (self.collectives.size, -1))
        pieces = [(start, stop, weights[group]) for start, stop, group in self._pieces(bucket)]
        # Each piece of the result takes the place of the first worker's, which is not needed again.
        shard = ops.combine_segments(rows, pieces, out=rows[0])
        return self.collectives.allgather(shard, f"{bucket.name}.result", out=bucket.buffer)

    def _pieces(self, bucket: DenseBucket) -> Iterator[Segment]:
        """The parts of the bucket's segments that fall into this worker's shard."""
        length = bucket.length // self.collectives.size
        first = self.collectives.rank * length
        for start, stop, group in bucket.segments:
            start, stop = max(start - first, 0), min(stop - first, length)
            if start < stop:
                yield Segment(start, stop, group)


class Gather(Schedule):
    """Everything to everyone: a single round trip, for gradients of a few thousand elements.

    A sum, of matrices in which each worker has filled its own row: it moves more bytes than an
    allgather, of which there are few, but may be on its way before it is known whether a worker
    has left, when Horovod can do nothing else. So bindings let it travel with what they tell each
    other before a step.

    It does not overlap with backward. A bucket that changed after it had begun could not be taken
    back without a second round trip, and saving that one is all this schedule is for.
    """

    name = "gather"
    complete = True
    overlaps = False

    def begin(self, bucket: DenseBucket) -> Pending:
        workers = self.collectives.size
        room = bucket.room("rows", bucket.length * workers)
        rows = ops_for(bucket.buffer).placed(bucket.buffer, self.collectives.rank, workers, out=room)
        return self.collectives.allreduce(rows, f"{bucket.name}.rows", out=rows)

    def shares(self, bucket: DenseBucket, gramian: bool) -> Iterator[Share]:
        ops = ops_for(bucket.buffer)
        rows = ops.reshape(bucket.arrived, (self.collectives.size, -1))
        for start, stop, group in bucket.segments:
            part = rows[:, start:stop]
            yield Share(group, ops.gramian(part) if gramian else ops.consensus(part))

    def combine(self, bucket: DenseBucket, weights: Tensor) -> Pending:
        ops = ops_for(bucket.buffer)
        rows = ops.reshape(bucket.arrived, (self.collectives.size, -1))
        pieces = [(start, stop, weights[group]) for start, stop, group in bucket.segments]
        return Done(ops.combine_segments(rows, pieces, out=bucket.buffer))


class HalfPass(TwoPass):
    """Two-pass, with a first pass in half precision: 1.5 times the traffic of an average.

    Only the mean that enters the inner products is rounded, never the result. Half precision has
    little range, so what is sent is first brought to a known length by what the gradients' length
    was in the step before.
    """

    name = "half"
    exact = False

    #: The length to which the sum over workers is brought. An element may then be 64 times as long
    #: as the whole gradient was before, until it overflows and the step becomes an average.
    _LENGTH = 1024.0

    def begin(self, bucket: DenseBucket) -> Pending:
        if bucket.half:
            return super().begin(bucket)
        factor = self._factor(bucket)
        pieces = [(start, stop, factor[group]) for start, stop, group in bucket.segments]
        room = bucket.room("narrow", bucket.length, half=True)
        narrow = ops_for(bucket.buffer).narrow_segments(bucket.buffer, pieces, out=room)
        return self.collectives.allreduce(narrow, f"{bucket.name}.sum", out=narrow)

    def shares(self, bucket: DenseBucket, gramian: bool) -> Iterator[Share]:
        if bucket.half:
            yield from super().shares(bucket, gramian)
            return
        ops = ops_for(bucket.buffer)
        undo = 1 / self._factor(bucket)
        for start, stop, group in bucket.segments:
            row = ops.moments(bucket.buffer[start:stop], bucket.arrived[start:stop])
            yield Share(group, row * ops.concat([undo[group : group + 1], ops.ones_like(undo[:1])]))

    def _factor(self, bucket: DenseBucket) -> Tensor:
        """What each group is multiplied by before it is rounded, ``[groups]``."""
        length = bucket.remembered("length")[:, 0]
        ops = ops_for(length)
        known = ops.where(length > 0, length, ops.ones_like(length))
        return self._LENGTH * bucket.unscale / (known * self.collectives.size)


class Sketch(TwoPass):
    """Two-pass, with a first pass over a random sketch of the gradient.

    A segment of d elements is cut into pieces of m, and the pieces are added up with random signs.
    The inner product of two such sketches is that of the gradients, give or take what unlike
    elements contribute: nothing on average, and less the longer m is. A worker's inner product
    with itself is known exactly, so only those with the others are taken from the sketches.
    """

    name = "sketch"
    exact = False

    #: A sketch is at least this fraction of the gradient, and this many elements per worker: the
    #: error of the weights falls with the square root of m over N.
    FRACTION = 64
    PER_WORKER = 4096
    STRIDE = 97

    def begin(self, bucket: DenseBucket) -> Pending:
        ops = ops_for(bucket.buffer)
        lengths = [self._length(segment) for segment in bucket.segments]
        # Piece k of a segment meets the signs from k * STRIDE on, so they differ from piece to
        # piece; and one sign more for the whole piece, which is another in every step.
        bucket.signs = ops.signs(max(lengths) + self.FRACTION * self.STRIDE, bucket.signs, bucket.buffer)
        out = bucket.room("sketch", sum(lengths), like=bucket.signs)
        step = bucket.remembered("steps")[0, 0]
        bucket.sketch = ops.sketch_segments(
            bucket.buffer, bucket.segments, lengths, bucket.signs, self.STRIDE, step, out=out
        )
        room = bucket.room("sketches", sum(lengths), like=bucket.signs)
        return self.collectives.allreduce(bucket.sketch, f"{bucket.name}.sum", out=room)

    def shares(self, bucket: DenseBucket, gramian: bool) -> Iterator[Share]:
        ops = ops_for(bucket.buffer)
        first = 0
        for segment in bucket.segments:
            start, stop, group = segment
            last = first + self._length(segment)
            row = ops.moments(bucket.sketch[first:last], bucket.arrived[first:last])
            square = ops.square(bucket.buffer[start:stop])
            first = last
            yield Share(group, ops.stack([row[0] - row[1] + square, square]))

    def _length(self, segment: Segment) -> int:
        length = segment.stop - segment.start
        return min(length, max(-(-length // self.FRACTION), self.PER_WORKER * self.collectives.size))


#: Every schedule, by the name a user gives it.
SCHEDULES: dict[str, type[Schedule]] = {s.name: s for s in (TwoPass, OnePass, Gather, HalfPass, Sketch)}


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
    begun: bool = False
    #: What the aggregator remembers of earlier steps, and what gradients had to be multiplied by
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

    def combine(self, weights: Tensor) -> None:
        """Start the last collective, given the ``[groups, N]`` weights."""
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
    """A flat tensor, whose length is a multiple of the number of workers.

    ``buffer`` holds this worker's gradient and, after ``finish``, the aggregated one, still to be
    multiplied by ``restore`` of its group if that is set.
    """

    name: str
    buffer: Tensor
    segments: Sequence[Segment]
    schedule: Schedule
    arrived: Tensor = None
    #: ``[groups, 1]`` or None: what the result still has to be multiplied by.
    restore: Tensor | None = None
    memory: Memory = field(default_factory=dict)
    unscale: Tensor | float = 1.0
    #: What ``sketch`` keeps until its sum arrives, and its signs from step to step.
    sketch: Tensor = None
    signs: Tensor = None
    _pending: Pending | None = None
    _rooms: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ops = ops_for(self.buffer)
        (self.length,) = ops.shape(self.buffer)
        self.half = ops.is_half(self.buffer)
        self.complete = self.schedule.complete

    @property
    def reference(self) -> Tensor:
        return self.buffer

    def room(self, purpose: str, length: int, like: Tensor = None, half: bool = False) -> Tensor | None:
        """Memory for a result, the same in every step; None where the framework decides.

        Its elements are those of ``like``, by default the buffer, or of half precision.
        """
        if purpose not in self._rooms:
            like = self.buffer if like is None else like
            self._rooms[purpose] = ops_for(like).room(like, length, half)
        return self._rooms[purpose]

    def remembered(self, name: str) -> Tensor:
        """``[groups, 1]`` of the memory; zeros before the first step."""
        if name in self.memory:
            return self.memory[name]
        groups = 1 + max(segment.group for segment in self.segments)
        return ops_for(self.buffer).zeros((groups, 1), self.buffer)

    def begin(self) -> None:
        self._pending = self.schedule.begin(self)
        self.begun = True

    def abandon(self) -> None:
        self._arrive()
        self.begun = False

    def shares(self, gramian: bool) -> list[Share]:
        self._arrive()
        return list(self.schedule.shares(self, gramian))

    def combine(self, weights: Tensor) -> None:
        if self.half:
            # A half-precision result shorter than about 1e-5 loses its digits on the way, and
            # AdaCons' unit-length ones are. So half-precision buckets carry a convex combination
            # of gradients, which needs the range the gradients have, and are stretched on arrival.
            ops = ops_for(weights)
            size = ops.total(ops.absolute(weights))
            self.restore = ops.where(size > 0, size, ops.ones_like(size))
            weights = weights / self.restore
        self._pending = self.schedule.combine(self, weights)

    def finish(self) -> None:
        self._arrive()
        self.buffer, self.arrived = self.arrived, None
        self.begun = False

    def square(self) -> Tensor:
        return ops_for(self.buffer).square(self.buffer[: self.segments[-1].stop])

    def blank_unless(self, condition: Tensor) -> None:
        self.buffer = ops_for(self.buffer).blank_unless(condition, self.buffer)

    def _arrive(self) -> None:
        assert self._pending is not None, f"bucket {self.name} has nothing under way"
        self.arrived, self._pending = self._pending.wait(), None


@dataclass
class SparseBucket(Bucket):
    """One parameter's row-sparse gradient: distinct ``rows`` (int64) and their ``values``, a matrix.

    Workers touch different rows, so sums and shards are of no use; one allgather shows everyone
    everyone's rows, and nothing has to be sent a second time.
    """

    name: str
    rows: Tensor
    values: Tensor
    group: int
    collectives: Collectives
    owners: Tensor = None
    complete: bool = True
    memory: Memory = field(default_factory=dict)
    unscale: Tensor | float = 1.0
    _pending: tuple[Pending, Pending] | None = None

    @property
    def reference(self) -> Tensor:
        return self.values

    def begin(self) -> None:
        tagged = ops_for(self.rows).tag(self.rows, self.collectives.rank)
        self._pending = (
            self.collectives.allgather_rows(tagged, f"{self.name}.rows"),
            self.collectives.allgather_rows(self.values, f"{self.name}.values"),
        )
        self.begun = True

    def abandon(self) -> None:
        self._arrive()
        self.begun = False

    def shares(self, gramian: bool) -> list[Share]:
        ops = ops_for(self.rows)
        tagged, self.values = self._arrive()
        self.owners, self.rows = tagged[:, 0], tagged[:, 1]
        table = ops.sparse_gramian if gramian else ops.sparse_consensus
        return [Share(self.group, table(self.owners, self.rows, self.values, self.collectives.size))]

    def combine(self, weights: Tensor) -> None:
        ops = ops_for(self.rows)
        own = weights[self.group]
        self.rows, self.values = ops.sparse_combine(self.owners, self.rows, self.values, own)

    def finish(self) -> None:
        self.begun = False

    def square(self) -> Tensor:
        ops = ops_for(self.values)
        return ops.square(ops.reshape(self.values, (-1,)))

    def blank_unless(self, condition: Tensor) -> None:
        self.values = ops_for(self.values).blank_unless(condition, self.values)

    def _arrive(self) -> tuple[Tensor, Tensor]:
        assert self._pending is not None, f"bucket {self.name} has nothing under way"
        rows, values = (pending.wait() for pending in self._pending)
        self._pending = None
        return rows, values


# --- the step -----------------------------------------------------------------------------------


@dataclass
class Step:
    """What happens between backward and the optimizer, for one optimizer, every step.

    Args:
        collectives: the workers.
        aggregator: what turns statistics into weights.
        groups: how many groups of parameters there are.
        name: a prefix for the names of collectives, equal on all ranks.
    """

    collectives: Collectives
    aggregator: Aggregator
    groups: int
    name: str

    @property
    def may_begin_early(self) -> bool:
        """Whether a bucket may begin before the others are filled.

        To exclude a worker whose gradient is not finite, its whole gradient must be known first.
        """
        return self.aggregator.nonfinite != "exclude"

    def run(
        self,
        buckets: Sequence[Bucket],
        memory: Memory,
        unscale: Tensor | float = 1.0,
        here: bool | None = None,
    ) -> tuple[Decision, Statistics]:
        """Aggregate. Afterwards every bucket holds its part of the result.

        ``unscale`` is what the gradients have to be multiplied by to be true gradients, where a
        loss scale is in force; the result is scaled just as they are. ``here`` is given where
        workers may run out of data at different times, on all of them alike: False on one that has
        none left and brings zeros, to keep the others company.
        """
        takes_part = self._take_part(buckets, here)
        for bucket in buckets:
            if not bucket.begun:
                bucket.memory, bucket.unscale = memory, unscale
                bucket.begin()
        statistics = self._statistics(buckets, takes_part).scaled(unscale)
        if self.aggregator.nonfinite == "raise":
            self._refuse_nonfinite(statistics)
        decision = self.aggregator.decide(statistics, memory)
        for bucket in buckets:
            bucket.combine(decision.weights)
        for bucket in buckets:
            bucket.finish()
            bucket.memory, bucket.unscale = decision.memory, unscale
        return decision, statistics

    def _take_part(self, buckets: Sequence[Bucket], here: bool | None) -> Tensor | None:
        """Whether this worker does; None if all workers surely do."""
        if here is not None and (not here or self.may_begin_early):
            reference = buckets[0].reference
            return ops_for(reference).like([here], reference)[0] == 1
        if self.may_begin_early:
            return None
        squares = [bucket.square() for bucket in buckets]
        ops = ops_for(squares[0])
        finite = ops.isfinite(ops.add_n(squares))
        for bucket in buckets:
            bucket.blank_unless(finite)
        return finite

    def _statistics(self, buckets: Sequence[Bucket], takes_part: Tensor | None) -> Statistics:
        gramian = self.aggregator.needs_gramian
        workers = self.collectives.size
        width = workers if gramian else 2
        reference = buckets[0].reference
        ops = ops_for(reference)
        shares = [(share, bucket) for bucket in buckets for share in bucket.shares(gramian)]

        if takes_part is None and all(bucket.complete for bucket in buckets):
            table = self._by_group([share for share, _ in shares], (workers, width), reference)
            return Statistics.read(table, ops.zeros((self.groups, workers), table) == 0, gramian)

        # What every worker knows in full must be counted once: each gives its own row of it.
        rank = self.collectives.rank
        known = [Share(s.group, s.table[rank]) if b.complete else s for s, b in shares]
        rows = [share for share in known if len(ops.shape(share.table)) == 1]
        parts = [share for share in known if len(ops.shape(share.table)) == 2]
        is_self = ops.like([float(worker == rank) for worker in range(workers)], reference) == 1
        row = self._by_group(rows, (1, width), reference)
        table = ops.where(is_self[:, None], row, ops.zeros_like(row))
        if parts:
            table = table + self._by_group(parts, (workers, width), reference)
        here = ops.zeros((1,), reference) + (1 if takes_part is None else ops.wide(takes_part))
        here = ops.where(is_self, here, ops.zeros_like(here))

        # A worker that has left with hvd.join() adds zeros to this sum, so it is seen as absent.
        message = ops.concat([ops.reshape(table, (-1,)), here])
        message = self.collectives.allreduce(message, f"{self.name}.table", out=message).wait()
        table = ops.reshape(message[:-workers], (self.groups, workers, width))
        present = ops.zeros((self.groups, workers), table) + message[-workers:] > 0
        return Statistics.read(table, present, gramian)

    def _by_group(self, shares: Sequence[Share], shape: tuple[int, int], like: Tensor) -> Tensor:
        """Add up shares: ``[groups, *shape]``."""
        ops = ops_for(like)
        tables: list[list[Tensor]] = [[] for _ in range(self.groups)]
        for group, table in shares:
            tables[group].append(ops.reshape(table, shape))
        return ops.stack([ops.add_n(some) if some else ops.zeros(shape, like) for some in tables])

    def _refuse_nonfinite(self, statistics: Statistics) -> None:
        ops = ops_for(statistics.squares)
        finite = ops.to_list(ops.isfinite(statistics.squares))
        ranks = range(self.collectives.size)
        self.aggregator.refuse([r for r in ranks if not all(group[r] for group in finite)])
