"""Parameters' gradients to buckets and back.

A *slot* is one parameter's place; a *packing* fills a bucket from its slots and empties it into them. Which slots share
a bucket, :mod:`adacons_hvd.engine.plan` says.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..engine.plan import Item, plan_buckets, segments
from ..schedules import Bucket, DenseBucket, Schedule, SparseBucket
from ..torch_gradients import numbers, real, rows_and_values, sparse_gradient

__all__ = ["DensePacking", "Packing", "Slot", "SparsePacking", "pack"]


@dataclass(eq=False)
class Slot:
    """One parameter's place in the layout."""

    name: str
    parameter: torch.Tensor
    group: int
    sparse: bool = False
    packing: Packing | None = None
    start: int = 0
    #: How often backward has added to the gradient since the last step, and how often it is
    #: expected to before the gradient is worth sending.
    additions: int = 0
    expected: int = 1
    #: Which gradient, in which version, was taken to be sent.
    taken: tuple[int, int] | None = None

    @property
    def length(self) -> int:
        """How many real numbers the gradient consists of."""
        return numbers(self.parameter)

    @property
    def row_length(self) -> int:
        """How many real numbers one row of the gradient consists of."""
        return self.length // max(self.parameter.shape[0], 1)

    @property
    def identity(self) -> tuple[int, int]:
        """Changes when the gradient is replaced, removed, or modified in place."""
        gradient = self.parameter.grad
        return id(gradient), -1 if gradient is None else gradient._version


class Packing:
    """Slots that travel together."""

    slots: list[Slot]
    #: How many slots have not been added to as often as expected.
    waiting: int

    @property
    def bucket(self) -> Bucket:
        raise NotImplementedError

    def load(self) -> None:
        """Take the gradients as they are now."""
        for slot in self.slots:
            slot.taken = slot.identity

    def outdated(self) -> bool:
        """Whether a gradient has changed since it was taken."""
        return any(slot.taken != slot.identity for slot in self.slots)

    def deliver(self) -> None:
        """Put the result into the gradients."""
        raise NotImplementedError

    def expect(self, passes: int) -> None:
        """Begin to count anew what backward adds."""
        for slot in self.slots:
            # A slot that was added to several times will be next time, most likely: reentrant
            # checkpointing, or a second loss. Waiting for that many saves sending twice.
            slot.expected, slot.additions = max(slot.additions, passes), 0
        self.waiting = len(self.slots)


