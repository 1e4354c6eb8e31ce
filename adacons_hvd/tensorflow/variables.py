"""How TensorFlow's variables, and those that Keras 3 makes of them, are told from other things and from each other."""

from __future__ import annotations

import sys
from collections.abc import Hashable
from typing import Any

import tensorflow as tf

from ..engine.settings import Parameters

__all__ = ["VARIABLES", "is_trainable", "is_variable", "key_of", "native"]


def native(variable: Any) -> Any:
    """TensorFlow's variable, where Keras 3 gave one of its own."""
    value = getattr(variable, "value", None)
    return value if isinstance(value, tf.Variable) else variable


def is_variable(thing: Any) -> bool:
    """Whether this is a variable, of TensorFlow or of Keras 3."""
    return isinstance(native(thing), tf.Variable)


def key_of(variable: Any, position: int = 0) -> Hashable:
    """The key of a variable; a mere tensor is known by its position."""
    variable = native(variable)
    return variable._unique_id if isinstance(variable, tf.Variable) else ("tensor", position)


def is_trainable(variable: Any) -> bool:
    """Whether a variable is there and surely meant to be trained."""
    if variable is None or not variable.trainable:
        return False
    # Keras 2 freezes a layer without a word to the layer's variables.
    return not ("tf_keras" in sys.modules and variable is native(variable))


VARIABLES = Parameters(is_variable, key_of)
