"""Training by ``model.fit`` computes the method: Keras 3 on both backends, and Keras 2."""

from __future__ import annotations

import pytest
from harness.launchers import MORE_RANKS, ON_TORCH

pytestmark = pytest.mark.time_limit(300)

SCHEDULES = ["two-pass", "one-pass", "gather"]


def train(which: str, schedules: list[str]) -> list[str]:
    import importlib

    if which == "tf_keras":
        import adacons_hvd.tensorflow.keras as hvd
    else:
        import adacons_hvd.keras as hvd
    from keras_job import fit_beside_oracle

    keras = importlib.import_module(which)
    hvd.init()
    return [fit_beside_oracle(keras, hvd, schedule=name).report.schedule for name in schedules]


@pytest.mark.ranks(2, 3, 4, launcher=("mpi", "gloo"), soak=MORE_RANKS, pool="tensorflow")
def test_keras_3_on_tensorflow(cluster):
    assert cluster.run(train, "keras", SCHEDULES) == [SCHEDULES] * cluster.ranks


@pytest.mark.ranks(2, 3, 4, launcher=("mpi", "gloo"), soak=MORE_RANKS, **ON_TORCH)
def test_keras_3_on_torch(cluster):
    def without_tensorflow(*arguments):
        import sys

        # Keras imports it to save a model, so a test before this one may have made it do so; not on all pools.
        before = set(sys.modules)
        result = train(*arguments)
        assert "tensorflow" not in set(sys.modules) - before
        return result

    assert cluster.run(without_tensorflow, "keras", SCHEDULES) == [SCHEDULES] * cluster.ranks


@pytest.mark.ranks(2, 3, 4, launcher=("mpi", "gloo"), soak=MORE_RANKS, pool="tensorflow")
def test_keras_2(cluster):
    # With the schedule that says most; all of them are as with Keras 3.
    assert cluster.run(train, "tf_keras", ["one-pass"]) == [["one-pass"]] * cluster.ranks
