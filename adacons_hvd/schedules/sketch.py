"""``sketch``: two-pass, with a first pass over a random sketch of the gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..collectives import Pending
from ..ops import Tensor, ops_for
from .base import DenseBucket, Segment, Share, Transfer
from .two_pass import TwoPass, TwoPassTransfer

if TYPE_CHECKING:
    from ..costs import Rates

__all__ = ["Sketch"]


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

    def transfer(self, bucket: DenseBucket) -> Transfer:
        return _SketchTransfer(self)

    @classmethod
    def cost(cls, rates: Rates, size: float, bucket: float, gramian: bool = False, history: int = 0) -> float:
        part = max(1 / cls.FRACTION, min(1.0, 4.0 * cls.PER_WORKER * rates.workers / max(size, 1.0)))
        first = rates.allreduce.sent(size, bucket, part) + rates.own / 2 * size
        return first + cls.second_pass(rates, size, bucket)


class _SketchTransfer(TwoPassTransfer):
    #: Kept from step to step.
    _signs: Tensor = None
    #: This worker's own sketch, until the sum of all arrives.
    _own: Tensor = None

    def begin(self, bucket: DenseBucket) -> Pending:
        ops = ops_for(bucket.buffer)
        lengths = [self._length(segment) for segment in bucket.segments]
        # Piece k of a segment meets the signs from k * STRIDE on, so they differ from piece to
        # piece; and one sign more for the whole piece, which is another in every step.
        self._signs = ops.signs(max(lengths) + Sketch.FRACTION * Sketch.STRIDE, self._signs, bucket.buffer)
        out = self.scratch(bucket, "sketch", sum(lengths), like=self._signs)
        step = bucket.remembered("steps")[0, 0]
        self._own = ops.sketch_segments(
            bucket.buffer, bucket.segments, lengths, self._signs, Sketch.STRIDE, step, out=out
        )
        scratch = self.scratch(bucket, "sketches", sum(lengths), like=self._signs)
        return self.collectives.allreduce(self._own, f"{bucket.name}.sum", out=scratch)

    def shares(self, bucket: DenseBucket, gramian: bool) -> Iterator[Share]:
        ops = ops_for(bucket.buffer)
        first = 0
        for segment in bucket.segments:
            start, stop, group = segment
            last = first + self._length(segment)
            row = ops.moments(self._own[first:last], self.arrived[first:last])
            square = ops.square(bucket.buffer[start:stop])
            first = last
            yield Share(group, ops.stack([row[0] - row[1] + square, square]))

    def _length(self, segment: Segment) -> int:
        length = segment.stop - segment.start
        return min(length, max(-(-length // Sketch.FRACTION), Sketch.PER_WORKER * self.collectives.size))
