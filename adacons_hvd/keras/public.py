"""``DistributedOptimizer``, ``PartialDistributedOptimizer`` and ``load_model`` of ``adacons_hvd.keras``.

And what they are made of, which is the same for ``adacons_hvd.tensorflow.keras``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any

import keras

from ..aggregators import Aggregator
from ..engine.replicas import CHECK_REPLICAS
from ..engine.settings import BUCKET_BYTES
from .backends import backend_of, keras_backend
from .binding import make_binding
from .models import load_model as load

__all__ = ["DistributedOptimizer", "PartialDistributedOptimizer", "load_model"]


def distribute(optimizer: Any, **arguments: Any) -> Any:
    """Wrap an optimizer of Keras 3 or of ``tf_keras``; the arguments are all of ``DistributedOptimizer``'s."""
    # Horovod's name for the operations; here they are numbered.
    del arguments["name"]
    tf_keras = sys.modules.get("tf_keras")
    if tf_keras is not None and isinstance(
        optimizer, (tf_keras.optimizers.Optimizer, tf_keras.optimizers.legacy.Optimizer)
    ):
        from .legacy import wrap_legacy

        return wrap_legacy(optimizer, make_binding(backend="tensorflow", **arguments))

    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise TypeError(f"optimizer must be an optimizer of Keras such as keras.optimizers.Adam(), got {optimizer!r}")
    from .optimizer import wrap

    return wrap(optimizer, make_binding(backend=keras_backend(), **arguments))


def keep_local(wrapped: Any, local_layers: Any) -> Any:
    """Leave the variables of these layers out of what a distributed optimizer aggregates."""
    for variable in _variables_of(local_layers):
        wrapped.register_local_var(variable)
    return wrapped


def _variables_of(local_layers: Any) -> list[Any]:
    """The trainable variables of a layer, or of several."""
    if local_layers is None:
        return []
    layers = list(local_layers) if isinstance(local_layers, (list, tuple, set)) else [local_layers]
    for layer in layers:
        if not hasattr(layer, "trainable_weights"):
            raise ValueError(f"local_layers must hold Keras layers, found {type(layer).__name__}")
    return [variable for layer in layers for variable in layer.trainable_weights]


def make_load_model(keras_of: Callable[[], Any], distributed_optimizer: Callable[..., Any], compression: Any) -> Any:
    """``load_model`` of a module with this ``DistributedOptimizer``."""

    def load_model(
        filepath: Any,
        custom_optimizers: Iterable[type] | None = None,
        custom_objects: Mapping[str, Any] | None = None,
        compression: Any = compression,
        legacy_opts: bool = False,
        **distributed: Any,
    ) -> Any:
        """Load a model that was saved with or without this package, and wrap its optimizer.

        The optimizer is of the class it was saved with, also where that is one of Keras' legacy
        ones, and keeps its state, the aggregator's memory included, whatever the number of
        workers. ``distributed`` are further arguments of ``DistributedOptimizer``, ``aggregator``
        above all.
        """

        def wrap(optimizer: Any) -> Any:
            return distributed_optimizer(optimizer, compression=compression, **distributed)

        return load(keras_of(), filepath, wrap, custom_optimizers, custom_objects)

    return load_model


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
    workers: str = "rank",
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
