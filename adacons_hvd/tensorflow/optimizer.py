"""``DistributedOptimizer`` of ``adacons_hvd.tensorflow``: for Keras' optimizers and TensorFlow 1's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import horovod.tensorflow as hvd
import tensorflow as tf
from horovod.tensorflow.compression import Compression
from horovod.tensorflow.mpi_ops import ProcessSet, global_process_set

from ..aggregators import Aggregator
from ..engine.replicas import CHECK_REPLICAS
from ..engine.settings import BUCKET_BYTES

__all__ = ["DistributedOptimizer"]


def DistributedOptimizer(  # noqa: N802 - Horovod's name
    optimizer: Any,
    name: str | None = None,
    use_locking: bool = False,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    sparse_as_dense: bool = False,
    backward_passes_per_step: int = 1,
    op: int = hvd.Average,
    gradient_predivide_factor: float = 1.0,
    average_aggregated_gradients: bool = False,
    num_groups: int = 0,
    groups: int | list[list[Any]] | None = None,
    process_set: ProcessSet = global_process_set,
    scale_local_gradients: bool = True,
    *,
    aggregator: Aggregator | None = None,
    schedule: str = "auto",
    granularity: str | Sequence[Sequence[Any]] = "model",
    bucket_bytes: int = BUCKET_BYTES,
    check_replicas: int = CHECK_REPLICAS,
    may_differ: Iterable[Any] = (),
    workers: str = "rank",
) -> Any:
    """Wrap an optimizer so that its steps use the gradients of all workers.

    An optimizer of Keras is wrapped by :func:`adacons_hvd.tensorflow.keras.DistributedOptimizer`,
    which explains the arguments. One of TensorFlow 1 is wrapped by Horovod, and there is no
    aggregator for it.
    """
    arguments = dict(locals())
    if isinstance(optimizer, tf.compat.v1.train.Optimizer):
        if aggregator is not None:
            raise TypeError(
                "an aggregator works with optimizers of Keras, not with tf.compat.v1.train's; "
                "for those, take gradients from a DistributedGradientTape"
            )
        ours = ("aggregator", "schedule", "granularity", "bucket_bytes", "check_replicas", "may_differ", "workers")
        return hvd.DistributedOptimizer(**{name: value for name, value in arguments.items() if name not in ours})
    from . import keras

    del arguments["use_locking"]
    return keras.DistributedOptimizer(**arguments)
