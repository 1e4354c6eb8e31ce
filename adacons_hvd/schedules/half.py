"""``half``: two-pass, with a first pass in half precision."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..collectives import Pending
from ..ops import Tensor, ops_for
from .base import DenseBucket, Share, Transfer
from .two_pass import TwoPass, TwoPassTransfer

if TYPE_CHECKING:
    from ..costs import Rates

__all__ = ["HalfPass"]

#: The length to which the sum over workers is brought. An element may then be 64 times as long
#: as the whole gradient was before, until it overflows and the step becomes an average.
_LENGTH = 1024.0


class HalfPass(TwoPass):
    """Two-pass, with a first pass in half precision: 1.5 times the traffic of an average.

    Only the mean that enters the inner products is rounded, never the result. Half precision has
    little range, so what is sent is first brought to a known length by what the gradients' length
    was in the step before.
    """

    name = "half"
    exact = False

    def transfer(self, bucket: DenseBucket) -> Transfer:
        # Gradients that are half already are sent as they are.
        return TwoPassTransfer(self) if bucket.half else _HalfTransfer(self)

    @classmethod
    def cost(cls, rates: Rates, size: float, bucket: float, gramian: bool = False, history: int = 0) -> float:
        first = rates.half.sent(size, bucket, 0.5) + rates.own / 2 * size
        return first + cls.second_pass(rates, size, bucket)


class _HalfTransfer(TwoPassTransfer):
    def begin(self, bucket: DenseBucket) -> Pending:
        factor = self._factor(bucket)
        pieces = [(start, stop, factor[group]) for start, stop, group in bucket.segments]
        scratch = self.scratch(bucket, "narrow", bucket.length, half=True)
        narrow = ops_for(bucket.buffer).narrow_segments(bucket.buffer, pieces, out=scratch)
        return self.collectives.allreduce(narrow, f"{bucket.name}.sum", out=narrow)

    def shares(self, bucket: DenseBucket, gramian: bool) -> Iterator[Share]:
        undo = 1 / self._factor(bucket)
        ops = ops_for(bucket.buffer)
        for start, stop, group in bucket.segments:
            row = ops.moments(bucket.buffer[start:stop], self.arrived[start:stop])
            yield Share(group, row * ops.concat([undo[group : group + 1], ops.ones_like(undo[:1])]))

    def _factor(self, bucket: DenseBucket) -> Tensor:
        """The factor for each group before it is rounded, ``[groups]``."""
        length = bucket.remembered("length")[:, 0]
        ops = ops_for(length)
        known = ops.where(length > 0, length, ops.ones_like(length))
        return _LENGTH * bucket.unscale / (known * self.collectives.size)
