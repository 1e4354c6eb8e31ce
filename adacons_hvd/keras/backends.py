"""Which framework Keras computes with, and what the Keras binding needs of it.

Keras 3 runs on TensorFlow, through ``horovod.tensorflow``, or on PyTorch, through
``horovod.torch``; Keras 2 is the package ``tf_keras``, on TensorFlow. Only the one in use is
imported.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

__all__ = ["Backend", "Exchange", "backend_of", "keras_backend"]


class Exchange(Protocol):
    """What turns one optimizer's gradients into those of all workers."""

    report: Any

    def reduce(self, gradients: Sequence[Any], variables: Sequence[Any], unscale: Any = 1.0) -> list[Any]: ...

    def everywhere(self, condition: Any) -> Any:
        """Whether a condition holds on every worker."""
        ...

    def accumulate(
        self, gradients: Sequence[Any], variables: Sequence[Any], passes: int, apply: Any, skip: Any
    ) -> None:
        """Add gradients up; call ``apply`` with their sums every ``passes`` times, else ``skip``."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def reset(self) -> None: ...


class Backend(Protocol):
    """A module: ``tensorflow_backend`` or ``torch_backend``."""

    hvd: Any

    def make_exchange(self, settings: Any) -> Exchange: ...


def keras_backend() -> str:
    """The name of Keras 3's backend, or an error that says why it cannot be used."""
    import keras

    name: str = keras.backend.backend()
    if name not in ("tensorflow", "torch"):
        raise RuntimeError(
            f"Keras runs on {name}, which Horovod does not support. Set KERAS_BACKEND=tensorflow or "
            "KERAS_BACKEND=torch before Keras is imported."
        )
    return name


def backend_of(name: str) -> Any:
    """The module for a backend's name."""
    return importlib.import_module(f"{__package__}.{name}_backend")
