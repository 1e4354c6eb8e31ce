"""Models of either Keras that are trained by a distributed optimizer: how their steps are made, and how it is kept.

Keras asks a model for its training step in ``make_train_function``, whichever way it is trained; and for the
configuration from which another model is compiled, in ``get_compile_config``. Both work as ever for every model whose
optimizer is not distributed.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable
from typing import Any

from .binding import Binding, binding_of, distributed_part
from .guard import mark_saved

__all__ = ["keep_distributed", "keep_distributed_within", "watch_steps"]

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
