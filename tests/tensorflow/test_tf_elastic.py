"""An elastic job of TensorFlow with tapes: a worker comes, another dies, and nothing that was committed is lost."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from elastic_training import check_commits, resampled

# As in Horovod's own example, the function that takes a step is made once, whoever is there.
SCRIPT = """
import hashlib, os, signal, sys, time
import numpy as np
import tensorflow as tf
import adacons_hvd.tensorflow as hvd
from adacons_hvd import AdaCons, Curvature
from harness.elastic import tell

hvd.init()
tf.keras.utils.set_random_seed(os.getpid())  # nobody begins with what the others have
x, rows = tf.keras.Input((4,)), tf.keras.Input((2,), dtype="int64")
# The gradient of an embedding has few rows.
embedded = tf.keras.layers.Flatten()(tf.keras.layers.Embedding(8, 3)(rows))
model = tf.keras.Model([x, rows], tf.keras.layers.Dense(1)(tf.keras.layers.Concatenate()([x, embedded])))
optimizer = tf.keras.optimizers.SGD(0.02, momentum=0.9)

@tf.function
def step(x, rows, y):
    with tf.GradientTape(persistent=True) as tape:
        loss = tf.reduce_mean(tf.square(model([x, rows]) - y))
    own = tape.gradient(loss, model.trainable_variables)
    # With Keras' state momentum is kept, and with the other one a history, which is spread over the workers.
    aggregator = AdaCons(momentum=0.9) if sys.argv[1] == "keras" else Curvature(memory=4)
    tape = hvd.DistributedGradientTape(
        tape, aggregator=aggregator, schedule="one-pass", sparse_as_dense=aggregator.history > 0
    )
    found = tape.gradient(loss, model.trainable_variables)
    optimizer.apply_gradients(zip(found, model.trainable_variables))
    return own, found

def flat(gradients):
    return np.concatenate([tf.convert_to_tensor(g).numpy().ravel() for g in gradients]).tolist()

def variables():
    return [*model.variables, *optimizer.variables]

def bits():
    return hashlib.sha256(b"".join(v.numpy().tobytes() for v in variables())).hexdigest()

@hvd.elastic.run
def train(state):
    tell(enter=state.step, bits=bits())
    if state.sizes[-1:] != [hvd.size()]:
        state.sizes, state.count = [*state.sizes, hvd.size()], 0
    while [state.sizes, state.count] != [[2, 3, 2], 6] and state.step < 300:
        rng = np.random.default_rng(100 * state.step + hvd.rank())
        x = rng.standard_normal((8, 4)).astype("float32")
        y = x.sum(1, keepdims=True) + rng.standard_normal((8, 1)).astype("float32")
        if [hvd.size(), state.count, hvd.rank()] == [3, 5, 2]:
            os.kill(os.getpid(), signal.SIGKILL)
        own, found = step(tf.constant(x), tf.constant(rng.integers(8, size=(8, 2))), tf.constant(y))
        state.step += 1
        state.count += 1
        place = dict(count=state.count, rank=hvd.rank(), size=hvd.size())
        tell(done=state.step, raw=flat(own), found=flat(found), bits=bits(), **place)
        if state.count % 2 == 0:
            tell(committing=state.step, bits=bits())
            state.commit()
        time.sleep(0.05)

optimizer.build(model.trainable_variables)
if sys.argv[1] == "keras":
    state = hvd.elastic.TensorFlowKerasState(model, optimizer, step=0, count=0, sizes=[])
else:
    state = hvd.elastic.TensorFlowState(variables(), step=0, count=0, sizes=[])
train(state)
tell(end=True)
"""


@pytest.mark.ranks(launcher="gloo", pool="tensorflow")
@pytest.mark.parametrize("kept", ["keras", "variables"])
def test_a_worker_comes_and_another_dies(cluster, tmp_path, kept):
    hosts = {"localhost": 2}
    with cluster.elastic(SCRIPT, tmp_path, hosts=hosts, args=[kept]) as job:
        job.wait_until(lambda told: any(f.get("size") == 2 and f.get("count") == 4 for f in told), 120)
        job.hosts = {**hosts, "127.0.0.1": 1}
        result = job.result(180)
    assert result.exit_code == 0, result
    assert sum("end" in fact for fact in result.told) == 2
    check_commits(result.told)
    stages = []
    for fact in result.told:
        if "done" in fact:
            if not stages or stages[-1][0] != fact["size"]:
                stages.append((fact["size"], {}))
            stages[-1][1].setdefault(fact["done"], []).append(fact)
    assert [size for size, _ in stages] == [2, 3, 2]
    assert max(stages[1][1]) == min(stages[2][1]), "the step after the last commit is taken again"
    memories = {0: None}
    for size, steps in stages:
        for step, facts in steps.items():
            memories[step] = judge(facts, memories[step - 1], size, kept == "keras")


def judge(facts, memory, size, by_momentum):
    """Hold one step of all workers against the oracle; returns what it remembers."""
    assert sorted(fact["rank"] for fact in facts) == list(range(size))
    assert len({fact["bits"] for fact in facts}) == 1
    if by_momentum:
        judge = oracle.Oracle(0.9)
        judge.m = None if memory is None else resampled(memory, size)
    else:
        judge = oracle.CurvatureOracle(memory=4)
        judge.means = list(memory or [])
    expected = judge([np.array(fact["raw"]) for fact in sorted(facts, key=lambda fact: fact["rank"])])
    assert oracle.error([np.array(facts[0]["found"])], [expected]) < 1e-5
    return judge.m if by_momentum else judge.means
