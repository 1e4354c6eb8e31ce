"""An elastic job of Keras: a worker comes and dies, another leaves, and nothing that was committed is lost."""

from __future__ import annotations

import numpy as np
import pytest
from elastic_training import check_commits, resampled
from keras_job import ON_TORCH

# Two batches make a step, and the loss is scaled: both are matters that all workers must begin alike.
SCRIPT = """
import hashlib, os, signal
import keras
import numpy as np
import adacons_hvd.keras as hvd
from adacons_hvd import AdaCons
from harness.elastic import tell

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
    variables = [*model.variables, *optimizer.variables]
    return hashlib.sha256(b"".join(keras.ops.convert_to_numpy(v).tobytes() for v in variables)).hexdigest()

def batches(step):
    while True:
        rng = np.random.default_rng(100 * step + hvd.rank())
        x = rng.standard_normal((16, 6)).astype("float32")
        y = x.sum(1, keepdims=True) + rng.standard_normal((16, 1)).astype("float32")
        yield x[:8], y[:8]
        yield x[8:], y[8:]
        step += 1

class Watch(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        if [hvd.size(), hvd.rank(), state.count, batch % 2] == [3, 2, 5, 1]:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_end(self, batch, logs=None):
        if batch % 2 == 0:
            return
        state.step += 1
        state.count += 1
        tell(
            step=state.step,
            count=state.count,
            size=hvd.size(),
            bits=bits(),
            steps=part.report.steps,
            first=part.report.coefficients["first-order"][0],
            curve=part._adacons.exchange.state_dict()["curve"][0].tolist(),
        )
        if batch % 4 == 3:
            tell(committing=state.step, bits=bits())
        model.stop_training = [state.sizes, state.count] == [[2, 3, 2, 1], 4] or state.step == 2000

@hvd.elastic.run
def train(state):
    tell(enter=state.step, size=hvd.size(), bits=bits())
    if state.sizes[-1:] != [hvd.size()]:
        state.sizes, state.count = [*state.sizes, hvd.size()], 0
    callbacks = [Watch(), hvd.elastic.CommitStateCallback(state, batches_per_commit=4)]
    model.fit(batches(state.step), steps_per_epoch=10_000, verbose=0, callbacks=callbacks)

state = hvd.elastic.KerasState(model, step=0, count=0, sizes=[])
train(state)
tell(done=True)
"""


@pytest.mark.ranks(launcher="gloo", pool="tensorflow")
def test_workers_come_die_and_go(cluster, tmp_path):
    workers_come_die_and_go(cluster, tmp_path)


@pytest.mark.ranks(launcher="gloo", **ON_TORCH)
def test_workers_come_die_and_go_on_torch(cluster, tmp_path):
    workers_come_die_and_go(cluster, tmp_path)


def workers_come_die_and_go(cluster, tmp_path):
    hosts = {"localhost": 2}
    with cluster.elastic(SCRIPT, tmp_path, hosts=hosts) as job:
        for stage, changed in ((0, {"localhost": 2, "127.0.0.1": 1}), (2, {"localhost": 1})):
            job.wait_until(lambda told: any(f["count"] == 4 for f in stages_of(told).get(stage, [])), 240)  # noqa: B023
            job.hosts = changed
        result = job.result(240)
    assert result.exit_code == 0, result
    assert sum("done" in fact for fact in result.told) == 1
    check_commits(result.told)
    stages = stages_of(result.told)
    assert [facts[0]["size"] for facts in stages.values()] == [2, 3, 2, 1]
    assert stages[1][-1]["step"] == stages[2][0]["step"], "the step after the last commit is taken again"
    curves = {}
    for facts in stages.values():
        size = facts[0]["size"]
        for step in sorted({fact["step"] for fact in facts}):
            same = [fact for fact in facts if fact["step"] == step]
            assert len(same) == size
            assert len({fact["bits"] for fact in same}) == 1, f"weights differ after step {step}"
            assert {fact["steps"] for fact in same} == {step}
            assert all(fact["curve"] == same[0]["curve"] for fact in same)
            if step > 1:
                expected = 0.9 * np.array(resampled(curves[step - 1], size)) + 0.1 * np.sort(same[0]["first"])
                np.testing.assert_allclose(same[0]["curve"], expected, rtol=1e-9)
            curves[step] = same[0]["curve"]


def stages_of(told):
    """The steps that were told, by the number of changes of the workers before."""
    stages = {}
    for fact in told:
        if "step" in fact:
            last = max(stages, default=-1)
            new = not stages or stages[last][0]["size"] != fact["size"]
            stages.setdefault(last + new, []).append(fact)
    return stages
