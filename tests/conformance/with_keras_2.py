"""Optimizers of Keras 2 (``tf_keras``) have the guards of every binding.

They take no cases: `tests/keras` holds them against the oracle and saves them, beside those of Keras 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import of_keras
import tensorflow as tf
import tf_keras as keras
from guards import Stray
from of_keras import ANOTHER, AROUND, recompiled

import adacons_hvd.tensorflow.keras as hvd
from adacons_hvd.tensorflow import join

ARGUMENTS = of_keras.ARGUMENTS
FP16 = hvd.Compression.fp16


class Training(of_keras.Training):
    """A training with these options, which are told of the variables."""

    keras, hvd = keras, hvd
    tensor, join = staticmethod(tf.constant), staticmethod(join)

    @staticmethod
    def variable(value: np.ndarray, name: str) -> Any:
        return tf.Variable(value, name=name)

    def pairs(self, number: int) -> Iterator[tuple[Any, Any]]:
        return zip(*self.given(number), strict=True)


SGD, NOT_AGAIN = keras.optimizers.SGD, {"skip_gradients_aggregation": True}
STRAYS = {
    # As something kept it from before the optimizer was distributed.
    "step of the class": Stray(lambda t, n: SGD.apply_gradients(t.optimizer, t.pairs(n), **NOT_AGAIN), AROUND),
    # The part of a step that comes after the aggregation.
    "inner step": Stray(lambda t, n: t.optimizer._internal_apply_gradients(list(t.pairs(n))), AROUND),
    "plain optimizer": Stray(lambda t, n: keras.optimizers.Adam(0.1).apply_gradients(t.pairs(n)), ANOTHER),
    "recompiled": Stray(recompiled, ANOTHER),
    # It takes its steps in another way.
    "older optimizer": Stray(lambda t, n: keras.optimizers.legacy.Adam(0.1).apply_gradients(t.pairs(n)), ANOTHER),
    "told not to aggregate": Stray(
        lambda t, n: t.optimizer.apply_gradients(t.pairs(n), **NOT_AGAIN),
        "apply_gradients() was told not to aggregate gradients, and nothing else had",
    ),
}
TELLS_HOW = False
COMPARES_AVERAGED = OUTLIVES_A_RANK = True
FOUND = 1
OUT_OF_DATA_IS_TOLD = False
