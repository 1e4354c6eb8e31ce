"""An elastic job of Keras by ``model.fit``, on either back end, whose course is the plan's. Run by the launcher.

Two batches make a step, and the loss is scaled: both are matters that all workers must begin alike.
"""

import hashlib
import os
import time

import keras
import numpy as np
from harness.elastic import Course, tell

import adacons_hvd.keras as hvd
from adacons_hvd import AdaCons

hvd.init()
keras.utils.set_random_seed(os.getpid())  # nobody begins with what the others have
model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(5, "tanh"), keras.layers.Dense(1)])
optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01))
optimizer = hvd.DistributedOptimizer(
    optimizer, aggregator=AdaCons(momentum=0.9), schedule="one-pass", backward_passes_per_step=2
)
model.compile(optimizer, loss="mse")
part = optimizer.inner_optimizer


def bits():
    variables = [keras.ops.convert_to_numpy(v) for v in (*model.variables, *optimizer.variables)]
    remembered = map(np.asarray, part._adacons.exchange.state_dict().values())
    return hashlib.sha256(b"".join(v.tobytes() for v in (*variables, *remembered))).hexdigest()


def batches(step):
    while True:
        rng = np.random.default_rng(100 * step + hvd.rank())
        x = rng.standard_normal((16, 6)).astype("float32")
        y = x.sum(1, keepdims=True) + rng.standard_normal((16, 1)).astype("float32")
        yield x[:8], y[:8]
        yield x[8:], y[8:]
        step += 1


course = Course(hvd, bits)


class Watch(keras.callbacks.Callback):
    """What the other jobs' loops do; `CommitStateCallback` commits after every second step."""

    def on_train_batch_begin(self, batch, logs=None):
        if batch % 2 == 0:
            course.begin()
        else:
            course.reached("backward", together=True)

    def on_train_batch_end(self, batch, logs=None):
        if batch % 2 == 0:
            return
        report = part.report
        curve = part._adacons.exchange.state_dict()["curve"][0].tolist()
        course.end(steps=report.steps, first=report.coefficients["first-order"][0], curve=curve)
        model.stop_training = course.over
        time.sleep(0.05)


@hvd.elastic.run
def train(state):
    course.enter(state, hvd.size())
    callbacks = [Watch(), hvd.elastic.CommitStateCallback(state, batches_per_commit=4)]
    model.fit(batches(state.step), steps_per_epoch=10_000, verbose=0, callbacks=callbacks)


train(hvd.elastic.KerasState(model, **Course.FIELDS))
tell(end=True)
