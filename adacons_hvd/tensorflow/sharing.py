"""The values of TensorFlow's variables, and other things, shared between ranks; for callbacks and elastic jobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import horovod.tensorflow as hvd
import tensorflow as tf

from ..ops.tensorflow_graphs import make_graph
from .reducer import start_over
from .tape import TapeState
from .variables import native

__all__ = [
    "COLLECTIVE_ERRORS",
    "OTHER_MEMORIES",
    "assign",
    "average",
    "broadcast_object",
    "broadcast_variables",
    "copy_of",
    "hvd",
    "start_over",
]

# What these are for, `Library` of `adacons_hvd.engine.elastic` says.

COLLECTIVE_ERRORS: tuple[type[Exception], ...] = (
    tf.errors.UnknownError,
    tf.errors.FailedPreconditionError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.InternalError,
)

OTHER_MEMORIES: Sequence[Any] = (TapeState(),)


def broadcast_variables(variables: Sequence[Any], root_rank: int, process_set: Any = hvd.global_process_set) -> None:
    """Give every worker the values of ``root_rank``.

    Horovod's own goes by names, which Keras may have numbered otherwise on another rank.
    """
    natives = [native(variable) for variable in variables]

    def exchange() -> None:
        for i, variable in enumerate(natives):
            name = f"adacons.broadcast.{i}"
            variable.assign(
                hvd.broadcast(variable, root_rank, name=name, ignore_name_scope=True, process_set=process_set)
            )

    make_graph(exchange)()


def average(values: Sequence[float]) -> list[float]:
    """The mean over all workers."""
    mean = hvd.allreduce(tf.constant(list(values), tf.float64), op=hvd.Average, name="adacons.metrics")
    result: list[float] = mean.numpy().tolist()
    return result


def broadcast_object(value: Any, root_rank: int, name: str) -> Any:
    return hvd.broadcast_object(value, root_rank, name=name)


def copy_of(variable: Any) -> Any:
    return tf.identity(native(variable))


def assign(variable: Any, value: Any) -> None:
    native(variable).assign(value)
