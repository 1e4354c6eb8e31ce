"""Why this module exists: plain Horovod does not aggregate under Keras 3, and says nothing."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.time_limit(240)]


def train(module: str, aggregated: bool) -> tuple[bool, int]:
    """Train three steps; whether all ranks hold the same weights then."""
    import importlib

    import keras
    from keras_job import data, equal_bits, network

    from adacons_hvd import AdaCons

    hvd = importlib.import_module(module)
    hvd.init()
    model = network(keras)
    assert equal_bits(model)
    options = {"aggregator": AdaCons()} if aggregated else {}
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.01), **options)
    model.compile(optimizer, loss="mse")
    model.fit(*data(24), batch_size=8, epochs=1, verbose=0, shuffle=False)
    return equal_bits(model), int(optimizer.iterations.numpy())


@pytest.mark.ranks(2, launcher="mpi", pool="tensorflow")
def test_horovod_drifts_and_this_does_not(cluster):
    assert keras_major() >= 3
    # The very same script: only the import differs.
    assert cluster.run(train, "horovod.tensorflow.keras", False) == [(False, 3)] * 2
    assert cluster.run(train, "adacons_hvd.tensorflow.keras", False) == [(True, 3)] * 2
    assert cluster.run(train, "adacons_hvd.tensorflow.keras", True) == [(True, 3)] * 2


def keras_major() -> int:
    from importlib.metadata import version

    return int(version("keras").split(".")[0])
