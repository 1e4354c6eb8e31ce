"""Files that hold a model: what they keep of the aggregator, and ``load_model``.

Keras saves what the aggregator remembers as an attribute of the optimizer, in ``.keras`` and
``.weights.h5`` files; TensorFlow does in checkpoints and SavedModels. Only Keras' older ``.h5`` has
no place for attributes, so ``model.save`` adds one after Keras is done. Where this package is
absent none of it is looked at, and the files load as if written without it.
"""

from __future__ import annotations

import functools
import io
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .binding import StateHolder, distributed_part

__all__ = ["load_model", "save_state_in_h5"]

_PLACE = "adacons_state"


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
    model.optimizer = wrap(_rebuilt(optimizer, model, filepath))
    state = _saved_state(filepath)
    if state:
        distributed_part(model.optimizer)._adacons.exchange.load_state_dict(state)
    return model


def _rebuilt(optimizer: Any, model: Any, filepath: Any) -> Any:
    """The optimizer; another where Keras 3 has spoilt it.

    Reading an ``.h5`` file, Keras 3 builds the optimizer before the model has variables, so it has
    no state and cannot train. Its variables are in the file all the same.
    """
    import h5py  # type: ignore[import-untyped]

    spoilt = getattr(optimizer, "built", False) and getattr(optimizer, "_trainable_variables", None) == []
    if not (spoilt and model.trainable_variables and h5py.is_hdf5(filepath)):
        return optimizer
    fresh = type(optimizer).from_config(optimizer.get_config())
    fresh.build(model.trainable_variables)
    with h5py.File(filepath, "r") as file:
        group = file["optimizer_weights"]
        keys = sorted(key for key in group.attrs if key.startswith("weight_names"))
        names = [name for key in keys for name in group.attrs[key]]
        for variable, name in zip(fresh.variables, names, strict=True):
            variable.assign(group[name][()])
    return fresh


def _saved_state(filepath: Any) -> dict[str, Any]:
    """The aggregator's state in a saved model, if there is one."""
    import h5py

    if not isinstance(filepath, (str, os.PathLike)):
        return _state_in_h5(filepath) if isinstance(filepath, h5py.File) else {}
    path = Path(filepath)
    if path.is_dir():
        if (path / "saved_model.pb").exists():
            from .tensorflow_backend import state_in_checkpoint

            return state_in_checkpoint(path / "variables" / "variables", _PLACE)
        path = path / "model.weights.h5"
    content: Any = path
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if "model.weights.h5" not in archive.namelist():
                return {}
            content = io.BytesIO(archive.read("model.weights.h5"))
    elif not (path.exists() and h5py.is_hdf5(path)):
        return {}
    with h5py.File(content, "r") as file:
        return _state_in_h5(file)


def _state_in_h5(file: Any) -> dict[str, Any]:
    """What :meth:`StateHolder.save_own_variables` wrote, wherever in the file."""
    places: list[str] = []
    file.visit(lambda name: places.append(name) if _PLACE in name.split("/") else None)
    for place in places:
        if "version" in file[place]:
            return {name: value[()] for name, value in file[place].items()}
    return {}


def save_state_in_h5(keras: Any) -> None:
    """Make ``save`` of this Keras' models add the aggregator's state to ``.h5`` files."""
    original = keras.Model.save

    @functools.wraps(original)
    def save(self: Any, filepath: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, filepath, *args, **kwargs)
        part = distributed_part(getattr(self, "optimizer", None))
        if part is not None and kwargs.get("include_optimizer", True):
            _add_state(filepath, part.adacons_state)
        return result

    keras.Model.save = save


def _add_state(filepath: Any, state: StateHolder) -> None:
    import h5py

    if isinstance(filepath, h5py.File):
        state.save_own_variables(filepath.create_group(_PLACE))
    elif isinstance(filepath, (str, os.PathLike)) and Path(filepath).is_file() and h5py.is_hdf5(filepath):
        with h5py.File(filepath, "a") as file:
            state.save_own_variables(file.create_group(_PLACE))
