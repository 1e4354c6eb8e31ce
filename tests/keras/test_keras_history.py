"""Aggregators that need more than dots and squares, and the mean at a length of its own, with ``model.fit``."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from harness.launchers import KERAS_2, ON_TORCH

pytestmark = [pytest.mark.ranks(3, launcher="mpi", pool="tensorflow"), pytest.mark.time_limit(240)]


def beside_the_oracle() -> list[tuple[str, int]]:
    """Every aggregator in float32 or float64; the schedule it took and its fallbacks.

    Other lengths and the other schedules `test_tf_history.py` and `test_torch_history.py` hold against the oracles.
    """
    import harness
    import oracle
    from element_wise import TrimmedMean
    from keras_job import fit_beside_oracle, keras_and_hvd

    from adacons_hvd import Curvature, NormalizedMean

    class TrimmedOracle:
        def __call__(self, gradients: Any) -> Any:
            return oracle.trimmed_mean(gradients)

    keras, hvd = keras_and_hvd()
    past = {"memory": 3, "workers": False, "length": "agreement"}
    cases: list[tuple[Any, dict[str, Any], str, str, int]] = [
        (Curvature(8), {"oracle": oracle.CurvatureOracle, "memory": 8}, "one-pass", "float32", 20),
        (Curvature(**past), {"oracle": oracle.CurvatureOracle, **past}, "gather", "float64", 8),
        (NormalizedMean(), {"oracle": oracle.NormalizedMeanOracle}, "two-pass", "float32", 4),
    ]
    if harness.size() > 2:
        cases.append((TrimmedMean(), {"oracle": TrimmedOracle}, "one-pass", "float32", 4))
    found = []
    for aggregator, settings, schedule, dtype, steps in cases:
        keras.backend.set_floatx(dtype)  # in which Keras 3 computes losses, whatever the layers have
        report = fit_beside_oracle(
            keras,
            hvd,
            steps,
            {"float32": 1e-5, "float64": 1e-12}[dtype],
            dtype=dtype,
            settings=settings,
            aggregator=aggregator,
            schedule=schedule,
            bucket_bytes=100,
            check_replicas=0,
        ).report
        assert (report.history_bytes > 0) == (aggregator.history > 0)
        found.append((report.schedule, report.fallbacks))
    keras.backend.set_floatx("float32")
    return found


EXPECTED = [(schedule, 0) for schedule in ("one-pass", "gather", "two-pass", "one-pass")]


def check(cluster: Any) -> None:
    assert cluster.run(beside_the_oracle) == [EXPECTED[: 3 if cluster.ranks == 2 else 4]] * cluster.ranks


def test_keras_3_on_tensorflow_agrees_with_the_oracles(cluster):
    check(cluster)


@pytest.mark.ranks(2, launcher="mpi", **KERAS_2)
def test_keras_2_agrees_with_the_oracles(cluster):
    check(cluster)


@pytest.mark.ranks(2, launcher="mpi", **ON_TORCH)
def test_keras_3_on_torch_agrees_with_the_oracles(cluster):
    check(cluster)


def saved_and_frozen(folder: str) -> None:
    """A file that rank 0 has saved for all goes on bit for bit; a history of other parameters begins afresh."""
    import harness
    import numpy as np
    from keras_job import assert_equal_bits, compiled, digest, distributed, fit, keras_and_hvd

    from adacons_hvd import Curvature

    keras, hvd = keras_and_hvd()

    def kept(model: Any) -> int:
        return int(np.asarray(model.optimizer.report.decision.memory["kept"]).max())

    options = {"aggregator": Curvature(4), "schedule": "one-pass", "bucket_bytes": 100}
    model = fit(compiled(keras, distributed(keras, hvd, **options)), 6)
    model.optimizer.gather_history()
    if hvd.rank() == 0:
        model.save(f"{folder}/model.keras")
    harness.gather(None)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*begins afresh")
        loaded = hvd.load_model(f"{folder}/model.keras", **options)
        for some in (model, loaded):
            fit(some, 5)
            assert_equal_bits(some)
        assert kept(loaded) == 11
        assert digest(loaded.get_weights()) == digest(model.get_weights())

    model.layers[0].trainable = False
    model.compile(model.optimizer, loss="mse")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model, 3)
    assert any("the aggregator's history begins afresh" in str(w.message) for w in caught)
    assert kept(model) == 3
    assert_equal_bits(model)


def test_a_saved_history_goes_on_and_a_foreign_one_begins_afresh(cluster, tmp_path):
    cluster.run(saved_and_frozen, str(tmp_path))


@pytest.mark.ranks(2, launcher="mpi", **ON_TORCH)
def test_the_same_on_torch(cluster, tmp_path):
    cluster.run(saved_and_frozen, str(tmp_path))


@pytest.mark.ranks(2, launcher="mpi", **KERAS_2)
def test_the_same_with_keras_2(cluster, tmp_path):
    cluster.run(saved_and_frozen, str(tmp_path))
