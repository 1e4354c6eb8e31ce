"""However an optimizer is copied, saved or found again, it is distributed, or its first step is an error."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
from harness.launchers import KERAS_2, ON_TORCH
from keras_job import compiled, distributed, fit

pytestmark = pytest.mark.time_limit(240)


def clone(keras: Any, model: Any, optimizer: Any) -> Any:
    other = keras.models.clone_model(model)
    return other if getattr(other, "compiled", False) else configured(keras, model, optimizer)


def configured(keras: Any, model: Any, optimizer: Any) -> Any:
    other = compiled(keras, None)
    other.compile_from_config(model.get_compile_config())
    return other


def eager(keras: Any, optimizer: Any) -> Any:
    """A model whose steps are not traced, which is what takes long."""
    return compiled(keras, optimizer, run_eagerly=True)


#: Ways to come by another model in the same process, given one and its optimizer.
COPIES = {
    "copy": lambda keras, model, optimizer: eager(keras, copy.copy(optimizer)),
    "deepcopy": lambda keras, model, optimizer: eager(keras, copy.deepcopy(optimizer)),
    "pickle": lambda keras, model, optimizer: eager(keras, pickle.loads(pickle.dumps(optimizer))),
    "from_config": lambda keras, model, optimizer: eager(keras, optimizer.from_config(optimizer.get_config())),
    "compile_from_config": configured,
    "clone_model": clone,
}


def copies_of(kind: str) -> list[str]:
    """All of one kind of optimizer; of another those that go another way for it."""
    if kind == "SGD":
        return list(COPIES)
    # Keras 2 cannot compile with one of its older optimizers from a configuration.
    others = {"legacy": ["pickle"], "legacy LossScaleOptimizer": ["deepcopy"]}
    return others.get(kind, ["deepcopy", "pickle", "compile_from_config"])


def optimizers(keras: Any, kind: str) -> Any:
    """Makes a plain optimizer of some kind."""
    scaler = keras.mixed_precision.LossScaleOptimizer
    kinds = {
        "SGD": lambda: keras.optimizers.SGD(0.01, momentum=0.9),
        "LossScaleOptimizer": lambda: scaler(keras.optimizers.SGD(0.01), initial_scale=64.0),
        "legacy": lambda: keras.optimizers.legacy.Adam(0.01),
        "legacy LossScaleOptimizer": lambda: scaler(keras.optimizers.legacy.SGD(0.01), initial_scale=64.0),
    }
    return kinds[kind]


def train_with_copies(kind: str) -> list[str]:
    """Train by each kind of copy of an optimizer that has been in use; the names of those that were as they should."""
    from keras_job import assert_equal_bits, keras_and_hvd

    from adacons_hvd import AdaCons
    from adacons_hvd.keras.binding import distributed_part

    keras, hvd = keras_and_hvd()
    aggregator = AdaCons(momentum=0.5)
    optimizer = hvd.DistributedOptimizer(optimizers(keras, kind)(), aggregator=aggregator, check_replicas=7)
    model = fit(eager(keras, optimizer))
    for name in copies_of(kind):
        other = COPIES[name](keras, model, optimizer)
        assert other.optimizer is not optimizer
        part = distributed_part(other.optimizer)
        assert part is not None, name
        assert part.aggregator == aggregator
        assert part._adacons.settings.check_replicas == 7
        other.set_weights(model.get_weights())
        assert_equal_bits(fit(other), other.optimizer)
        assert part.report is not None
    # The one that was copied is as it was.
    assert_equal_bits(fit(model), optimizer)
    return copies_of(kind)


def load_without_this_package(folder: str) -> list[str]:
    """Train a model that Keras itself has loaded, or copied by saving it: an error. With ours, or told so, it works."""
    import harness
    import numpy as np
    from keras_job import assert_equal_bits, keras_and_hvd

    from adacons_hvd import AdaCons
    from adacons_hvd.engine.replicas import StrayStepError

    keras, hvd = keras_and_hvd()
    messages = []
    # One in graphs and one without, because each graph takes its time.
    for kind, how in (("SGD", {}), ("LossScaleOptimizer", {"run_eagerly": True})):
        optimizer = hvd.DistributedOptimizer(optimizers(keras, kind)(), aggregator=AdaCons())
        model = fit(compiled(keras, optimizer, **how))
        path = f"{folder}/{harness.rank()}.keras"
        model.save(path)
        for loaded in (keras.models.load_model(path), copy.deepcopy(model)):
            # To look at it is fine, and so is whatever else takes no step.
            assert np.isfinite(loaded.predict(np.ones((1, 6)), verbose=0)).all()
            with pytest.raises(StrayStepError, match="is none since Keras has loaded it") as caught:
                fit(loaded)
            messages += re.findall(r"rank \d(?= took)", str(caught.value))
            loaded.compile(hvd.DistributedOptimizer(loaded.optimizer, aggregator=AdaCons()), loss="mse", **how)
            assert_equal_bits(fit(loaded), loaded.optimizer)
        loaded = hvd.load_model(path, aggregator=AdaCons())
        assert_equal_bits(fit(loaded), loaded.optimizer)
    # A rank that means to train what it has loaded alone says so with an optimizer of its own.
    if harness.rank() == 0:
        alone = keras.models.load_model(path)
        alone.compile(keras.optimizers.SGD(0.01), loss="mse")
        fit(alone)
    return messages


def scaled_by_compile() -> list[str]:
    """Copies of a LossScaleOptimizer that ``compile`` has put around a distributed optimizer, and their first steps."""
    from keras_job import assert_equal_bits, keras_and_hvd

    from adacons_hvd.engine.replicas import StrayStepError
    from adacons_hvd.keras.binding import distributed_part

    keras, hvd = keras_and_hvd()
    keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        model = fit(compiled(keras, distributed(keras, hvd)))
        scaler = model.optimizer
        assert type(scaler).__name__.startswith("LossScaleOptimizer")
        again = scaler.from_config(scaler.get_config())
        assert distributed_part(again) is not None
        assert_equal_bits(fit(compiled(keras, again)))
        messages = []
        if hasattr(scaler, "apply"):  # Keras 2 copies none
            for copied in (copy.deepcopy(scaler), pickle.loads(pickle.dumps(scaler))):
                with pytest.raises(StrayStepError) as caught:
                    fit(compiled(keras, copied))
                messages += re.findall("is none since Keras has loaded it", str(caught.value))
        return messages
    finally:
        keras.mixed_precision.set_global_policy("float32")


def what_cannot_be_pickled() -> list[str]:
    from keras_job import keras_and_hvd

    keras, hvd = keras_and_hvd()
    messages = []
    for options in (
        lambda v: {"granularity": [v[:1]]},
        lambda v: {"groups": [v[:2]]},
        lambda v: {"may_differ": v[:1]},
        None,
    ):
        model = compiled(keras, None)
        variables = model.trainable_variables
        optimizer = distributed(keras, hvd, **(options(variables) if options else {}))
        if options is None:
            optimizer.register_local_var(variables[0])
        with pytest.raises(TypeError) as caught:
            pickle.dumps(optimizer)
        messages.append(str(caught.value))
        # A copy in the same process keeps all of them.
        kept = copy.deepcopy(optimizer)._adacons
        assert kept.settings == optimizer._adacons.settings
        assert kept.local == optimizer._adacons.local
    return messages


def attributes(kind: str) -> list[Any]:
    """DistributedOptimizer returns what it was given, with the same attributes for every kind."""
    from keras_job import assert_equal_bits, keras_and_hvd

    from adacons_hvd import AdaCons

    keras, hvd = keras_and_hvd()
    plain = optimizers(keras, kind)()
    cls = type(plain)
    optimizer = hvd.DistributedOptimizer(plain, aggregator=AdaCons())
    assert optimizer is plain
    assert isinstance(optimizer, cls)
    assert optimizer.__class__ is cls
    assert optimizer.report is None
    model = eager(keras, optimizer)
    optimizer.register_local_var(model.trainable_variables[-1])
    fit(model)
    weights = model.get_weights()
    model.set_weights([*weights[:-1], weights[-1] * 0])
    assert_equal_bits(model)
    with pytest.raises(ValueError, match="distributed already"):
        hvd.DistributedOptimizer(optimizer)
    return [optimizer.aggregator, optimizer.process_set.ranks, optimizer.report.steps]


class Copies:
    kinds: tuple[str, ...] = ("SGD", "LossScaleOptimizer")
    copied_by_keras = 2

    def test_copies_are_distributed(self, cluster):
        for kind in self.kinds:
            assert cluster.run(train_with_copies, kind) == [copies_of(kind)] * 2, kind

    def test_what_keras_loads_by_itself_takes_no_step(self, cluster, tmp_path):
        assert cluster.run(load_without_this_package, str(tmp_path)) == [["rank 0"] * 4, ["rank 1"] * 4]

    def test_a_loss_scaler_that_compile_has_added(self, cluster):
        expected = ["is none since Keras has loaded it"] * self.copied_by_keras
        assert cluster.run(scaled_by_compile) == [expected] * 2

    def test_what_cannot_be_pickled_says_why(self, cluster):
        first, second = cluster.run(what_cannot_be_pickled)
        assert first == second
        for message, name in zip(first, ("granularity", "groups", "may_differ", "register_local_var()"), strict=True):
            assert f"because {name} names variables of this process" in message

    def test_attributes_of_what_is_returned(self, cluster):
        from adacons_hvd import AdaCons

        for kind in self.kinds:
            assert cluster.run(attributes, kind) == [[AdaCons(), [0, 1], 3]] * 2


@pytest.mark.ranks(2, launcher="gloo", pool="tensorflow")
class TestOnTensorFlow(Copies): ...


@pytest.mark.ranks(2, launcher="gloo", **ON_TORCH)
class TestOnTorch(Copies): ...


@pytest.mark.ranks(2, launcher="gloo", **KERAS_2)
class TestOfKeras2(Copies):
    kinds = ("SGD", "LossScaleOptimizer", "legacy", "legacy LossScaleOptimizer")
    copied_by_keras = 0
