"""Aggregators' memories in TensorFlow's checkpoints."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import tensorflow as tf

__all__ = ["StateBase", "state_in_checkpoint"]


class StateBase(tf.train.experimental.PythonState):
    """An aggregator's memory, as ``tf.train.Checkpoint`` saves and restores it.

    As one string, since there are no variables for it before the first step, and other ones for
    another number of workers.
    """

    #: Has ``state_dict`` and ``load_state_dict``.
    _exchange: Any

    def serialize(self) -> bytes:
        file = io.BytesIO()
        # A SavedModel is written in a graph, where variables have no value.
        with tf.__internal__.eager_context.eager_mode():
            np.savez(file, **self._exchange.state_dict())
        return file.getvalue()

    def deserialize(self, string_value: bytes) -> None:
        with tf.__internal__.eager_context.eager_mode():
            self._exchange.load_state_dict(_unpacked(string_value))


def _unpacked(string_value: bytes) -> dict[str, Any]:
    with np.load(io.BytesIO(string_value)) as arrays:
        return dict(arrays)


def state_in_checkpoint(prefix: Any, name: str) -> dict[str, Any]:
    """The memory that :class:`StateBase` wrote into a checkpoint, as an attribute of that name."""
    reader = tf.train.load_checkpoint(str(prefix))
    for key in reader.get_variable_to_shape_map():
        if name in key.split("/"):
            return _unpacked(reader.get_tensor(key))
    return {}
