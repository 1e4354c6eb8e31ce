"""Which framework Keras computes with, and what the Keras binding needs of it.

Keras 3 runs on TensorFlow, through ``horovod.tensorflow``, or on PyTorch, through
``horovod.torch``; Keras 2 is the package ``tf_keras``, on TensorFlow. Only the one in use is
imported.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..engine.elastic import Library
from ..engine.settings import Parameters, Settings
from ..report import Report

__all__ = ["Backend", "Exchange", "backend_of", "keras_backend", "require_tensorflow", "uses_keras_2"]


class Exchange(Protocol):
    """Turns one optimizer's gradients into those of all workers."""

    @property
    def report(self) -> Report | None:
        """The report on the last step, or None."""
        ...

    def reduce(self, gradients: Sequence[Any], variables: Sequence[Any], unscale: Any = 1.0) -> list[Any]: ...

    def everywhere(self, condition: Any) -> Any:
        """Whether a condition holds on every worker."""
        ...

    def accumulate(
        self,
        gradients: Sequence[Any],
        variables: Sequence[Any],
        passes: int,
        apply: Callable[[list[Any]], Any],
        skip: Callable[[], Any],
    ) -> None:
        """Add gradients up; call ``apply`` with their sums every ``passes`` times, else ``skip``."""
        ...

    def stray(self, how: str, variables: Sequence[Any]) -> None:
        """Tell the other ranks of a step along gradients that were never aggregated, and raise the error on all."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def gather_history(self) -> None:
        """Hold the mean gradients of earlier steps of all ranks, until the next step. All ranks call this together."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def reset(self) -> None: ...


class Backend(Library, Protocol):
    """A module: ``tensorflow_backend`` or ``torch_backend``."""

    #: ``"tensorflow"`` or ``"torch"``.
    NAME: str
    #: How variables are told from other things, and from each other.
    VARIABLES: Parameters
    #: The base of an aggregator's memory, as something that the framework's checkpoints save.
    StateBase: type

    def checked_settings(self, **given: Any) -> Settings:
        """The settings, or an error that names the argument and the value."""
        ...

    def make_exchange(self, settings: Settings) -> Exchange: ...

    def untraced(self, function: Any) -> Any:
        """The function, which the framework's compiler leaves as it is."""
        ...

    def decoded(self, error: Exception) -> Exception | None:
        """The error of ours that the framework has raised as one of its own, if it is that."""
        ...

    def is_aggregated_elsewhere(self, variables: Sequence[Any]) -> bool:
        """Whether something that is no optimizer of Keras aggregates the gradients of these variables."""
        ...

    def key_of(self, variable: Any) -> Hashable:
        """The key of a variable, which identifies it."""
        ...

    def native(self, variable: Any) -> Any:
        """The object that lives as long as the variable does."""
        ...

    def local_gradient(self, gradient: Any, process_set: Any, scale: bool) -> Any:
        """A local variable's gradient, made as long as its share of an average would be if ``scale`` says so."""
        ...

    def average(self, values: Sequence[float]) -> list[float]:
        """The mean over all workers."""
        ...


def keras_backend() -> str:
    """The name of Keras 3's backend, or an error that says why it cannot be used.

    Keras is not imported for that: where JAX is missing, its import would fail for a lesser reason.
    """
    name = _configured_backend()
    if name not in ("tensorflow", "torch"):
        raise RuntimeError(
            f"Keras runs on {name}, which Horovod does not support. Set KERAS_BACKEND=tensorflow or "
            "KERAS_BACKEND=torch before Keras is imported."
        )
    return name


def uses_keras_2() -> bool:
    """Whether ``tf.keras`` is Keras 2, the package ``tf_keras``."""
    return os.environ.get("TF_USE_LEGACY_KERAS", "").lower() in ("1", "true")


def require_tensorflow() -> None:
    """Raise an error unless ``tf.keras`` can be used."""
    if not uses_keras_2() and keras_backend() != "tensorflow":
        raise RuntimeError(
            f"Keras runs on {keras_backend()}, so this module is of no use. Import adacons_hvd.keras, which follows "
            "Keras' backend, or set KERAS_BACKEND=tensorflow before Keras is imported."
        )


def _configured_backend() -> str:
    """The backend that Keras uses or would use; it is looked for in the same places in the same order."""
    if "keras" in sys.modules:
        name: str = sys.modules["keras"].config.backend()
        return name
    if os.environ.get("KERAS_BACKEND"):
        return os.environ["KERAS_BACKEND"]
    home = Path.home() if os.access(Path.home(), os.W_OK) else Path("/tmp")
    folder = Path(os.environ.get("KERAS_HOME") or home / ".keras").expanduser()
    try:
        return str(json.loads((folder / "keras.json").read_text(encoding="utf-8"))["backend"])
    except (OSError, ValueError, KeyError):
        return "tensorflow"


def backend_of(name: str) -> Backend:
    """The module for a backend's name."""
    module: Any = importlib.import_module(f"{__package__}.{name}_backend")
    backend: Backend = module
    return backend


if TYPE_CHECKING:
    from . import tensorflow_backend, torch_backend

    _first: Backend = tensorflow_backend
    _second: Backend = torch_backend
