"""The public functions' insides, whichever Keras the optimizer is of."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .backends import keras_backend
from .binding import make_binding
from .saving import load_model as load

__all__ = ["distribute", "keep_local", "make_load_model"]


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

    import keras

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
