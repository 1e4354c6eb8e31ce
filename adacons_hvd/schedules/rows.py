"""What the schedules do that bring all workers' gradients, or a part of each, into one place."""

from __future__ import annotations

from collections.abc import Iterator

from ..aggregators import table_of
from ..collectives import Pending
from ..ops import Tensor, ops_for
from .base import Combination, DenseBucket, Segment, Share, Transfer

__all__ = ["RowsTransfer"]


class RowsTransfer(Transfer):
    """A transfer whose first collective brings rows: everyone's gradient for the same elements.

    A subclass says which elements these are, and what becomes of the combined ones.
    """

    #: The means of earlier steps as they were when the rows were looked at.
    _past: Tensor = None

    def pieces(self, bucket: DenseBucket) -> Iterator[Segment]:
        """The parts of the bucket's segments that the rows hold."""
        raise NotImplementedError

    def out(self, bucket: DenseBucket, rows: Tensor) -> Tensor:
        """Where the combined elements go; it may be one of the rows, unless the bucket has a past."""
        raise NotImplementedError

    def send(self, bucket: DenseBucket, combined: Tensor) -> Pending:
        """Start the last collective."""
        raise NotImplementedError

    def shares(self, bucket: DenseBucket, gramian: bool) -> Iterator[Share]:
        rows = self.rows(bucket)
        past = self._past = None if bucket.past is None else ops_for(rows).current(bucket.past)
        for start, stop, group in self.pieces(bucket):
            yield Share(group, table_of(rows[:, start:stop], gramian, None if past is None else past[:, start:stop]))

    def combine(self, bucket: DenseBucket, combination: Combination) -> Pending:
        ops, rows, past = ops_for(self.arrived), self.rows(bucket), self._past
        out = self.out(bucket, rows)
        pieces = list(self.pieces(bucket))
        if combination.elements is not None:
            parts = [(start, stop, combination.elements(rows[:, start:stop], group)) for start, stop, group in pieces]
            return self.send(bucket, ops.assemble(rows, parts, out=out))
        weighed = [(start, stop, combination.weights[group]) for start, stop, group in pieces]
        pending = self.send(bucket, ops.combine_segments(rows, weighed, out=out, past=past))
        if past is not None:
            # While the result is on its way. The mean takes the place of the first row, which is not needed again.
            averages = [(start, stop, combination.mean[group]) for start, stop, group in pieces]
            whole = ops.working(rows)
            mean = ops.combine_segments(whole, averages, out=whole[0])
            bucket.past = ops.keep_row(bucket.past, combination.slot, mean)
            self._past = None
        return pending

    def rows(self, bucket: DenseBucket) -> Tensor:
        """What has arrived, a row from each worker."""
        return ops_for(self.arrived).reshape(self.arrived, (self.collectives.size, -1))
