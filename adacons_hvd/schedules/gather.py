"""``gather``: everything to everyone, in a single round trip."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..collectives import Direct, Pending
from ..ops import Tensor, ops_for
from .base import DenseBucket, Done, Schedule, Segment, Transfer, passes
from .rows import RowsTransfer

if TYPE_CHECKING:
    from ..costs import Rates

__all__ = ["Gather"]


#: Up to how many bytes, all workers' together, a sum is worth its longer messages.
_SUMMED = 1 << 20


class Gather(Schedule):
    """Everything to everyone: a single round trip, for gradients of a few thousand elements or of two workers.

    An allgather. Little is summed instead, as matrices in which each worker has filled its own row: that moves more
    bytes, but may be on its way before it is known whether a worker has left, when Horovod can do nothing else. So
    bindings let it travel with what they tell each other before a step.

    It does not overlap with backward. A bucket that changed after it had begun could not be taken
    back without a second round trip, and saving that one is all this schedule is for.
    """

    name = "gather"
    complete = True
    overlaps = False
    sees_all = True

    def transfer(self, bucket: DenseBucket) -> Transfer:
        direct = self.collectives.direct
        # With a history, a mean takes the place of a row, which others may be reading in shared memory.
        usable = direct is not None and not (direct.in_memory and self.history)
        if direct is not None and usable and direct.prepare(bucket.buffer, _rows(bucket)):
            return _DirectTransfer(self, direct)
        little = _is_little(bucket.bytes, self.collectives.size)
        return _SummedTransfer(self) if little and self.collectives.may_begin_with_sums else _GatherTransfer(self)

    def kept(self, length: int) -> tuple[int, int]:
        return 0, length

    @classmethod
    def cost(cls, rates: Rates, size: float, bucket: float, gramian: bool = False, history: int = 0) -> float:
        n = rates.workers
        if rates.in_memory and rates.direct is not None and not history:
            return rates.direct.sent(size, bucket) + (rates.look + rates.combine) * n * size
        summed, gathered = rates.allreduce.sent(size, bucket, n), rates.allgather.sent(size, bucket, n)
        moved = min(summed, gathered) if _is_little(size, n) else gathered
        return moved + (rates.look + rates.combine) * n * size * passes(n, history)


def _is_little(size: float, workers: int) -> bool:
    return size * workers <= _SUMMED


def _rows(bucket: DenseBucket) -> str:
    """The name of the message."""
    return f"{bucket.name}.rows"


class _GatherTransfer(RowsTransfer):
    needs_all = True

    def begin(self, bucket: DenseBucket) -> Pending:
        scratch = self.scratch(bucket, "rows", bucket.length * self.collectives.size)
        return self.collectives.allgather(bucket.buffer, _rows(bucket), out=scratch)

    def pieces(self, bucket: DenseBucket) -> Iterator[Segment]:
        return iter(bucket.segments)

    def out(self, bucket: DenseBucket, rows: Tensor) -> Tensor:
        return bucket.buffer

    def send(self, bucket: DenseBucket, combined: Tensor) -> Pending:
        return Done(combined)


class _DirectTransfer(_GatherTransfer):
    direct = True

    def __init__(self, schedule: Schedule, direct: Direct) -> None:
        super().__init__(schedule)
        self._direct = direct
        self.can_forget, self.needs_all = direct.in_memory, not direct.in_memory

    def begin(self, bucket: DenseBucket) -> Pending:
        return self._direct.gather(bucket.buffer, _rows(bucket))


class _SummedTransfer(_GatherTransfer):
    needs_all = False

    def begin(self, bucket: DenseBucket) -> Pending:
        workers = self.collectives.size
        scratch = self.scratch(bucket, "rows", bucket.length * workers)
        rows = ops_for(bucket.buffer).placed(bucket.buffer, self.collectives.rank, workers, out=scratch)
        return self.collectives.allreduce(rows, _rows(bucket), out=rows)
