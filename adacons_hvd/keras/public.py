"""``DistributedOptimizer``, ``PartialDistributedOptimizer`` and ``load_model`` of ``adacons_hvd.keras``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any

import keras

from ..aggregators import Aggregator
from ..engine.replicas import CHECK_REPLICAS
from ..engine.settings import BUCKET_BYTES
from .arguments import distribute, keep_local, make_load_model
from .backends import backend_of, keras_backend

__all__ = ["DistributedOptimizer", "PartialDistributedOptimizer", "load_model"]

# From now on steps are watched, whichever optimizer takes them.
import_module(".optimizer", __package__)

_hvd = backend_of(keras_backend()).hvd


def DistributedOptimizer(  # noqa: N802 - Horovod's name
    optimizer: Any,
    name: str | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = _hvd.Compression.none,
    sparse_as_dense: bool = False,
    gradient_predivide_factor: float = 1.0,
    op: Any = _hvd.Average,
    num_groups: int = 0,
    groups: int | list[list[Any]] | None = None,
    *,
    backward_passes_per_step: int = 1,
    average_aggregated_gradients: bool = False,
    process_set: Any = _hvd.global_process_set,
    scale_local_gradients: bool = True,
    aggregator: Aggregator | None = None,
    schedule: str = "auto",
    granularity: str | Sequence[Sequence[Any]] = "model",
    bucket_bytes: int = BUCKET_BYTES,
    check_replicas: int = CHECK_REPLICAS,
    may_differ: Iterable[Any] = (),
) -> Any:
    """Wrap an optimizer so that its steps use the gradients of all workers.

    The arguments are those of :func:`adacons_hvd.tensorflow.keras.DistributedOptimizer`, which
    explains them, in the order of ``horovod.keras``.
    """
    return distribute(**locals())


def PartialDistributedOptimizer(  # noqa: N802 - Horovod's name
    optimizer: Any,
    name: str | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = _hvd.Compression.none,
    sparse_as_dense: bool = False,
    gradient_predivide_factor: float = 1.0,
    op: Any = _hvd.Average,
    groups: int | list[list[Any]] | None = None,
    process_set: Any = _hvd.global_process_set,
    local_layers: Any = None,
    scale_local_gradients: bool = True,
    **ours: Any,
) -> Any:
    """:func:`DistributedOptimizer`, but the variables of ``local_layers`` stay each rank's own."""
    wrapped = DistributedOptimizer(
        optimizer,
        name,
        device_dense,
        device_sparse,
        compression,
        sparse_as_dense,
        gradient_predivide_factor,
        op,
        groups=groups,
        process_set=process_set,
        scale_local_gradients=scale_local_gradients,
        **ours,
    )
    return keep_local(wrapped, local_layers)


load_model = make_load_model(lambda: keras, DistributedOptimizer, _hvd.Compression.none)
