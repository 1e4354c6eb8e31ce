"""Gradients without an aggregator: Horovod's own reduction, as a part of a reducer's graph."""

from __future__ import annotations

from collections.abc import Sequence

import horovod.tensorflow as hvd
import tensorflow as tf

from ..collectives.horovod_tensorflow import HorovodTensorFlow
from ..engine.settings import Settings
from .packing import Gradient, Slot

__all__ = ["average"]


def average(
    settings: Settings,
    collectives: HorovodTensorFlow,
    name: str,
    slots: Sequence[Slot],
    gradients: Sequence[Gradient],
    all_here: tf.Tensor,
) -> list[Gradient]:
    """Reduce the gradients of these slots as Horovod does."""
    factor = settings.gradient_predivide_factor if settings.op == hvd.Average else 1.0
    common = {
        "op": settings.op,
        "compression": settings.compression or hvd.Compression.none,
        "prescale_factor": 1 / factor,
        "postscale_factor": factor,
        "process_set": settings.process_set,
        "ignore_name_scope": True,
        "device_dense": settings.device_dense,
    }
    together = settings.shared_buckets([slot.key for slot in slots])
    groups = {key: number for number, group in enumerate(together or ()) for key in group}
    results: dict[int, Gradient] = {}
    grouped: dict[int, list[tuple[int, Gradient]]] = {}
    for slot, gradient in zip(slots, gradients, strict=True):
        if slot.sparse:
            results[slot.index] = _average_rows(settings, collectives, name, slot, gradient, all_here)
            continue
        gradient = collectives.anchored(gradient)
        if slot.key in groups:
            grouped.setdefault(groups[slot.key], []).append((slot.index, gradient))
        else:
            reduced = hvd.allreduce(gradient, name=f"{name}.{slot.index}", **common)
            results[slot.index] = tf.ensure_shape(reduced, slot.shape)
    for number, members in grouped.items():
        indices, tensors = zip(*members, strict=True)
        reduced = hvd.grouped_allreduce(list(tensors), name=f"{name}.group.{number}", **common)
        results.update(zip(indices, reduced, strict=True))
    return [results[slot.index] for slot in slots]


def _average_rows(
    settings: Settings,
    collectives: HorovodTensorFlow,
    name: str,
    slot: Slot,
    gradient: tf.IndexedSlices,
    all_here: tf.Tensor,
) -> tf.IndexedSlices:
    """The average of a sparse gradient; in full length once a rank has joined."""
    if settings.op not in (hvd.Average, hvd.Sum):
        raise NotImplementedError(
            f"{slot.name} has a sparse gradient, which only Average and Sum can reduce; pass sparse_as_dense=True"
        )
    name = f"{name}.{slot.index}"

    def rows_of_all() -> tf.IndexedSlices:
        values = collectives.allgather_rows(gradient.values, f"{name}.values").wait()
        rows = collectives.allgather_rows(gradient.indices, f"{name}.rows").wait()
        return tf.IndexedSlices(values, rows, tf.constant(slot.shape, tf.int64))

    def in_full_length() -> tf.IndexedSlices:
        collectives.start()
        return slot.normal(collectives.allreduce(slot.dense(gradient), f"{name}.sum").wait())

    total = tf.cond(all_here, rows_of_all, in_full_length)
    if settings.op == hvd.Sum:
        return total
    values = total.values / tf.cast(collectives.size, total.values.dtype)
    return tf.IndexedSlices(values, total.indices, total.dense_shape)
