"""``one-pass``: each worker aggregates one shard for all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..collectives import Pending
from ..ops import Tensor, ops_for
from .base import DenseBucket, Schedule, Segment, Share, Transfer

if TYPE_CHECKING:
    from ..costs import Rates

__all__ = ["OnePass"]


class OnePass(Schedule):
    """Each worker aggregates one shard for all. The traffic of one average.

    An allreduce that uses its bandwidth well consists of an alltoall, an addition and an allgather;
    here the worker that would have added N shards looks at them first. Worker k holds shard k of
    everyone's gradient, so the shares of the statistics add up over the workers.
    """

    name = "one-pass"

    def transfer(self, bucket: DenseBucket) -> Transfer:
        return _OnePassTransfer(self)

    @classmethod
    def cost(cls, rates: Rates, size: float, bucket: float) -> float:
        moved = rates.alltoall.sent(size, bucket) + rates.table + rates.allgather.sent(size, bucket)
        return moved + (rates.look + rates.combine) * size


class _OnePassTransfer(Transfer):
    needs_all = True

    def begin(self, bucket: DenseBucket) -> Pending:
        scratch = self.scratch(bucket, "shards", bucket.length)
        return self.collectives.alltoall(bucket.buffer, f"{bucket.name}.shards", out=scratch)

    def shares(self, bucket: DenseBucket, gramian: bool) -> Iterator[Share]:
        ops = ops_for(self.arrived)
        rows = ops.reshape(self.arrived, (self.collectives.size, -1))
        for start, stop, group in self._pieces(bucket):
            part = rows[:, start:stop]
            yield Share(group, ops.gramian(part) if gramian else ops.consensus(part))

    def combine(self, bucket: DenseBucket, weights: Tensor) -> Pending:
        ops = ops_for(self.arrived)
        rows = ops.reshape(self.arrived, (self.collectives.size, -1))
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
