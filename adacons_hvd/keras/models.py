"""Models of either Keras that a distributed optimizer trains: how they make their steps, are copied, saved and loaded.

Keras asks a model for its training step in ``make_train_function``, whichever way it is trained; and for the
configuration from which another model is compiled, in ``get_compile_config``. Both work as ever for every model whose
optimizer is not distributed.

Keras saves what the aggregator remembers as an attribute of the optimizer, in ``.keras`` and
``.weights.h5`` files; TensorFlow does in checkpoints and SavedModels. Only Keras' older ``.h5`` has
no place for attributes, so ``model.save`` adds one after Keras is done. Where this package is
absent none of it is looked at, and the files load as if written without it.
"""

from __future__ import annotations

import functools
import io
import os
import warnings
import weakref
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .binding import Binding, StateHolder, binding_of, distributed_part, mark_saved

__all__ = ["keep_distributed", "keep_distributed_within", "load_model", "save_state_in_h5", "watch_steps"]

Wrap = Callable[[Any, Binding], Any]

#: Where the configuration of an optimizer says that it was distributed. Keras looks at no such key.
_KEY = "adacons_hvd"


class _Mark(str):
    """In a file no more than this text; in the process that made it, it knows the arguments to distribute with."""

    binding: Binding | None = None

    def __new__(cls, binding: Binding) -> _Mark:
        mark = super().__new__(cls, "This optimizer was distributed: load its model with load_model of adacons_hvd.")
        mark.binding = binding
        return mark


def watch_steps(keras: Any) -> None:
    """Have models with a distributed optimizer train without ``jit_compile``, and raise errors as what they are."""
    cls = _defining(keras.Model, "make_train_function")
    original = cls.make_train_function
    # The bindings for which models made their steps: a step that was traced keeps the optimizer it was traced with.
    made_for: weakref.WeakKeyDictionary[Any, weakref.ref[Binding]] = weakref.WeakKeyDictionary()

    @functools.wraps(original)
    def make_train_function(self: Any, force: bool = False) -> Any:
        binding = binding_of(getattr(self, "optimizer", None))
        if binding is None:
            made_for.pop(self, None)
            return original(self, force)
        if self.jit_compile:
            self.jit_compile = False
            warnings.warn(
                "a training step in which ranks exchange gradients cannot be compiled as a whole, so this model trains "
                "with jit_compile=False",
                stacklevel=2,
            )
        known = made_for.get(self)
        force = force or known is None or known() is not binding
        made_for[self] = weakref.ref(binding)
        result = original(self, force)
        if not isinstance(self.train_function, _Step):
            self.train_function = _Step(self.train_function, binding.backend)
        return result if result is None else self.train_function

    cls.make_train_function = make_train_function


class _Step:
    """A model's training function, which raises what a graph has found wrong as the error that it is."""

    def __init__(self, function: Callable[..., Any], backend: Any) -> None:
        self._function = function
        self._backend = backend

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._function(*args, **kwargs)
        except Exception as error:
            found = self._backend.decoded(error)
            if found is None:
                raise
            raise found from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._function, name)


def keep_distributed(keras: Any, wrap: Wrap) -> None:
    """Have models that are compiled from the configuration of others keep it that the optimizer was distributed."""
    cls = _defining(keras.Model, "compile_from_config")
    get_original, compile_original = cls.get_compile_config, cls.compile_from_config

    @functools.wraps(get_original)
    def get_compile_config(self: Any) -> Any:
        config = get_original(self)
        if isinstance(config, dict):
            _mark(config.get("optimizer"), getattr(self, "optimizer", None))
        return config

    @functools.wraps(compile_original)
    def compile_from_config(self: Any, config: Any) -> Any:
        mark = _mark_of(config.get("optimizer")) if isinstance(config, dict) else None
        result = compile_original(self, config)
        optimizer = getattr(self, "optimizer", None)
        if mark is not None and optimizer is not None:
            _heed(mark, optimizer, wrap)
        return result

    cls.get_compile_config = get_compile_config
    cls.compile_from_config = compile_from_config


def keep_distributed_within(cls: Any, wrap: Wrap) -> None:
    """Do the same for a class of optimizers that keep another one in theirs: ``LossScaleOptimizer``."""
    get_original, from_original = cls.get_config, cls.from_config.__func__

    @functools.wraps(get_original)
    def get_config(self: Any) -> Any:
        config = get_original(self)
        _mark(config.get("inner_optimizer"), self.inner_optimizer)
        return config

    @functools.wraps(from_original)
    def from_config(cls: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
        mark = _mark_of(config.get("inner_optimizer"))
        optimizer = from_original(cls, config, *args, **kwargs)
        if mark is not None:
            _heed(mark, optimizer, wrap)
        return optimizer

    cls.get_config = get_config
    cls.from_config = classmethod(from_config)


def _mark(config: Any, optimizer: Any) -> None:
    binding = binding_of(optimizer)
    if binding is not None and isinstance(config, dict):
        config[_KEY] = _Mark(binding)


def _mark_of(config: Any) -> str | None:
    return config.get(_KEY) if isinstance(config, dict) else None


def _heed(mark: str, optimizer: Any, wrap: Wrap) -> None:
    """Distribute an optimizer again as it was before, or note that it was."""
    binding = getattr(mark, "binding", None)
    if distributed_part(optimizer) is not None:
        return
    if binding is not None:
        wrap(optimizer, binding.again())
    else:
        mark_saved(getattr(optimizer, "inner_optimizer", None) or optimizer)


def _defining(cls: Any, name: str) -> Any:
    """The class that Keras itself defines a model's method in."""
    return next(base for base in cls.__mro__ if name in vars(base))


# --- saving and loading ---------------------------------------------------------------------------

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
    """The memory that :meth:`StateHolder.save_own_variables` wrote, wherever in the file."""
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