class DensePacking(Packing):
    """Slots of one element type on one device, side by side in a flat buffer.

    A gradient that is alone in its packing is used where it is, if its elements lie as a buffer's do.
    """

    def __init__(
        self,
        name: str,
        slots: list[Slot],
        dtype: torch.dtype,
        schedule: Schedule,
        compression: Any,
    ) -> None:
        self.slots = slots
        self.waiting = len(slots)
        self.compression = compression
        length = 0
        for slot in slots:
            slot.packing, slot.start = self, length
            length += slot.length
        self._length = length
        # Shards have equal length, so the buffer is padded.
        self._padded = -(-length // schedule.multiple) * schedule.multiple
        #: In place of a buffer between steps, and for the buffer's element type and device.
        self._nothing = torch.empty(0, dtype=dtype, device=slots[0].parameter.device)
        #: Each slot's part of a buffer, by the address of that.
        self._views: dict[int, dict[Slot, torch.Tensor]] = {}
        #: Whether the bucket holds the gradient itself.
        self._in_place = False
        pieces = segments((slot.length, slot.group) for slot in slots)
        # Filled by nobody: it has a buffer's length, and takes no memory before that is written to.
        self._bucket = DenseBucket(name, self._nothing.new_empty(self._padded), pieces, schedule)

    @property
    def bucket(self) -> DenseBucket:
        return self._bucket

    @cached_property
    def _buffer(self) -> torch.Tensor:
        """The buffer of this packing, made when it is first needed."""
        place: torch.Tensor | None = self.bucket.place
        return self._nothing.new_zeros(self._padded) if place is None else place

    def _views_of(self, buffer: torch.Tensor) -> dict[Slot, torch.Tensor]:
        address = buffer.data_ptr()
        if address not in self._views:
            self._views[address] = {
                slot: buffer[slot.start : slot.start + slot.length].view(real(slot.parameter.detach()).shape)
                for slot in self.slots
            }
        return self._views[address]

    def _gradient_itself(self) -> torch.Tensor | None:
        """The only slot's gradient as a flat tensor, if it can be used in place of a buffer."""
        gradient = self.slots[0].parameter.grad
        if len(self.slots) > 1 or self._padded > self._length or self.compression is not None or gradient is None:
            return None
        if gradient.is_sparse or not (flat := real(gradient.detach())).is_contiguous():
            return None
        return flat.view(-1) if flat.dtype == self._nothing.dtype else None

    def load(self) -> None:
        super().load()
        gradient = self._gradient_itself()
        self._in_place = gradient is not None
        if gradient is not None:
            self.bucket.buffer = gradient
            return
        self.bucket.buffer = self._buffer
        parts = self._views_of(self._buffer)
        views, gradients = [], []
        for slot in self.slots:
            view, gradient = parts[slot], slot.parameter.grad
            if gradient is None:
                view.zero_()
                continue
            gradient = gradient.detach()
            if gradient.is_sparse:
                gradient = gradient.to_dense()
            if self.compression is not None:
                gradient = self.compression.decompress(*self.compression.compress(gradient))
            views.append(view)
            gradients.append(real(gradient))
        if views:
            torch._foreach_copy_(views, gradients)

    def deliver(self) -> None:
        if self._in_place:
            # Whoever sets gradients to None after the step expects their memory back.
            self.bucket.buffer, self._in_place = self._nothing, False
        else:
            self._copy_back()
        if self.bucket.restore is not None:
            for slot in self.slots:
                assert slot.parameter.grad is not None
                slot.parameter.grad.mul_(self.bucket.restore[slot.group, 0])

    def _copy_back(self) -> None:
        parts = self._views_of(self.bucket.buffer)
        views, gradients = [], []
        for slot in self.slots:
            parameter, view = slot.parameter, parts[slot]
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradient = parameter.grad.detach()
            if gradient.is_sparse:
                parameter.grad = view.to(gradient.dtype).to_sparse(gradient.sparse_dim())
            else:
                views.append(view)
                gradients.append(real(gradient))
        if views:
            torch._foreach_copy_(gradients, views)


class SparsePacking(Packing):
    """Slots whose gradients have few non-zero rows, of one length, as embeddings'; their rows are numbered through."""

    def __init__(self, name: str, slots: list[Slot], schedule: Schedule) -> None:
        self.slots = slots
        self.waiting = len(slots)
        for slot in slots:
            slot.packing = self
        #: The number of each slot's first row, and of the row after the last one.
        self._starts = list(itertools.accumulate((slot.parameter.shape[0] for slot in slots), initial=0))
        self._inner_starts = torch.tensor(self._starts[1:-1], device=slots[0].parameter.device)
        nothing = slots[0].parameter.new_zeros((0, slots[0].row_length))
        self._nothing = nothing.new_zeros(0, dtype=torch.int64), nothing
        self._bucket = SparseBucket(name, *self._nothing, slots[0].group, schedule.collectives)

    @property
    def bucket(self) -> SparseBucket:
        return self._bucket

    def load(self) -> None:
        super().load()
        gradients = [
            (start, gradient.detach() if gradient.is_sparse else gradient.detach().to_sparse(1))
            for slot, start in zip(self.slots, self._starts, strict=False)
            if (gradient := slot.parameter.grad) is not None
        ]
        if not gradients:
            self.bucket.rows, self.bucket.values = self._nothing
        elif len(gradients) == 1:
            start, gradient = gradients[0]
            rows, self.bucket.values = rows_and_values(gradient)
            self.bucket.rows = rows + start
        else:
            rows = torch.cat([gradient._indices() + start for start, gradient in gradients], 1)
            values = torch.cat([gradient._values().flatten(1) for _, gradient in gradients])
            shape = self._starts[-1], values.shape[1]
            together = torch.sparse_coo_tensor(rows, values, shape, check_invariants=False)
            self.bucket.rows, self.bucket.values = rows_and_values(together)

    def deliver(self) -> None:
        rows, values = self.bucket.rows, self.bucket.values
        # Rows are in order.
        stops = [*torch.searchsorted(rows, self._inner_starts).tolist(), len(rows)]
        first = 0
        for slot, start, stop in zip(self.slots, self._starts, stops, strict=False):
            parameter = slot.parameter
            parameter.grad = sparse_gradient(rows[first:stop] - start, values[first:stop], parameter)
            first = stop


def pack(
    name: str,
    slots: Sequence[Slot],
    schedule: Schedule,
    *,
    bucket_bytes: int,
    together: Sequence[Sequence[Hashable]] | None,
    compression: Any,
) -> list[Packing]:
    """Make the packings of a layout; ``together`` is as in :func:`adacons_hvd.engine.plan.plan_buckets`, by ``id``."""
    wire, transform = _compression(compression)

    def dtype_of(slot: Slot) -> torch.dtype:
        if wire is None or slot.sparse or slot.parameter.is_complex():
            return _real(slot.parameter.dtype)
        return wire

    items = [
        Item(
            key=id(slot.parameter),
            length=slot.length,
            group=slot.group,
            kind=(dtype_of(slot), slot.parameter.device),
            width=dtype_of(slot).itemsize,
            row_length=slot.row_length if slot.sparse else None,
        )
        for slot in slots
    ]
    packings: list[Packing] = []
    for number, bucket in enumerate(plan_buckets(items, bucket_bytes, together)):
        members = [slots[position] for position in bucket.positions]
        if bucket.sparse:
            packings.append(SparsePacking(f"{name}.{number}", members, schedule))
        else:
            packings.append(DensePacking(f"{name}.{number}", members, dtype_of(members[0]), schedule, transform))
    return packings


def _real(dtype: torch.dtype) -> torch.dtype:
    return {
        torch.complex32: torch.float16,
        torch.complex64: torch.float32,
        torch.complex128: torch.float64,
    }.get(dtype, dtype)


def _compression(compression: Any) -> tuple[torch.dtype | None, Any]:
    """The element type on the wire, if it is not the gradient's own, and what to do to gradients.

    Horovod's fp16 compression is a cast, so the buffer can hold its outcome. Another compressor's
    outcome can have any form, of which shards and inner products may mean nothing; so what counts,
    and what is sent, is the gradient that is left of compressing and decompressing.
    """
    from horovod.torch.compression import Compression

    if compression is Compression.none or compression is None:
        return None, None
    if compression is Compression.fp16:
        return torch.float16, None
    return None, compression
