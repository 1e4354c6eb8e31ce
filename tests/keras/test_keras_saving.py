"""Callbacks, saving, loading, resuming and the elastic state."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness.launchers import KERAS_2, ON_TORCH

pytestmark = [pytest.mark.ranks(2, launcher="mpi", pool="tensorflow"), pytest.mark.time_limit(240)]


def train_and_save(folder: str) -> dict[str, str]:
    """Save after three steps in every format, resume from each, and go on exactly as without the interruption."""
    import pickle
    import warnings

    import harness
    import numpy as np
    from keras_job import assert_equal_bits, data, digest, keras_and_hvd, network

    from adacons_hvd import AdaCons, Mean
    from adacons_hvd.keras.binding import distributed_part

    keras, hvd = keras_and_hvd()
    major = int(keras.__version__.split(".")[0])
    on_tensorflow = major == 2 or keras.backend.backend() == "tensorflow"

    class Own(keras.optimizers.Adam):
        pass

    def squash(x):
        return x / (1 + abs(x))

    x, y = data(48)
    # Eagerly, by what is traced soonest: each format makes another model and another optimizer.
    settings = {"aggregator": AdaCons(momentum=0.9), "schedule": "two-pass", "check_replicas": 0}

    def distributed(optimizer):
        return hvd.DistributedOptimizer(optimizer, **settings)

    def compiled(optimizer=None):
        model = network(keras)
        if major == 3:
            model.layers[0].activation = squash
        model.compile(
            distributed(optimizer or Own(0.01, clipnorm=0.5)), loss=keras.losses.MeanSquaredError(), run_eagerly=True
        )
        return model

    def fit(model, part):
        model.fit(x[part], y[part], batch_size=8, shuffle=False, verbose=0)
        return model

    def exchange_of(model):
        return distributed_part(model.optimizer)._adacons.exchange

    def variables_of(optimizer):
        variables = optimizer.variables
        return [np.asarray(v.numpy()) for v in (variables() if callable(variables) else variables)]

    first, second = slice(24), slice(24, 48)
    model = fit(compiled(), first)
    state = exchange_of(model).state_dict()
    assert len(state) >= 6
    warnings.simplefilter("ignore")  # that .h5 is an old format
    rank = harness.rank()
    paths = {"keras": f"{folder}/{rank}.keras", "h5": f"{folder}/{rank}.h5"}
    for path in paths.values():
        model.save(path)
    if major == 2:
        paths["folder"] = f"{folder}/{rank}.saved"
        model.save(paths["folder"], save_format="tf")
    else:
        model.save_weights(f"{folder}/{rank}.weights.h5")
    if on_tensorflow:
        import tensorflow as tf

        checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer).write(f"{folder}/{rank}.checkpoint")
    with open(f"{folder}/{rank}.pickle", "wb") as file:  # noqa: PTH123
        pickle.dump((model.get_weights(), variables_of(model.optimizer)), file)
    fit(model, second)
    assert_equal_bits(model)
    expected = digest(model.get_weights())

    def resumed(loaded):
        loaded.run_eagerly = True  # as not every format knows, and graphs round otherwise
        kept = exchange_of(loaded).state_dict()
        assert sorted(kept) == sorted(state)
        assert all(np.all(kept[name] == state[name]) for name in state)
        fit(loaded, second)
        assert loaded.optimizer.report.steps == 6
        return "exact" if digest(loaded.get_weights()) == expected else "different"

    results = {}
    for name, path in paths.items():
        loaded = hvd.load_model(path, [Own], {"squash": squash}, **settings)
        assert isinstance(loaded.optimizer, Own)
        assert type(loaded.optimizer) is not Own
        results[name] = resumed(loaded)
    if major == 3:
        loaded = compiled()
        loaded.optimizer.build(loaded.trainable_variables)
        loaded.load_weights(f"{folder}/{rank}.weights.h5")
        results["weights"] = resumed(loaded)
    if on_tensorflow:
        loaded = compiled()
        loaded.optimizer.build(loaded.trainable_variables)
        tf.train.Checkpoint(model=loaded, optimizer=loaded.optimizer).read(checkpoint).assert_consumed()
        results["checkpoint"] = resumed(loaded)
    # Without this package's arguments the optimizer averages, and keeps what it cannot use for itself.
    averaging = hvd.load_model(paths["keras"], custom_objects={"squash": squash, "Own": Own})
    assert averaging.optimizer.aggregator in (None, Mean())
    assert_equal_bits(fit(averaging, second))
    return results


#: Loads what ``train_and_save`` saved where neither this package nor Horovod can be imported.
WITHOUT = """
import pickle, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("adacons_hvd", "horovod"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
keras = __import__(sys.argv[1])
import numpy as np

for name in ("adacons_hvd", "horovod"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(f"{name} is here")

class Own(keras.optimizers.Adam):
    pass

def squash(x):
    return x / (1 + abs(x))

weights, variables = pickle.load(open("0.pickle", "rb"))
for path in sys.argv[2:]:
    model = keras.models.load_model(path, custom_objects={"Own": Own, "squash": squash})
    assert type(model.optimizer) is Own, type(model.optimizer)
    found = model.optimizer.variables
    found = [v.numpy() for v in (found() if callable(found) else found)]
    for some, others in ((model.get_weights(), weights), (found, variables)):
        assert len(some) == len(others)
        assert all(np.all(a == b) for a, b in zip(some, others))
    model.fit(np.ones((8, 6)), np.ones((8, 1)), verbose=0)
    print("loaded", path)
"""


def load_without_this_package(keras: str, folder: Path, files: list[str], env: dict[str, str]) -> None:
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT, keras, *files],
        cwd=folder,
        env={**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **env, "TF_CPP_MIN_LOG_LEVEL": "2"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"loaded {file}" for file in files]


def test_saving_and_loading(cluster, tmp_path):
    expected = dict.fromkeys(["keras", "h5", "weights", "checkpoint"], "exact")
    assert cluster.run(train_and_save, str(tmp_path)) == [expected] * 2
    # Not the .h5: what plain Keras 3 loads from one cannot train, whoever wrote it.
    load_without_this_package("keras", tmp_path, ["0.keras"], {})


@pytest.mark.ranks(2, launcher="mpi", **ON_TORCH)
def test_saving_and_loading_on_torch(cluster, tmp_path):
    expected = dict.fromkeys(["keras", "h5", "weights"], "exact")
    # Where this package is absent it loads as what was saved on TensorFlow: the same code has written it.
    assert cluster.run(train_and_save, str(tmp_path)) == [expected] * 2


@pytest.mark.ranks(2, launcher="mpi", **KERAS_2)
def test_saving_and_loading_with_keras_2(cluster, tmp_path):
    # From a SavedModel Keras 2 takes no optimizer's variables, with or without this package; what the aggregator
    # remembers is kept all the same.
    expected = {"keras": "exact", "h5": "exact", "folder": "different", "checkpoint": "exact"}
    assert cluster.run(train_and_save, str(tmp_path)) == [expected] * 2
    load_without_this_package("tf_keras", tmp_path, ["0.keras", "0.h5"], KERAS_2["env"])


def test_configurations(cluster):
    def configure() -> list:
        import keras

        import adacons_hvd.keras as hvd
        from adacons_hvd import AdaCons
        from adacons_hvd.keras.binding import Distributed

        hvd.init()
        original = keras.optimizers.Adam(0.25, beta_1=0.5)
        optimizer = hvd.DistributedOptimizer(original, aggregator=AdaCons(momentum=0.5))
        assert isinstance(optimizer, keras.optimizers.Adam)
        again = optimizer.from_config(optimizer.get_config())
        assert issubclass(type(again), Distributed)
        text = keras.optimizers.serialize(optimizer)
        plain = keras.optimizers.deserialize(text)
        assert type(plain) is keras.optimizers.Adam

        @keras.saving.register_keras_serializable(package="mine")
        class Registered(keras.optimizers.SGD):
            pass

        config = keras.saving.serialize_keras_object(hvd.DistributedOptimizer(Registered(0.1), aggregator=AdaCons()))
        assert config["registered_name"] == "mine>Registered"
        assert type(keras.saving.deserialize_keras_object(config)) is Registered
        return [again.beta_1, repr(again.aggregator), plain.beta_1, optimizer.get_config() == original.get_config()]

    expected = [0.5, "AdaCons(momentum=0.5, normalize=True, scale='unit', nonfinite='propagate')", 0.5, True]
    assert cluster.run(configure) == [expected] * 2


def callbacks(folder: str) -> dict:
    import csv

    import harness
    import numpy as np
    from keras_job import assert_equal_bits, data, keras_and_hvd, network

    from adacons_hvd import AdaCons

    keras, hvd = keras_and_hvd()
    model = network(keras)
    model.set_weights([w + harness.rank() for w in model.get_weights()])  # they start apart
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.04, momentum=0.9), aggregator=AdaCons())
    curve = np.array([[0.5, 1.0]]) + harness.rank()
    one = np.ones((1, 1))
    exchange = optimizer._adacons.exchange
    exchange.load_state_dict(
        {"version": 1, "workers": 2, "steps": 3 * one, "fallbacks": 0 * one, "updates": 3 * one, "curve": curve}
    )
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
    assert optimizer.report.steps == 3 + 6
    assert len(set(harness.gather(exchange.state_dict()["curve"].tobytes()))) == 1, "ranks remember different curves"
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


def assert_callbacks_worked(results: list[dict]) -> None:
    first, second = results
    assert first == second  # the loss, too: it is averaged
    assert first["lr"] == [0.03, 0.04, 0.04]
    assert first["fallbacks"] == [0, 0, 0]
    assert first["columns"] == ["adacons_fallbacks", "adacons_spread", "epoch", "loss", "lr"]


@pytest.mark.ranks(2, launcher=("mpi", "gloo"), soak={"mpi": (2,)}, pool="tensorflow")
def test_callbacks(cluster, tmp_path):
    assert_callbacks_worked(cluster.run(callbacks, str(tmp_path)))


@pytest.mark.ranks(2, launcher="gloo", **ON_TORCH)
def test_callbacks_on_torch(cluster, tmp_path):
    assert_callbacks_worked(cluster.run(callbacks, str(tmp_path)))


@pytest.mark.ranks(2, launcher="gloo", **KERAS_2)
def test_callbacks_of_keras_2(cluster, tmp_path):
    assert_callbacks_worked(cluster.run(callbacks, str(tmp_path)))


def correct(name: str) -> list[list[float]]:
    """Halve the rate after one step: the velocity that is left, over what it was before, by variable."""
    import numpy as np
    from keras_job import data, keras_and_hvd, network

    keras, hvd = keras_and_hvd()
    cls = keras.optimizers.legacy.SGD if name == "legacy" else keras.optimizers.SGD
    model = network(keras)
    model.compile(hvd.DistributedOptimizer(cls(0.1, momentum=0.9)), loss="mse")
    model.fit(*data(8), batch_size=8, verbose=0)

    def velocities():
        if name == "legacy":
            return [model.optimizer.get_slot(v, "momentum") for v in model.trainable_variables]
        return model.optimizer.momentums

    before = [np.array(v.numpy()) for v in velocities()]
    callback = hvd.callbacks.LearningRateScheduleCallback(0.1, lambda epoch: 0.5)
    callback.set_model(model)
    callback.on_epoch_begin(0)
    callback.on_train_batch_begin(0)
    return [float(np.median(v.numpy() / b)) for v, b in zip(velocities(), before, strict=True)]


def test_momentum_correction_keeps_the_velocity_in_step(cluster):
    assert cluster.run(correct, "SGD") == [[0.5] * 4] * 2


@pytest.mark.ranks(2, launcher="gloo", **ON_TORCH)
def test_momentum_correction_on_torch(cluster):
    assert cluster.run(correct, "SGD") == [[0.5] * 4] * 2


@pytest.mark.ranks(2, launcher="gloo", **KERAS_2)
@pytest.mark.parametrize("name", ["SGD", "legacy"])
def test_momentum_correction_of_keras_2(cluster, name):
    assert cluster.run(correct, name) == [[0.5] * 4] * 2


def loaded_on_one_rank(folder: str) -> int:
    """Rank 0 goes on with a model that was saved by a process alone; names differ, and what is built by when."""
    import harness
    from keras_job import assert_equal_bits, data, keras_and_hvd, network

    from adacons_hvd import AdaCons

    keras, hvd = keras_and_hvd()
    x, y = data(16)
    options = {"aggregator": AdaCons(), "schedule": "two-pass"}
    if harness.rank() == 0:
        model = network(keras)
        model.compile(keras.optimizers.Adam(0.01), loss="mse")
        model.fit(x, y, verbose=0)
        model.save(f"{folder}/before.keras")
        model = hvd.load_model(f"{folder}/before.keras", **options)
    else:
        model = network(keras)
        model.compile(hvd.DistributedOptimizer(keras.optimizers.Adam(0.01), **options), loss="mse")
    callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0)]
    model.fit(x, y, batch_size=8, verbose=0, callbacks=callbacks)
    assert_equal_bits(model, model.optimizer)
    return model.optimizer.report.steps


@pytest.mark.ranks(2, launcher=("mpi", "gloo"), soak={"mpi": (2,)}, pool="tensorflow")
def test_a_model_loaded_on_one_rank(cluster, tmp_path):
    assert cluster.run(loaded_on_one_rank, str(tmp_path)) == [2, 2]


@pytest.mark.ranks(2, launcher="gloo", **ON_TORCH)
def test_a_model_loaded_on_one_rank_on_torch(cluster, tmp_path):
    assert cluster.run(loaded_on_one_rank, str(tmp_path)) == [2, 2]


@pytest.mark.ranks(2, launcher="gloo", **KERAS_2)
def test_a_model_loaded_on_one_rank_with_keras_2(cluster, tmp_path):
    assert cluster.run(loaded_on_one_rank, str(tmp_path)) == [2, 2]


def elastic_state() -> list:
    import harness
    import numpy as np
    from keras_job import assert_equal_bits, data, digest, keras_and_hvd, network

    from adacons_hvd import AdaCons

    keras, hvd = keras_and_hvd()
    model = network(keras)
    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(0.01), aggregator=AdaCons(), schedule="two-pass")
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
    return [state.epoch, state.batch, optimizer.report.steps, np.isfinite(model.get_weights()[0]).all()]


def test_elastic_state(cluster):
    assert cluster.run(elastic_state) == [[8, 0, 6, True]] * 2


@pytest.mark.ranks(2, launcher="gloo", **ON_TORCH)
def test_elastic_state_on_torch(cluster):
    assert cluster.run(elastic_state) == [[8, 0, 6, True]] * 2


@pytest.mark.ranks(2, launcher="gloo", **KERAS_2)
def test_elastic_state_of_keras_2(cluster):
    assert cluster.run(elastic_state) == [[8, 0, 6, True]] * 2


def test_a_failed_collective_is_what_horovod_takes_it_for(cluster):
    def fail() -> list[str]:
        import tensorflow as tf
        from horovod.common.exceptions import HorovodInternalError

        import adacons_hvd.keras as hvd

        class State:
            """As much of a state as a function needs that fails at once."""

            def sync(self): ...

            def on_hosts_updated(self, *args): ...

            def register_host_messages(self): ...

            def restore(self):
                raise KeyboardInterrupt("restored")  # there is no new job to go on in

        hvd.init()
        outcomes = []
        for message in ("adacons.tf.0.flags: HorovodAllreduce: shut down", "out of memory"):

            def failing(state, message=message):
                raise tf.errors.UnknownError(None, None, message)

            with pytest.raises((KeyboardInterrupt, tf.errors.UnknownError, HorovodInternalError)) as caught:
                hvd.elastic.run(failing)(State())
            outcomes.append(type(caught.value).__name__)
        return outcomes

    assert cluster.run(fail) == [["KeyboardInterrupt", "UnknownError"]] * 2


def missing(module: str) -> list[str]:
    """The public names of Horovod's module that ours lacks."""
    import importlib
    from types import ModuleType

    theirs = importlib.import_module(f"horovod.{module}")
    ours = importlib.import_module(f"adacons_hvd.{module}")
    names = [n for n, v in vars(theirs).items() if n[0] != "_" and not isinstance(v, ModuleType)]
    for sub in ("callbacks", "elastic"):
        if hasattr(theirs, sub):
            theirs_sub, ours_sub = getattr(theirs, sub), getattr(ours, sub)
            assert ours_sub.__name__.startswith("adacons_hvd")
            own = getattr(theirs_sub, "__all__", [n for n in vars(theirs_sub) if n[0] != "_"])
            own = [n for n in own if not isinstance(getattr(theirs_sub, n), ModuleType)]
            # Neither what it imports from Keras nor its helpers.
            of_horovod = [n for n in own if getattr(theirs_sub, n).__module__.startswith("horovod")]
            names += [f"{sub}.{n}" for n in of_horovod if n != "is_version_greater_equal_than"]
    found = set(dir(ours)) | {f"{sub}.{n}" for sub in ("callbacks", "elastic") for n in dir(getattr(ours, sub, None))}
    return [name for name in names if name not in found]


@pytest.mark.parametrize("module", ["keras", "tensorflow.keras", "tensorflow"])
def test_every_public_name_of_horovods_module(cluster, module):
    assert cluster.run(missing, module) == [[], []]


# One process, which no other test uses: Horovod's process sets are those of the framework that was imported last, so
# once horovod.keras is imported, which is for TensorFlow, nothing on PyTorch trains as it should.
@pytest.mark.ranks(1, launcher="gloo", **ON_TORCH)
def test_every_public_name_on_torch(cluster):
    assert cluster.run(missing, "keras") == [[]]


@pytest.mark.ranks(2, launcher="gloo", **KERAS_2)
def test_every_public_name_with_keras_2(cluster):
    assert cluster.run(missing, "tensorflow.keras") == [[], []]
