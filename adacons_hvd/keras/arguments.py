"""``DistributedOptimizer`` and its partial form, whichever Keras the optimizer is of."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from ..aggregators import Aggregator
from .backends import keras_backend

__all__ = ["distribute"]


def distribute(
    optimizer: Any,
    *,
    aggregator: Aggregator | None,
    schedule: str,
    granularity: str | Sequence[Sequence[Any]],
    bucket_bytes: int,
    **arguments: Any,
) -> Any:
    """Wrap an optimizer of Keras 3 or of ``tf_keras``."""
    ours: dict[str, Any] = {
        "aggregator": aggregator,
        "schedule": schedule,
        "granularity": granularity,
        "bucket_bytes": bucket_bytes,
    }
    # Horovod's name for the operations; here they are numbered.
    arguments.pop("name")
    tf_keras = sys.modules.get("tf_keras")
    if tf_keras is not None and isinstance(
        optimizer, (tf_keras.optimizers.Optimizer, tf_keras.optimizers.legacy.Optimizer)
    ):
        from .legacy import wrap_legacy
        from .optimizer import make_binding

        return wrap_legacy(optimizer, make_binding(backend="tensorflow", **ours, **arguments))

    import keras

    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise TypeError(
            "DistributedOptimizer wraps an optimizer of Keras, "
            f"got {type(optimizer).__module__}.{type(optimizer).__qualname__}"
        )
    from .optimizer import make_binding, wrap

    return wrap(optimizer, make_binding(backend=keras_backend(), **ours, **arguments))
