"""``one-pass``: each worker aggregates one shard for all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..collectives import Direct, Pending
from ..ops import Tensor, ops_for
from .base import DenseBucket, Done, Schedule, Segment, Transfer, passes
from .rows import RowsTransfer

if TYPE_CHECKING:
    from ..costs import Rates

__all__ = ["OnePass", "OnePassTransfer", "Scatter"]


class OnePass(Schedule):
    """Each worker aggregates one shard for all. The traffic of one average.

    An allreduce that uses its bandwidth well consists of an alltoall, an addition and an allgather;
    here the worker that would have added N shards looks at them first. Worker k holds shard k of
    everyone's gradient, so the shares of the statistics add up over the workers.
    """

    name = "one-pass"
    sees_all = True

    def transfer(self, bucket: DenseBucket) -> Transfer:
        direct = self.collectives.direct
        # With a history, rows are read once more while the result is on its way.
        if direct is not None and direct.in_memory and not self.history:
            shard = bucket.buffer[: bucket.length // self.collectives.size]
            # A worker overwrites what it gave only when all have taken the step in which that was read.
            whole, part = _shards(bucket), _result(bucket)
            if direct.prepare(shard, part, buffers=1):
                if direct.prepare(bucket.buffer, whole, buffers=1):
                    return _MemoryTransfer(self, direct, direct.own(whole))
                direct.forget(part)
        return OnePassTransfer(self)

    def kept(self, length: int) -> tuple[int, int]:
        shard = length // self.collectives.size
        return self.collectives.rank * shard, (self.collectives.rank + 1) * shard

    @classmethod
    def cost(cls, rates: Rates, size: float, bucket: float, gramian: bool = False, history: int = 0) -> float:
        table = rates.table((rates.workers if gramian else 2) + history)
        if rates.in_memory and rates.direct is not None and not history:
            # What all write for each other, and what each takes of the result.
            moved = 2 * rates.direct.sent(size, bucket) + table
        else:
            moved = rates.alltoall.sent(size, bucket) + table + rates.allgather.sent(size, bucket)
        return moved + (rates.look + rates.combine) * size * passes(rates.workers, history)


def _shards(bucket: DenseBucket) -> str:
    return f"{bucket.name}.shards"


def _result(bucket: DenseBucket) -> str:
    return f"{bucket.name}.result"


class OnePassTransfer(RowsTransfer):
    needs_all = True

    def begin(self, bucket: DenseBucket) -> Pending:
        scratch = self.scratch(bucket, "shards", bucket.length)
        return self.collectives.alltoall(bucket.buffer, _shards(bucket), out=scratch)

    def out(self, bucket: DenseBucket, rows: Tensor) -> Tensor:
        if bucket.past is not None:
            return self.scratch(bucket, "result", ops_for(rows).shape(rows)[1])
        # Each piece of the result takes the place of the first worker's, which is not needed again.
        return rows[0]

    def send(self, bucket: DenseBucket, combined: Tensor) -> Pending:
        return self.collectives.allgather(combined, _result(bucket), out=bucket.buffer)

    def pieces(self, bucket: DenseBucket) -> Iterator[Segment]:
        first, last = bucket.schedule.kept(bucket.length)
        for start, stop, group in bucket.segments:
            start, stop = max(start, first) - first, min(stop, last) - first
            if start < stop:
                yield Segment(start, stop, group)


class _MemoryTransfer(OnePassTransfer):
    """For workers that share memory: each reads its shard of everyone's gradient where that lies."""

    needs_all = False
    direct = True
    can_forget = True

    def __init__(self, schedule: OnePass, direct: Direct, place: Tensor) -> None:
        super().__init__(schedule)
        self._direct, self.place = direct, place

    def begin(self, bucket: DenseBucket) -> Pending:
        return self._direct.gather(bucket.buffer, _shards(bucket))

    def rows(self, bucket: DenseBucket) -> Tensor:
        first, last = bucket.schedule.kept(bucket.length)
        return super().rows(bucket)[:, first:last]

    def out(self, bucket: DenseBucket, rows: Tensor) -> Tensor:
        return self._direct.own(_result(bucket))

    def send(self, bucket: DenseBucket, combined: Tensor) -> Pending:
        # What lay in its place may be taken from where the result is.
        out = None if bucket.buffer is self.place else bucket.buffer
        return self._direct.gather(combined, _result(bucket), out=out)


class Scatter(OnePass):
    """``one-pass`` without its last collective: every worker keeps the shard that it has aggregated.

    For training in which each worker holds a shard of the parameters and of nothing else. Half the traffic of an
    average, which is that of the reduce-scatter it stands for. A user cannot ask for it by name, because it does not
    leave the result on every worker.
    """

    def transfer(self, bucket: DenseBucket) -> Transfer:
        return _ScatterTransfer(self)


class _ScatterTransfer(OnePassTransfer):
    def scratch(
        self, bucket: DenseBucket, purpose: str, length: int, like: Tensor = None, half: bool = False
    ) -> Tensor | None:
        return None  # kept memory would be as large as the whole model's gradient, which sharding is there to avoid

    def send(self, bucket: DenseBucket, combined: Tensor) -> Pending:
        return Done(combined)
