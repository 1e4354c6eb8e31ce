"""One of DDP's buckets, as one of ours.

DDP's dense buckets are flat buffers already, so ours are those very buffers, unless their length
is no multiple of what the schedule needs. The result is written where the gradient was.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..engine.plan import segments
from ..ops import ops_for
from ..schedules import Bucket, DenseBucket, Schedule, SparseBucket
from ..torch_gradients import numbers, real, rows_and_values, sparse_gradient

__all__ = ["DensePart", "Part", "SparsePart"]


class Part:
    """The bucket that comes in one position, as far as it stays the same from step to step."""

    #: None if there is nothing to aggregate.
    bucket: Bucket | None

    def __init__(
        self,
        name: str,
        gradient: torch.Tensor,
        parameters: Sequence[torch.Tensor],
        groups: Sequence[int],
        schedule: Schedule,
    ) -> None:
        self.parameters = list(parameters)
        self.kind = _kind(gradient)

    def fits(self, gradient: torch.Tensor, parameters: Sequence[torch.Tensor]) -> bool:
        """Whether this part was made for such a bucket."""
        return self.kind == _kind(gradient) and [*map(id, self.parameters)] == [*map(id, parameters)]

    def load(self, gradient: torch.Tensor) -> None:
        """Take the bucket's content."""
        raise NotImplementedError

    def result(self) -> torch.Tensor:
        """The aggregated gradient, in the form DDP gave the bucket."""
        raise NotImplementedError


class DensePart(Part):
    """Parameters of one element type, side by side in a flat buffer."""

    bucket: DenseBucket | None

    def __init__(
        self,
        name: str,
        gradient: torch.Tensor,
        parameters: Sequence[torch.Tensor],
        groups: Sequence[int],
        schedule: Schedule,
    ) -> None:
        super().__init__(name, gradient, parameters, groups, schedule)
        flat = real(gradient).view(-1)
        self.length = flat.numel()
        self.padded: torch.Tensor | None = None
        if not self.length:
            self.bucket, self._gradient = None, gradient
            return
        multiple = schedule.multiple
        if self.length % multiple:
            self.padded = flat.new_zeros(-(-self.length // multiple) * multiple)
        buffer = flat if self.padded is None else self.padded
        parts = zip(map(numbers, parameters), groups, strict=True)
        self.bucket = DenseBucket(name, buffer, segments(parts), schedule)

    def load(self, gradient: torch.Tensor) -> None:
        self._gradient = gradient
        if self.bucket is None:
            return
        flat = real(gradient).view(-1)
        if self.padded is None:
            self.bucket.buffer = flat
        else:
            self.padded[: self.length].copy_(flat)
            self.bucket.buffer = self.padded

    def result(self) -> torch.Tensor:
        if self.bucket is None:
            return self._gradient
        flat: torch.Tensor = self.bucket.buffer[: self.length]
        restore = self.bucket.restore
        if restore is not None:
            pieces = [(start, stop, restore[group, 0]) for start, stop, group in self.bucket.segments]
            flat = ops_for(flat).scale_segments(flat, pieces)
        return torch.view_as_complex(flat.view(-1, 2)) if self._gradient.is_complex() else flat


class SparsePart(Part):
    """An embedding's gradient, of which few rows are not zero. DDP gives each its own bucket."""

    bucket: SparseBucket

    def __init__(
        self,
        name: str,
        gradient: torch.Tensor,
        parameters: Sequence[torch.Tensor],
        groups: Sequence[int],
        schedule: Schedule,
    ) -> None:
        super().__init__(name, gradient, parameters, groups, schedule)
        (group,) = groups
        self.bucket = SparseBucket(name, None, None, group, schedule.collectives)

    def load(self, gradient: torch.Tensor) -> None:
        self.bucket.rows, self.bucket.values = rows_and_values(gradient)

    def result(self) -> torch.Tensor:
        (parameter,) = self.parameters
        return sparse_gradient(self.bucket.rows, self.bucket.values, parameter)


def _kind(gradient: torch.Tensor) -> tuple[torch.layout, torch.dtype, torch.device, int]:
    return gradient.layout, gradient.dtype, gradient.device, 0 if gradient.is_sparse else gradient.numel()
