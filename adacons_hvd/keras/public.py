"""``DistributedOptimizer``, ``PartialDistributedOptimizer`` and ``load_model`` of ``adacons_hvd.keras``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..aggregators import Aggregator
from ..binding import BUCKET_BYTES
from .arguments import distribute
from .backends import backend_of, keras_backend

__all__ = ["DistributedOptimizer", "PartialDistributedOptimizer", "load_model"]

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
) -> Any:
    """Wrap an optimizer so that its steps use the gradients of all workers.

    The arguments are those of :func:`adacons_hvd.tensorflow.keras.DistributedOptimizer`, which
    explains them, in the order of ``horovod.keras``.
    """
    return distribute(
        optimizer,
        name=name,
        device_dense=device_dense,
        device_sparse=device_sparse,
        compression=compression,
        sparse_as_dense=sparse_as_dense,
        gradient_predivide_factor=gradient_predivide_factor,
        op=op,
        backward_passes_per_step=backward_passes_per_step,
        average_aggregated_gradients=average_aggregated_gradients,
        num_groups=num_groups,
        groups=groups,
        process_set=process_set,
        scale_local_gradients=scale_local_gradients,
        aggregator=aggregator,
        schedule=schedule,
        granularity=granularity,
        bucket_bytes=bucket_bytes,
    )


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
    part = wrapped if hasattr(wrapped, "register_local_var") else wrapped.inner_optimizer
    for variable in backend_of(keras_backend()).variables_of(local_layers):
        part.register_local_var(variable)
    return wrapped


def load_model(
    filepath: Any,
    custom_optimizers: Iterable[type] | None = None,
    custom_objects: Mapping[str, Any] | None = None,
    compression: Any = _hvd.Compression.none,
    legacy_opts: bool = False,
    **distributed: Any,
) -> Any:
    """Load a model that was saved with or without this package, and wrap its optimizer.

    The optimizer keeps the state it was saved with, the aggregator's memory included, whatever
    the number of workers. ``distributed`` are further arguments of :func:`DistributedOptimizer`,
    ``aggregator`` above all.
    """
    import keras

    from .loading import load_model as load

    def wrap(optimizer: Any) -> Any:
        return DistributedOptimizer(optimizer, compression=compression, **distributed)

    return load(keras, filepath, wrap, custom_optimizers, custom_objects)
