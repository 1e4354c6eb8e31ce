"""``two-pass``: the paper's Algorithm 1."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..collectives import Pending
from ..ops import ops_for
from .base import Combination, DenseBucket, Schedule, Share, Transfer

if TYPE_CHECKING:
    from ..costs import Rates

__all__ = ["TwoPass", "TwoPassTransfer"]


class TwoPass(Schedule):
    """The paper's Algorithm 1. Twice the traffic of an average, whatever the topology."""

    name = "two-pass"
    only_sums = True

    def transfer(self, bucket: DenseBucket) -> Transfer:
        return TwoPassTransfer(self)

    @classmethod
    def cost(cls, rates: Rates, size: float, bucket: float, gramian: bool = False, history: int = 0) -> float:
        return rates.allreduce.sent(size, bucket) + cls.second_pass(rates, size, bucket)

    @staticmethod
    def second_pass(rates: Rates, size: float, bucket: float) -> float:
        """The cost of all that comes after the first pass."""
        return rates.allreduce.sent(size, bucket) + rates.table() + rates.own * size


class TwoPassTransfer(Transfer):
    """Sum the gradients, look, and sum the weighed ones."""

    def begin(self, bucket: DenseBucket) -> Pending:
        return self.collectives.allreduce(
            bucket.buffer,
            f"{bucket.name}.sum",
            prescale=1 / self._divisor(bucket),
            out=self.scratch(bucket, "sum", bucket.length),
        )

    def shares(self, bucket: DenseBucket, gramian: bool) -> Iterator[Share]:
        ops = ops_for(bucket.buffer)
        undo = ops.like([self._divisor(bucket), 1.0], bucket.buffer)
        for start, stop, group in bucket.segments:
            row = ops.moments(bucket.buffer[start:stop], self.arrived[start:stop])
            yield Share(group, row * undo)

    def combine(self, bucket: DenseBucket, combination: Combination) -> Pending:
        rank, weights = self.collectives.rank, combination.weights
        own = [(start, stop, weights[group, rank]) for start, stop, group in bucket.segments]
        scaled = ops_for(bucket.buffer).scale_segments(bucket.buffer, own)
        return self.collectives.allreduce(
            scaled, f"{bucket.name}.result", prescale=1 / self.predivide, postscale=self.predivide, out=scaled
        )

    def _divisor(self, bucket: DenseBucket) -> float:
        # The sum of N half-precision gradients may overflow where their mean does not.
        if self.predivide == 1.0 and bucket.half:
            return float(self.collectives.size)
        return self.predivide
