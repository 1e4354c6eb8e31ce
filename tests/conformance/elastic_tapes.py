"""An elastic job of TensorFlow with tapes, whose course is the plan's. Run by the launcher.

As in Horovod's own example, the function that takes a step is made once, whoever is there.
"""

import hashlib
import os
import time

import numpy as np
import tensorflow as tf
from harness.elastic import Course, tell

import adacons_hvd.tensorflow as hvd
from adacons_hvd import AdaCons, Curvature

hvd.init()
tf.keras.utils.set_random_seed(os.getpid())  # nobody begins with what the others have
x, rows = tf.keras.Input((4,)), tf.keras.Input((2,), dtype="int64")
# The gradient of an embedding has few rows.
embedded = tf.keras.layers.Flatten()(tf.keras.layers.Embedding(8, 3)(rows))
model = tf.keras.Model([x, rows], tf.keras.layers.Dense(1)(tf.keras.layers.Concatenate()([x, embedded])))
optimizer = tf.keras.optimizers.SGD(0.02, momentum=0.9)
optimizer.build(model.trainable_variables)


def variables():
    return [*model.variables, *optimizer.variables]


def bits():
    return hashlib.sha256(b"".join(v.numpy().tobytes() for v in variables())).hexdigest()


def flat(gradients):
    return np.concatenate([tf.convert_to_tensor(g).numpy().ravel() for g in gradients]).tolist()


course = Course(hvd, bits)
# With Keras' state momentum is kept, and with the other one a history, which is spread over the workers.
of_keras = course.plan["state"] == "keras"
options = {"aggregator": AdaCons(momentum=0.9)} if of_keras else {"aggregator": Curvature(4), "sparse_as_dense": True}

wrapped = []


@tf.function
def step(x, rows, y):
    with tf.GradientTape(persistent=True) as tape:
        loss = tf.reduce_mean(tf.square(model([x, rows]) - y))
    own = tape.gradient(loss, model.trainable_variables)
    tape = hvd.DistributedGradientTape(tape, schedule="one-pass", **options)
    wrapped[:] = [tape]
    found = tape.gradient(loss, model.trainable_variables)
    optimizer.apply_gradients(zip(found, model.trainable_variables, strict=True))
    return own, found


@hvd.elastic.run
def train(state):
    course.enter(state, hvd.allgather_object(os.getpid(), name="workers"))
    while not course.over:
        rng = np.random.default_rng(100 * state.step + hvd.rank())
        x = rng.standard_normal((8, 4)).astype("float32")
        y = x.sum(1, keepdims=True) + rng.standard_normal((8, 1)).astype("float32")
        course.reached("backward", together=True)
        own, found = step(tf.constant(x), tf.constant(rng.integers(8, size=(8, 2))), tf.constant(y))
        course.begin(raw=[flat(own)])
        if course.end(found=[flat(found)], steps=wrapped[0].report.steps):
            state.commit()
        time.sleep(0.05)


if of_keras:
    train(hvd.elastic.TensorFlowKerasState(model, optimizer, **Course.FIELDS))
else:
    train(hvd.elastic.TensorFlowState(variables(), **Course.FIELDS))
tell(end=True)
