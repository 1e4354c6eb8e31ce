"""However an optimizer is copied, saved or found again, it is distributed, or its first step is an error."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Sequence
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


#: Those of which each is made by other code of ours; the rest is made by that of one of these.
OTHERS = ("deepcopy", "pickle", "compile_from_config")
#: Keras 2 cannot compile with one of its older optimizers from a configuration.
OF_OLDER = (("legacy", ("deepcopy", "pickle")), ("legacy LossScaleOptimizer", ("deepcopy",)))


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


def train_with_copies(kind: str, names: Sequence[str]) -> list[int]:
    """Train by these copies of an optimizer that has been in use; the ranks that train it.

    DistributedOptimizer returns what it was given, with the same attributes for every kind.
    """
    import harness
    from keras_job import assert_equal_bits, digest, keras_and_hvd

    from adacons_hvd import AdaCons
    from adacons_hvd.keras.binding import distributed_part

    keras, hvd = keras_and_hvd()
    # An average takes less time, and copies know an aggregator as they know the other settings.
    aggregator = AdaCons(momentum=0.5) if kind == "SGD" else None
    plain = optimizers(keras, kind)()
    cls = type(plain)
    optimizer = hvd.DistributedOptimizer(plain, aggregator=aggregator, schedule="two-pass", check_replicas=7)
    assert optimizer is plain
    assert isinstance(optimizer, cls)
    assert optimizer.__class__ is cls
    assert optimizer.report is None
    with pytest.raises(ValueError, match="distributed already"):
        hvd.DistributedOptimizer(optimizer)
    model = fit(eager(keras, optimizer), 1)
    for name in names:
        other = COPIES[name](keras, model, optimizer)
        assert other.optimizer is not optimizer
        part = distributed_part(other.optimizer)
        assert part is not None, name
        assert part._adacons.settings == optimizer._adacons.settings
        other.set_weights(model.get_weights())
        assert_equal_bits(fit(other, 1), other.optimizer)
    # The one that was copied is as it was.
    assert_equal_bits(fit(model, 2), optimizer)
    if aggregator:
        assert optimizer.aggregator == aggregator
        assert optimizer.report.steps == 3
    optimizer.register_local_var(model.trainable_variables[-1])
    *shared, local = fit(model, 1).get_weights()
    assert len(set(harness.gather(digest(shared)))) == 1
    assert len(set(harness.gather(digest([local])))) == 2
    ranks: list[int] = optimizer.process_set.ranks
    return ranks


def load_without_this_package(folder: str) -> list[str]:
    """Train a model that Keras itself has loaded, or copied by saving it: an error. With ours, or told so, it works."""
    import harness
    import numpy as np
    from keras_job import assert_equal_bits, keras_and_hvd

    from adacons_hvd.engine.replicas import StrayStepError

    keras, hvd = keras_and_hvd()
    messages = []
    # One in graphs and one without, because each graph takes its time.
    for kind, how in (("SGD", {}), ("LossScaleOptimizer", {"run_eagerly": True})):
        model = fit(compiled(keras, hvd.DistributedOptimizer(optimizers(keras, kind)(), check_replicas=0), **how), 1)
        path = f"{folder}/{harness.rank()}.keras"
        model.save(path)
        for loaded in (keras.models.load_model(path), copy.deepcopy(model)):
            # To look at it is fine, and so is whatever else takes no step.
            assert np.isfinite(loaded.predict(np.ones((1, 6)), verbose=0)).all()
            with pytest.raises(StrayStepError, match="is none since Keras has loaded it") as caught:
                fit(loaded, 1)
            messages += re.findall(r"rank \d(?= took)", str(caught.value))
            loaded.compile(hvd.DistributedOptimizer(loaded.optimizer), loss="mse", run_eagerly=True)
            assert_equal_bits(fit(loaded, 1), loaded.optimizer)
        loaded = hvd.load_model(path)
        assert_equal_bits(fit(loaded, 1), loaded.optimizer)
    # A rank that means to train what it has loaded alone says so with an optimizer of its own.
    if harness.rank() == 0:
        alone = keras.models.load_model(path)
        alone.compile(keras.optimizers.SGD(0.01), loss="mse", run_eagerly=True)
        fit(alone, 1)
    return messages


def scaled_by_compile() -> list[str]:
    """Copies of a LossScaleOptimizer that ``compile`` has put around a distributed optimizer, and their first steps."""
    from keras_job import assert_equal_bits, keras_and_hvd

    from adacons_hvd.engine.replicas import StrayStepError
    from adacons_hvd.keras.binding import distributed_part

    keras, hvd = keras_and_hvd()
    keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        model = fit(eager(keras, distributed(keras, hvd, False)))
        scaler = model.optimizer
        assert type(scaler).__name__.startswith("LossScaleOptimizer")
        again = scaler.from_config(scaler.get_config())
        assert distributed_part(again) is not None
        assert_equal_bits(fit(eager(keras, again)))
        messages = []
        if hasattr(scaler, "apply"):  # Keras 2 copies none
            for copied in (copy.deepcopy(scaler), pickle.loads(pickle.dumps(scaler))):
                with pytest.raises(StrayStepError) as caught:
                    fit(eager(keras, copied))  # it leaves the first steps out, as they overflow
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


class Copies:
    #: By the kind of optimizer.
    copies: Sequence[tuple[str, Sequence[str]]]
    copied_by_keras = 2

    def test_copies_are_distributed(self, cluster):
        for kind, names in self.copies:
            assert cluster.run(train_with_copies, kind, names) == [[0, 1]] * 2, kind

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


@pytest.mark.ranks(2, launcher="gloo", pool="tensorflow")
class TestOnTensorFlow(Copies):
    # Copies are Keras 3's, as on PyTorch, where all of them take less time.
    copies = (("SGD", ("pickle", "clone_model")), ("LossScaleOptimizer", ("deepcopy",)))


@pytest.mark.ranks(2, launcher="gloo", **ON_TORCH)
class TestOnTorch(Copies):
    copies = (("SGD", tuple(COPIES)), ("LossScaleOptimizer", OTHERS))


@pytest.mark.ranks(2, launcher="gloo", **KERAS_2)
class TestOfKeras2(Copies):
    # It has no other way to copy a model than to compile another, and to copy an optimizer ours is the same.
    copies = (("SGD", OTHERS), ("LossScaleOptimizer", OTHERS), *OF_OLDER)
    copied_by_keras = 0
