"""All of ``horovod.tensorflow.elastic``, with what Keras 3 and tapes need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from horovod.common.exceptions import HorovodInternalError
from horovod.tensorflow import elastic as horovods
from horovod.tensorflow.elastic import ObjectState

from ..engine.elastic import make_run, make_state
from . import sharing

__all__ = ["HorovodInternalError", "ObjectState", "TensorFlowKerasState", "TensorFlowState", "run"]  # noqa: F822

run = make_run(sharing)
_State: Any = make_state(sharing)


class TensorFlowState(_State):  # type: ignore[misc]
    """Variables and what tapes remember, to be committed, restored and shared.

    Horovod's own shares nothing in TensorFlow 2 but when it is made, which a worker that joins
    does alone. With a session of TensorFlow 1, where there are no aggregators, this is Horovod's.

    Args:
        variables: the variables, those of the optimizer, too.
        session: of TensorFlow 1.
        kwargs: further values to share, which become attributes.
    """

    def __new__(cls, variables: Sequence[Any] | None = None, session: Any = None, **kwargs: Any) -> Any:
        if session is not None or not tf.executing_eagerly():
            return horovods.TensorFlowState(variables, session, **kwargs)
        return super().__new__(cls)

    def __init__(self, variables: Sequence[Any] | None = None, session: Any = None, **kwargs: Any) -> None:
        if variables is None:
            raise ValueError("TensorFlow 2 has no list of all variables; pass those to keep, of the optimizer, too")
        self.variables = list(variables)
        super().__init__(**kwargs)

    def _kept_variables(self) -> list[Any]:
        return self.variables


def __getattr__(name: str) -> object:
    # Keras is above this, and not everyone needs it.
    if name == "TensorFlowKerasState":
        from .keras.elastic import TensorFlowKerasState

        return TensorFlowKerasState
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
