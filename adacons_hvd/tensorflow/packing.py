"""Gradients to buckets and back, as graph operations.

A *slot* is one gradient's place. A *packing* makes a bucket of its slots' gradients, and takes them
out again; which slots share one, :mod:`adacons_hvd.engine.plan` says. Packings are made once per
layout; the buckets themselves are made of tensors and live for one trace of one step.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf
from horovod.tensorflow.compression import Compression

from ..collectives.horovod_tensorflow import make_variable
from ..engine.plan import Item, plan_buckets, segments
from ..ops.tensorflow import distinct, past_room, sum_rows
from ..schedules import Bucket, DenseBucket, Schedule, SparseBucket

__all__ = ["DensePacking", "Kept", "Packing", "Slot", "SparsePacking", "pack"]

Gradient = Any  # a tf.Tensor or tf.IndexedSlices


@dataclass(frozen=True)
class Slot:
    """One gradient's place in the layout."""

    index: int
    key: Hashable
    name: str
    shape: tuple[int, ...]
    dtype: tf.DType
    group: int
    sparse: bool = False

    @property
    def length(self) -> int:
        """How many real numbers the gradient consists of."""
        length = 2 if self.dtype.is_complex else 1
        for side in self.shape:
            length *= side
        return length

    @property
    def row_length(self) -> int:
        """How many real numbers one row of the gradient consists of."""
        return self.length // max(self.shape[0], 1)

    def signature(self) -> Any:
        """The gradient's type, for the signature of a ``tf.function``; a sparse one's number of rows is left open."""
        if self.sparse:
            return tf.IndexedSlicesSpec(self.shape, self.dtype, tf.int64, tf.int64, [None])
        return tf.TensorSpec(self.shape, self.dtype)

    def normal(self, gradient: Gradient | None) -> Gradient:
        """The gradient in the form all ranks agreed on; zeros where this rank has none."""
        if self.sparse:
            return self._as_slices(gradient)
        return self.dense(gradient)

    def dense(self, gradient: Gradient | None) -> tf.Tensor:
        """The gradient in full length."""
        if gradient is None:
            return tf.zeros(self.shape, self.dtype)
        gradient = tf.convert_to_tensor(gradient)
        return gradient if gradient.shape == self.shape else tf.ensure_shape(gradient, self.shape)

    def _as_slices(self, gradient: Gradient | None) -> tf.IndexedSlices:
        shape = tf.constant(self.shape, tf.int64)
        if gradient is None:
            nothing = tf.zeros((0, *self.shape[1:]), self.dtype)
            return tf.IndexedSlices(nothing, tf.zeros((0,), tf.int64), shape)
        if isinstance(gradient, tf.IndexedSlices):
            values = tf.reshape(gradient.values, (-1, *self.shape[1:]))
            return tf.IndexedSlices(values, tf.cast(gradient.indices, tf.int64), shape)
        return tf.IndexedSlices(gradient, tf.range(self.shape[0], dtype=tf.int64), shape)


class Packing:
    """How gradients get into one bucket and out of it."""

    name: str
    slots: Sequence[Slot]

    def pack(self, gradients: Mapping[int, Gradient], schedule: Schedule) -> Bucket:
        """A bucket holding these gradients, by the index of their slots."""
        raise NotImplementedError

    def unpack(self, bucket: Any) -> dict[int, Gradient]:
        """The aggregated gradients, by the index of their slots."""
        raise NotImplementedError


@dataclass
class Kept:
    """The mean gradients of earlier steps of one packing's elements, beyond the life of its buckets."""

    length: int
    schedule: Schedule
    past: tf.Variable


@dataclass(frozen=True)
class DensePacking(Packing):
    """Slots side by side in a flat tensor of one element type."""

    name: str
    slots: Sequence[Slot]
    dtype: tf.DType
    compression: Any
    workers: int
    #: Where the aggregator has a history.
    kept: Kept | None = None

    def pack(self, gradients: Mapping[int, Gradient], schedule: Schedule) -> DenseBucket:
        parts = [self._flat(gradients[slot.index]) for slot in self.slots]
        padding = _padded(self.slots, self.workers) - sum(slot.length for slot in self.slots)
        if padding:
            parts.append(tf.zeros((padding,), self.dtype))
        buffer = tf.concat(parts, 0) if len(parts) > 1 else parts[0]
        pieces = segments((slot.length, slot.group) for slot in self.slots)
        return DenseBucket(self.name, buffer, pieces, schedule, past=None if self.kept is None else self.kept.past)

    def unpack(self, bucket: DenseBucket) -> dict[int, Gradient]:
        results = {}
        start = 0
        for slot in self.slots:
            part = tf.slice(bucket.buffer, [start], [slot.length])
            start += slot.length
            part = tf.cast(part, _real(slot.dtype))
            if bucket.restore is not None:
                part = part * tf.cast(bucket.restore[slot.group, 0], part.dtype)
            if slot.dtype.is_complex:
                pairs = tf.reshape(part, (*slot.shape, 2))
                part = tf.complex(pairs[..., 0], pairs[..., 1])
            results[slot.index] = tf.reshape(part, slot.shape)
        return results

    def _flat(self, gradient: tf.Tensor) -> tf.Tensor:
        if self.compression is not None:
            gradient = self.compression.decompress(*self.compression.compress(gradient))
        if gradient.dtype.is_complex:
            gradient = tf.stack([tf.math.real(gradient), tf.math.imag(gradient)], -1)
        return tf.reshape(tf.cast(gradient, self.dtype), (-1,))


