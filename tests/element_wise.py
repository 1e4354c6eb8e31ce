"""The element-wise aggregator of ``docs/aggregators.md``, in words that every framework understands."""

from __future__ import annotations

from typing import Any

from adacons_hvd import Aggregator
from adacons_hvd.ops import ops_for


class TrimmedMean(Aggregator):
    """The mean of what is left of every element's values without the least and the greatest."""

    def combine(self, rows: Any, present: Any) -> Any:
        ops = ops_for(rows)
        columns = ops.transposed(rows)  # [L, N], because sorting goes along the last axis
        columns = ops.where(present, columns, ops.zeros_like(columns) + float("inf"))
        ascending = ops.take(columns, ops.argsort(columns))
        place = ops.like(range(ops.shape(rows)[0]), rows)
        count = ops.total(ops.wide(present))
        kept = (place > 0) & (place < count - 1)
        total = ops.total(ops.where(kept, ascending, ops.zeros_like(ascending)))[:, 0]
        return total / ops.cast_like(count - 2, rows)
