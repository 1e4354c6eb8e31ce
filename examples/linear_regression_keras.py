"""Stochastic linear regression (section 4.1 of the paper), with Keras.

    horovodrun --gloo -np 2 python examples/linear_regression_keras.py

`linear_regression.py` is the same with PyTorch, and says what is done.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from common import Run, make_aggregator, make_parser, parse

import adacons_hvd.tensorflow
import adacons_hvd.tensorflow.keras as hvd_keras
from adacons_hvd import Mean
from adacons_hvd.logging import keras_callback

# Horovod comes without types.
hvd: Any = adacons_hvd.tensorflow

FULL = {"steps": 1000}


def hessian_times(v: Any) -> Any:
    """E[z z'] v. The entries of z are independent with mean 1/2 and variance 1/12."""
    return v / 12 + keras.ops.sum(v) / 4


class BestStep(keras.optimizers.Optimizer):
    """Descends by a multiple, the learning rate, of the best step along the direction it is given."""

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        slope = keras.ops.sum(gradient * hessian_times(variable))
        curvature = keras.ops.sum(gradient * hessian_times(gradient))
        self.assign_sub(variable, learning_rate * slope / curvature * gradient)


class Progress(keras.callbacks.Callback):
    """Tells the run of the loss after every step."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        w = self.model.trainable_variables[0]
        self.run.step(keras.ops.sum(w * hessian_times(w)) / 2)


def main() -> None:
    parser = make_parser(__doc__, "linear_regression_keras")
    parser.set_defaults(batch_size=128, learning_rate=1.0)
    parser.add_argument("--dimension", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=300)
    args = parse(parser, **FULL)

    hvd.init()
    keras.utils.set_random_seed(args.seed)
    normal = keras.initializers.RandomNormal(stddev=1.0, seed=args.seed)
    dense = keras.layers.Dense(1, use_bias=False, kernel_initializer=normal)
    model = keras.Sequential([keras.Input((args.dimension,)), dense])
    optimizer = BestStep(args.learning_rate)
    optimizer = hvd_keras.DistributedOptimizer(optimizer, aggregator=make_aggregator(args, Mean()))
    model.compile(optimizer, loss=lambda y, prediction: keras.ops.square(prediction) / 2)

    def draw() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        rng = np.random.default_rng((args.seed, hvd.rank()))
        while True:
            yield rng.random((args.batch_size, args.dimension), np.float32), np.zeros((args.batch_size, 1), np.float32)

    run = Run(args, hvd, args.steps)
    callbacks = [hvd_keras.callbacks.BroadcastGlobalVariablesCallback(0), Progress(run), keras_callback(run.reports)]
    model.fit(draw(), steps_per_epoch=args.steps, verbose=0, callbacks=callbacks)
    run.finish(model.get_weights())


if __name__ == "__main__":
    main()
