"""``load_model``: a saved model whose optimizer aggregates, and goes on where it was."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .common_callbacks import distributed_of

__all__ = ["load_model"]


def load_model(
    keras: Any,
    filepath: Any,
    wrap: Callable[[Any], Any],
    custom_optimizers: Iterable[type] | None,
    custom_objects: Mapping[str, Any] | None,
) -> Any:
    """Load a model of this Keras and wrap its optimizer, which keeps its state."""
    objects = {cls.__name__: cls for cls in custom_optimizers or ()} | dict(custom_objects or {})
    model = keras.models.load_model(filepath, custom_objects=objects)
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        return model
    model.optimizer = wrap(optimizer)
    model.jit_compile = False  # Horovod's operations cannot be compiled by XLA
    model.train_function = None
    state = _saved_state(filepath)
    if state:
        distributed_of(model.optimizer)._adacons.exchange.load_state_dict(state)
    return model


def _saved_state(filepath: Any) -> dict[str, Any]:
    """The aggregator's state in a ``.keras`` file, if there is one."""
    import h5py  # type: ignore[import-untyped]

    if not isinstance(filepath, (str, Path)) or not zipfile.is_zipfile(filepath):
        return {}
    with zipfile.ZipFile(filepath) as archive:
        if "model.weights.h5" not in archive.namelist():
            return {}
        content = io.BytesIO(archive.read("model.weights.h5"))
    with h5py.File(content, "r") as file:
        for place in ("optimizer/adacons_state/vars", "optimizer/inner_optimizer/adacons_state/vars"):
            if place in file:
                return {name: value[()] for name, value in file[place].items()}
    return {}
