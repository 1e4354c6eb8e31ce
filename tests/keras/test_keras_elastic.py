"""An elastic job of Keras that grows and shrinks: training goes on, and so does the momentum."""

from __future__ import annotations

import numpy as np
import pytest
from harness.elastic import ElasticJob

SCRIPT = """
import hashlib, os
import keras
import numpy as np
import adacons_hvd.keras as hvd
from adacons_hvd import AdaCons
from harness.elastic import tell

hvd.init()
keras.utils.set_random_seed(os.getpid())  # nobody begins with what the others have
model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(5, "tanh"), keras.layers.Dense(1)])
optimizer = hvd.DistributedOptimizer(
    keras.optimizers.Adam(0.01), aggregator=AdaCons(momentum=0.9), schedule="one-pass"
)
model.compile(optimizer, loss="mse")
optimizer.build(model.trainable_variables)

def bits():
    return hashlib.sha256(b"".join(w.tobytes() for w in model.get_weights())).hexdigest()

@hvd.elastic.run
def train(state):
    tell(enter=state.step, size=hvd.size(), bits=bits())
    if state.sizes[-1:] != [hvd.size()]:
        state.sizes, state.count = [*state.sizes, hvd.size()], 0
    while [state.sizes, state.count] != [[2, 3, 1], 3] and state.step < 300:
        rng = np.random.default_rng(100 * state.step + hvd.rank())
        x = rng.standard_normal((8, 6)).astype("float32")
        y = x.sum(1, keepdims=True) + rng.standard_normal((8, 1)).astype("float32")
        model.fit(x, y, batch_size=8, verbose=0)
        state.step += 1
        state.count += 1
        tell(
            step=state.step,
            count=state.count,
            size=hvd.size(),
            bits=bits(),
            steps=optimizer.report.steps,
            first=optimizer.report.coefficients["first-order"][0],
            curve=optimizer._adacons.exchange.state_dict()["curve"][0].tolist(),
        )
        state.commit()

train(hvd.elastic.KerasState(model, step=0, count=0, sizes=[]))
tell(done=True)
"""


def resampled(curve: list[float], workers: int) -> np.ndarray:
    places = np.linspace(0, len(curve) - 1, workers) if workers > 1 else [0.0]
    return np.interp(places, range(len(curve)), curve)


@pytest.mark.parametrize("backend", ["tensorflow", "torch"])
def test_workers_come_and_go(tmp_path, backend):
    hosts = {"localhost": 2}
    with ElasticJob(SCRIPT, tmp_path, hosts=hosts, env={"KERAS_BACKEND": backend}) as job:
        for size, changed in ((2, {"localhost": 2, "127.0.0.1": 1}), (3, {"localhost": 1})):
            job.wait_until(lambda told: any(f.get("size") == size and f.get("count") == 3 for f in told), 240)  # noqa: B023
            job.hosts = changed
        result = job.result(240)
        told = job.told()
    assert result.exit_code == 0, result
    assert sum("done" in fact for fact in told) == 1
    steps: dict[int, list[dict]] = {}
    for fact in told:
        if "step" in fact:
            steps.setdefault(fact["step"], []).append(fact)
    assert sorted(steps) == list(range(1, len(steps) + 1))
    before = None
    for number, facts in sorted(steps.items()):
        size = facts[0]["size"]
        assert len(facts) == size
        assert len({fact["bits"] for fact in facts}) == 1, f"weights differ after step {number}"
        assert {fact["steps"] for fact in facts} == {number}
        assert all(fact["curve"] == facts[0]["curve"] for fact in facts)
        if before is not None:
            expected = 0.9 * resampled(before, size) + 0.1 * np.sort(facts[0]["first"])
            np.testing.assert_allclose(facts[0]["curve"], expected, rtol=1e-9)
        before = facts[0]["curve"]
    assert [facts[0]["size"] for _, facts in sorted(steps.items()) if facts[0]["count"] == 1] == [2, 3, 1]
