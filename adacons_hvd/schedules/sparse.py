"""Gradients of few rows, as an embedding's."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..aggregators import Memory
from ..collectives import Collectives, Pending
from ..ops import Tensor, ops_for
from .base import Bucket, Combination, Share

__all__ = ["SparseBucket"]


@dataclass
class SparseBucket(Bucket):
    """Row-sparse gradients of parameters with rows of one length: distinct ``rows`` (int64) and ``values``, a matrix.

    Rows of several parameters are numbered through. Workers touch different rows, so sums and shards are of no use;
    one allgather shows everyone everyone's rows, and nothing has to be sent a second time.
    """

    name: str
    rows: Tensor
    values: Tensor
    group: int
    collectives: Collectives
    complete: bool = True
    needs_all: bool = True
    memory: Memory = field(default_factory=dict)
    unscale: Tensor | float = 1.0
    _pending: Pending | None = None
    #: Of everyone's rows: whose each is, and its place among the distinct ones.
    _owners: Tensor = None
    _places: Tensor = None

    @property
    def reference(self) -> Tensor:
        return self.values

    def begin(self) -> None:
        packed = ops_for(self.rows).pack_rows(self.rows, self.values, self.collectives.rank, self.collectives.size)
        direct, gather = self.collectives.direct, self.collectives.allgather_rows
        self._pending = gather(packed, self.name) if direct is None else direct.gather_rows(packed, self.name, gather)
        self.begun = True

    def abandon(self) -> None:
        self._arrive()
        self.begun = False

    def shares(self, gramian: bool) -> list[Share]:
        ops, workers = ops_for(self.rows), self.collectives.size
        self._owners, rows, self.values = ops.unpack_rows(self._arrive(), workers)
        self.rows, self._places = ops.distinct(rows)
        if gramian:
            table = ops.sparse_gramian(self._owners, self._places, self.rows, self.values, workers)
        else:
            summed = ops.sum_rows(self.values, self._places, self.rows)
            table = ops.sparse_consensus(self._owners, self._places, summed, self.values, workers)
        return [Share(self.group, table)]

    def combine(self, combination: Combination) -> None:
        ops = ops_for(self.rows)
        weighed = ops.sparse_weigh(self._owners, self.values, combination.weights[self.group])
        self.values = ops.cast_like(ops.sum_rows(weighed, self._places, self.rows), self.values)

    def finish(self) -> None:
        self.begun = False

    def square(self) -> Tensor:
        ops = ops_for(self.values)
        return ops.square(ops.reshape(self.values, (-1,)))

    def blank_unless(self, condition: Tensor) -> None:
        self.values = ops_for(self.values).blank_unless(condition, self.values)

    def _arrive(self) -> Tensor:
        assert self._pending is not None, f"bucket {self.name} has nothing under way"
        packed, self._pending = self._pending.wait(), None
        return packed