@dataclass(frozen=True)
class SparsePacking(Packing):
    """Slots whose gradients have few non-zero rows, of one length, as embeddings'; their rows are numbered through."""

    name: str
    slots: Sequence[Slot]

    def pack(self, gradients: Mapping[int, Gradient], schedule: Schedule) -> SparseBucket:
        slices = [gradients[slot.index] for slot in self.slots]
        rows = tf.concat([some.indices + start for some, start in zip(slices, self._starts(), strict=True)], 0)
        values = tf.concat([tf.reshape(some.values, (-1, self.slots[0].row_length)) for some in slices], 0)
        # Repeated rows must be added up before they are squared.
        once, places = distinct(rows)
        values = tf.cast(sum_rows(values, places, once), values.dtype)
        return SparseBucket(self.name, once, values, self.slots[0].group, schedule.collectives)

    def unpack(self, bucket: SparseBucket) -> dict[int, Gradient]:
        starts = self._starts()
        whose = tf.searchsorted(tf.constant(starts, tf.int64), bucket.rows, side="right") - 1
        rows = tf.dynamic_partition(bucket.rows, whose, len(starts))
        values = tf.dynamic_partition(bucket.values, whose, len(starts))
        return {
            slot.index: tf.IndexedSlices(
                tf.reshape(values[i], (-1, *slot.shape[1:])), rows[i] - starts[i], tf.constant(slot.shape, tf.int64)
            )
            for i, slot in enumerate(self.slots)
        }

    def _starts(self) -> list[int]:
        """The number of each slot's first row."""
        return list(itertools.accumulate((slot.shape[0] for slot in self.slots[:-1]), initial=0))


def pack(
    name: str,
    slots: Sequence[Slot],
    schedule: Schedule,
    *,
    bucket_bytes: int,
    together: Sequence[Sequence[Hashable]] | None,
    compression: Any,
) -> list[Packing]:
    """Make the packings of a layout; ``together`` is as in :func:`adacons_hvd.engine.plan.plan_buckets`."""
    wire, transform = _compression(compression)

    def dtype_of(slot: Slot) -> tf.DType:
        if wire is None or slot.sparse or not slot.dtype.is_floating:
            return _real(slot.dtype)
        return wire

    items = [
        Item(
            slot.key,
            slot.length,
            slot.group,
            kind=dtype_of(slot),
            width=dtype_of(slot).size,
            row_length=slot.row_length if slot.sparse else None,
        )
        for slot in slots
    ]
    packings: list[Packing] = []
    for number, bucket in enumerate(plan_buckets(items, bucket_bytes, together)):
        members = tuple(slots[position] for position in bucket.positions)
        if bucket.sparse:
            packings.append(SparsePacking(f"{name}.{number}", members))
        else:
            kept = _kept(members, dtype_of(members[0]), schedule) if schedule.history else None
            workers = schedule.collectives.size
            packings.append(DensePacking(f"{name}.{number}", members, dtype_of(members[0]), transform, workers, kept))
    return packings


def _padded(slots: Sequence[Slot], workers: int) -> int:
    """How many elements a bucket of these slots has: shards have equal length, so a multiple of the workers."""
    length = sum(slot.length for slot in slots)
    return length + -length % workers


def _kept(slots: Sequence[Slot], dtype: tf.DType, schedule: Schedule) -> Kept:
    length = _padded(slots, schedule.collectives.size)
    start, stop = schedule.kept(length)
    return Kept(length, schedule, make_variable(past_room(tf.zeros((), dtype), schedule.history, stop - start)))


def _real(dtype: tf.DType) -> tf.DType:
    return {tf.complex64: tf.float32, tf.complex128: tf.float64}.get(dtype, dtype)


def _compression(compression: Any) -> tuple[tf.DType | None, Any]:
    """The element type on the wire, if it is not the gradient's own, and what to do to gradients.

    Horovod's fp16 compression is a cast, so the bucket can hold its outcome. Another compressor's
    outcome can have any form, of which shards and inner products may mean nothing; so what counts,
    and what is sent, is the gradient that is left of compressing and decompressing.
    """
    if compression is Compression.none or compression is None:
        return None, None
    if compression is Compression.fp16:
        return tf.float16, None
    return None, compression
