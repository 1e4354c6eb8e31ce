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
    needs_all: bool = True
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

    def combine(self, combination: Combination) -> None:
        ops = ops_for(self.rows)
        own = combination.weights[self.group]
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
