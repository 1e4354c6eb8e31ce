"""The networks of :mod:`benchmarks.models` in Keras: ``make(name)`` gives a model, its loss and a batch."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import layers

# A model, its loss, inputs and labels.
Made = tuple[keras.Model, Any, Any, np.ndarray]


def make(name: str, rank: int) -> Made:
    keras.utils.set_random_seed(0)
    build = {"cnn": _cnn, "resnet-50": _resnet, "transformer": _transformer, "recommender": _recommender}[name]
    return build(np.random.default_rng(rank))


def _of_classes() -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def _cnn(draw: np.random.Generator) -> Made:
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(2),
            layers.Conv2D(64, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(10),
        ]
    )
    return model, _of_classes(), draw.standard_normal((32, 28, 28, 1), np.float32), draw.integers(10, size=32)


def _resnet(draw: np.random.Generator) -> Made:
    model = keras.applications.ResNet50(weights=None, classifier_activation=None)
    return model, _of_classes(), draw.standard_normal((4, 224, 224, 3), np.float32), draw.integers(1000, size=4)


def _transformer(draw: np.random.Generator) -> Made:
    words, width, heads = 4096, 320, 8
    text = keras.Input((64,), dtype="int32")
    x = layers.Embedding(words, width)(text)
    for _ in range(6):
        attended = layers.MultiHeadAttention(heads, width // heads)(x, x)
        x = layers.LayerNormalization()(x + attended)
        inside = layers.Dense(4 * width, activation="relu")(x)
        x = layers.LayerNormalization()(x + layers.Dense(width)(inside))
    model = keras.Model(text, layers.Dense(words)(x))
    drawn = draw.integers(words, size=(8, 65))
    return model, _of_classes(), drawn[:, :-1], drawn[:, 1:]


def _recommender(draw: np.random.Generator) -> Made:
    dense, sparse = keras.Input((13,)), keras.Input((8,), dtype="int32")
    looked_up = [layers.Embedding(100_000, 16)(sparse[:, column]) for column in range(8)]
    x = layers.Concatenate()([dense, *looked_up])
    for width in (256, 64):
        x = layers.Dense(width, activation="relu")(x)
    model = keras.Model([dense, sparse], layers.Dense(1)(x))
    batch = [draw.standard_normal((512, 13), np.float32), draw.integers(100_000, size=(512, 8))]
    return model, keras.losses.BinaryCrossentropy(from_logits=True), batch, draw.integers(2, size=(512, 1))
