"""Callbacks, saving, loading, resuming and the elastic state."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.ranks(2, launcher="mpi", pool="tensorflow"), pytest.mark.time_limit(240)]


def resume(folder: str, which: str) -> list:
    """Save on rank 0, load plainly and with this package, and go on."""
    import importlib
    import json
    import zipfile

    if which == "tf_keras":
        import adacons_hvd.tensorflow.keras as hvd
    else:
        import adacons_hvd.keras as hvd
    import harness
    import numpy as np
    from keras_job import assert_equal_bits, data, network

    from adacons_hvd import AdaCons
    from adacons_hvd.keras.common_callbacks import distributed_of
    from adacons_hvd.keras.loading import load_model

    keras = importlib.import_module(which)
    hvd.init()

    def wrap(optimizer):
        return hvd.DistributedOptimizer(optimizer, aggregator=AdaCons(momentum=0.9))

    x, y = data(48)
    model = network(keras)
    model.compile(wrap(keras.optimizers.Adam(0.01)), loss="mse")
    model.fit(x[:24], y[:24], batch_size=8, shuffle=False, verbose=0)
    path = f"{folder}/{harness.rank()}.keras"
    model.save(path)
    config = json.loads(zipfile.ZipFile(path).read("config.json"))["compile_config"]["optimizer"]
    state = distributed_of(model.optimizer)._adacons.exchange.state_dict()

    plain = keras.models.load_model(path)
    assert distributed_of(plain.optimizer) is None
    assert type(plain.optimizer).__name__ == "Adam"
    for a, b in zip(plain.optimizer.variables, model.optimizer.variables, strict=True):
        assert (a.numpy() == b.numpy()).all()

    loaded = load_model(keras, path, wrap, None, None)
    resumed = distributed_of(loaded.optimizer)._adacons.exchange.state_dict()
    assert sorted(resumed) == sorted(state)
    assert all(np.all(resumed[name] == state[name]) for name in state)
    for each in (model, loaded):
        each.fit(x[24:], y[24:], batch_size=8, shuffle=False, verbose=0)
        assert_equal_bits(each)
    for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert loaded.optimizer.report.steps == 6
    return [config["module"], config["class_name"], len(state)]


def test_saving_loading_resuming(cluster, tmp_path):
    assert cluster.run(resume, str(tmp_path), "keras") == [["keras.optimizers", "Adam", 6]] * 2


def test_saving_loading_resuming_with_keras_2(cluster, tmp_path):
    result = cluster.run(resume, str(tmp_path), "tf_keras")
    assert [r[1:] for r in result] == [["Adam", 6]] * 2


def test_configurations(cluster):
    def configure() -> list:
        import keras

        import adacons_hvd.keras as hvd
        from adacons_hvd import AdaCons
        from adacons_hvd.keras.optimizer import Distributed

        hvd.init()
        original = keras.optimizers.Adam(0.25, beta_1=0.5)
        optimizer = hvd.DistributedOptimizer(original, aggregator=AdaCons(momentum=0.5))
        assert isinstance(optimizer, keras.optimizers.Adam)
        again = optimizer.from_config(optimizer.get_config())
        assert issubclass(type(again), Distributed)
        text = keras.optimizers.serialize(optimizer)
        plain = keras.optimizers.deserialize(text)
        assert type(plain) is keras.optimizers.Adam
        return [again.beta_1, repr(again.aggregator), plain.beta_1, optimizer.get_config() == original.get_config()]

    expected = [0.5, "AdaCons(momentum=0.5, normalize=True, scale='unit', nonfinite='propagate')", 0.5, True]
    assert cluster.run(configure) == [expected] * 2


def test_callbacks(cluster, tmp_path):
    def callbacks(folder: str) -> dict:
        import csv

        import harness
        import keras
        import numpy as np
        from keras_job import assert_equal_bits, data, network

        import adacons_hvd.keras as hvd
        from adacons_hvd import AdaCons

        hvd.init()
        model = network(keras)
        model.set_weights([w + harness.rank() for w in model.get_weights()])  # they start apart
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.04, momentum=0.9), aggregator=AdaCons())
        model.compile(optimizer, loss="mse")
        rates = []

        class Watch(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                rates.append(float(model.optimizer.learning_rate.numpy()))

        file = f"{folder}/{harness.rank()}.csv"
        history = model.fit(
            *data(16),
            batch_size=8,
            epochs=3,
            verbose=0,
            callbacks=[
                hvd.callbacks.BroadcastGlobalVariablesCallback(0),
                hvd.callbacks.MetricAverageCallback(),
                hvd.callbacks.LearningRateWarmupCallback(0.04, warmup_epochs=2),
                hvd.callbacks.LearningRateScheduleCallback(0.04, 0.1, start_epoch=2),
                hvd.callbacks.AggregationLogger(),
                hvd.callbacks.BestModelCheckpoint("loss", filepath=f"{folder}/{harness.rank()}.keras"),
                keras.callbacks.CSVLogger(file),
                Watch(),
            ],
        ).history
        assert_equal_bits(model, optimizer)
        with open(file) as lines:  # noqa: PTH123
            columns = next(csv.reader(lines))
        np.testing.assert_allclose(rates, [0.025, 0.03, 0.035, 0.04, 0.04, 0.04], rtol=1e-5)
        assert history["adacons_spread"][-1] == max(optimizer.report.spread) > 0
        return {
            "loss": history["loss"],
            "lr": [round(rate, 6) for rate in history["lr"]],
            "fallbacks": history["adacons_fallbacks"],
            "columns": sorted(c for c in columns if not c.startswith("val_")),
        }

    first, second = cluster.run(callbacks, str(tmp_path))
    assert first == second  # the loss, too: it is averaged
    assert first["lr"] == [0.03, 0.04, 0.04]
    assert first["fallbacks"] == [0, 0, 0]
    assert first["columns"] == ["adacons_fallbacks", "adacons_spread", "epoch", "loss", "lr"]


def test_momentum_correction_keeps_the_velocity_in_step(cluster):
    def correct() -> bool:
        import keras
        import numpy as np
        from keras_job import network

        import adacons_hvd.keras as hvd

        hvd.init()
        model = network(keras)
        model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, momentum=0.9)), loss="mse")
        model.optimizer.build(model.trainable_variables)
        for velocity in model.optimizer.momentums:
            velocity.assign(np.ones(velocity.shape))
        callback = hvd.callbacks.LearningRateScheduleCallback(0.1, lambda epoch: 0.5)
        callback.set_model(model)
        callback.on_epoch_begin(0)
        callback.on_train_batch_begin(0)
        return all((v.numpy() == 0.5).all() for v in model.optimizer.momentums)

    assert cluster.run(correct) == [True, True]


def test_elastic_state(cluster):
    def elastic() -> list:
        import harness
        import keras
        import numpy as np
        from horovod.common.exceptions import HorovodInternalError
        from keras_job import assert_equal_bits, data, digest, network

        import adacons_hvd.keras as hvd
        from adacons_hvd import AdaCons

        hvd.init()
        model = network(keras)
        optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(0.01), aggregator=AdaCons())
        model.compile(optimizer, loss="mse")
        x, y = data(32)
        model.fit(x[:16], y[:16], batch_size=8, verbose=0)
        state = hvd.elastic.KerasState(model, batch=0, epoch=7)
        committed = digest(model.get_weights())
        model.fit(x[16:], y[16:], batch_size=8, verbose=0)
        assert digest(model.get_weights()) != committed
        assert optimizer.report.steps == 4
        state.restore()
        assert digest(model.get_weights()) == committed
        assert optimizer._adacons.exchange.state_dict()["steps"].tolist() == [[2.0]]

        # A rank that comes back with other values takes up those of rank 0.
        if harness.rank():
            model.set_weights([w + 1 for w in model.get_weights()])
            state.epoch = 0
        state.sync()
        assert_equal_bits(model, optimizer)
        state.on_reset()
        callbacks = [
            hvd.elastic.CommitStateCallback(state, batches_per_commit=2),
            hvd.elastic.UpdateBatchStateCallback(state),
            hvd.elastic.UpdateEpochStateCallback(state),
        ]
        model.fit(x, y, batch_size=8, verbose=0, callbacks=callbacks)
        assert_equal_bits(model, optimizer)

        import tensorflow as tf

        def failing(state):
            raise tf.errors.UnknownError(None, None, "adacons.tf.0.flags: HorovodAllreduce: shut down")

        from adacons_hvd.keras import common_elastic

        attempt = common_elastic.make_elastic(keras, "tensorflow")["run"](failing).__closure__
        inner = next(c.cell_contents for c in attempt if getattr(c.cell_contents, "__name__", "") == "failing")
        with pytest.raises(HorovodInternalError):
            inner(state)
        return [state.epoch, state.batch, optimizer.report.steps, np.isfinite(model.get_weights()[0]).all()]

    assert cluster.run(elastic) == [[8, 0, 6, True]] * 2


@pytest.mark.parametrize("module", ["keras", "tensorflow.keras", "tensorflow"])
def test_every_public_name_of_horovods_module(cluster, module):
    def missing(module: str) -> list[str]:
        import importlib
        from types import ModuleType

        theirs = importlib.import_module(f"horovod.{module}")
        ours = importlib.import_module(f"adacons_hvd.{module}")
        names = [n for n, v in vars(theirs).items() if n[0] != "_" and not isinstance(v, ModuleType)]
        for sub in ("callbacks", "elastic"):
            if hasattr(theirs, sub):
                theirs_sub, ours_sub = getattr(theirs, sub), getattr(ours, sub)
                assert module == "tensorflow" or ours_sub.__name__.startswith("adacons_hvd")
                own = [n for n, v in vars(theirs_sub).items() if n[0] != "_" and isinstance(v, type)]
                names += [f"{sub}.{n}" for n in own if hasattr(theirs_sub, n) and not hasattr(ours_sub, n)]
        return [name for name in names if not hasattr(ours, name)]

    assert cluster.run(missing, module) == [[], []]
