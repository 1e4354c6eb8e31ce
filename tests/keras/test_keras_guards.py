"""A rank that trains alone is noticed, whatever path led to it, and every rank gets the error; in all three Kerases."""

from __future__ import annotations

from typing import Any

import pytest
from harness.launchers import KERAS_2, ON_TORCH
from keras_job import apply, compiled, distributed, fit

pytestmark = pytest.mark.time_limit(240)


# --- steps along gradients that were never aggregated ------------------------------------------------


def step_of_the_class(keras: Any, model: Any) -> None:
    """The step of the optimizer's own class, as something kept it from before the optimizer was distributed."""
    cls = model.optimizer.__class__
    if hasattr(cls, "apply"):
        apply(keras, model, lambda gradients, variables: cls.apply(model.optimizer, gradients, variables))
    else:
        alone = {"skip_gradients_aggregation": True}
        apply(keras, model, lambda g, v: cls.apply_gradients(model.optimizer, zip(g, v, strict=True), **alone))


def inner_step(keras: Any, model: Any) -> None:
    """The part of a step that comes after the aggregation."""
    inner = getattr(model.optimizer, "_backend_apply_gradients", None)
    if inner is not None:
        apply(keras, model, inner)
    else:
        apply(keras, model, lambda g, v: model.optimizer._internal_apply_gradients(list(zip(g, v, strict=True))))


def plain_optimizer(keras: Any, model: Any) -> None:
    """Another optimizer for the same variables."""
    other = keras.optimizers.Adam(0.1)
    if hasattr(other, "apply"):
        apply(keras, model, other.apply)
    else:
        apply(keras, model, lambda gradients, variables: other.apply_gradients(zip(gradients, variables, strict=True)))


def recompiled(keras: Any, model: Any) -> None:
    """The model compiled anew, with an optimizer that nobody has distributed, while the other one is still there."""
    before = model.optimizer
    try:
        model.compile(keras.optimizers.SGD(0.1), loss="mse")
        fit(model)
    finally:
        model.compile(before, loss="mse")


def told_not_to_aggregate(keras: Any, model: Any) -> None:
    optimizer, told = model.optimizer, {"skip_gradients_aggregation": True}
    apply(keras, model, lambda g, v: optimizer.apply_gradients(zip(g, v, strict=True), **told))


def older_optimizer(keras: Any, model: Any) -> None:
    """One of Keras 2's older optimizers, which take their steps in another way."""
    older = keras.optimizers.legacy.SGD(0.1)
    apply(keras, model, lambda g, v: older.apply_gradients(zip(g, v, strict=True)))


def compiled_step(keras: Any, model: Any) -> None:
    """A step that ``torch.compile`` has made of the class's own."""
    import torch

    cls = keras.optimizers.SGD
    own = torch.compile(lambda optimizer, *arguments: cls.apply(optimizer, *arguments), backend="eager")
    apply(keras, model, lambda gradients, variables: own(model.optimizer, gradients, variables))


AROUND = "something called the step of SGD instead of the distributed optimizer's own"
ANOTHER = "{}, an optimizer that is not distributed, was used for variables of the distributed one"

STRAYS = {
    "step of the class": (step_of_the_class, AROUND),
    "inner step": (inner_step, AROUND),
    "plain optimizer": (plain_optimizer, ANOTHER.format("Adam")),
    "recompiled": (recompiled, ANOTHER.format("SGD")),
}
STRAYS_ON_TORCH = {**STRAYS, "compiled step": (compiled_step, AROUND)}
STRAYS_OF_KERAS_2 = {
    **STRAYS,
    "older optimizer": (older_optimizer, ANOTHER.format("SGD")),
    "told not to aggregate": (told_not_to_aggregate, "apply_gradients() was told not to aggregate gradients"),
}


def stray(strays: dict[str, Any], aggregated: bool) -> int:
    """Rank 1 strays in each of these ways, and then all ranks do; every time all ranks must stop with the error."""
    import harness
    from keras_job import assert_equal_bits, keras_and_hvd

    from adacons_hvd.engine.replicas import StrayStepError

    keras, hvd = keras_and_hvd()
    model = compiled(keras, distributed(keras, hvd, aggregated))
    fit(model)
    for name, (way, how) in strays.items():
        for ranks, named in (([1], "rank 1 took"), ([0, 1], "ranks 0-1 took")):
            before = model.get_weights()
            with pytest.raises(StrayStepError) as caught:
                way(keras, model) if harness.rank() in ranks else fit(model)
            assert named in str(caught.value), (name, str(caught.value))
            assert how in str(caught.value) or harness.rank() not in ranks, (name, str(caught.value))
            # It was noticed before anything was changed, and training can go on.
            assert all((old == new).all() for old, new in zip(before, model.get_weights(), strict=True)), name
        # But for TensorFlow's count of iterations, which depends on nothing that failed.
        fit(model)
        assert_equal_bits(model)
    return len(strays)


def stray_alone() -> float:
    """Rank 1 strays when the other ranks take no more steps."""
    import time

    import harness
    from keras_job import keras_and_hvd

    from adacons_hvd.engine.replicas import StrayStepError

    keras, hvd = keras_and_hvd()
    model = compiled(keras, distributed(keras, hvd))
    fit(model)
    start = time.monotonic()
    if harness.rank() == 1:
        from adacons_hvd.engine import replicas

        replicas.STRAY_SECONDS = 1.0
        with pytest.raises(StrayStepError, match="rank 1 took"):
            plain_optimizer(keras, model)
    return time.monotonic() - start


# --- replicas that have drifted apart ----------------------------------------------------------------


def drift() -> list[str]:
    """Variables change on rank 1 alone; the error of each case, or "" where there must be none."""
    import harness
    from keras_job import assert_equal_bits, keras_and_hvd

    from adacons_hvd.engine.replicas import CHECK_REPLICAS, ReplicaError

    keras, hvd = keras_and_hvd()
    mine = harness.rank() == 1

    def change(variable: Any) -> None:
        if mine:
            variable.assign(variable + 1e-3)

    def error_of(model: Any, steps: int = 4) -> str:
        try:
            fit(model, steps)
        except ReplicaError as error:
            return str(error)
        return ""

    found = []
    # In the middle of training; with and without an aggregator.
    for aggregated in (True, False):
        model = compiled(keras, distributed(keras, hvd, aggregated, check_replicas=2))
        fit(model)
        change(model.trainable_variables[1])
        found.append(error_of(model))
        # Made equal again, ranks train on.
        model.set_weights(harness.gather(model.get_weights())[0])
        fit(model)
        assert_equal_bits(model)
    # By default, variables that were never made equal are found at once.
    assert CHECK_REPLICAS == 100
    model = compiled(keras, distributed(keras, hvd))
    change(model.trainable_variables[0])
    found.append(error_of(model))
    # A variable that may differ, one that is local, and no check at all.
    model = compiled(keras, None)
    change(model.trainable_variables[0])
    model.compile(distributed(keras, hvd, may_differ=model.trainable_variables[:1]), loss="mse")
    found.append(error_of(model))
    model = compiled(keras, None)
    change(model.trainable_variables[0])
    partial = hvd.PartialDistributedOptimizer(keras.optimizers.SGD(0.01), local_layers=model.layers[0])
    model.compile(partial, loss="mse")
    found.append(error_of(model))
    model = compiled(keras, distributed(keras, hvd, check_replicas=0))
    change(model.trainable_variables[0])
    found.append(error_of(model))
    return found


def assert_drift_was_found(results: list[list[str]]) -> None:
    first, second = results
    assert first == second
    middle, without, start, *none = first
    for message in (middle, without):
        assert "rank 1 held other values than rank 0 in 1 of 4 parameters: dense#0/bias." in message
    assert "rank 1 held other values than rank 0 in " in start
    assert none == [""] * 3


# --- what is none of our business ----------------------------------------------------------------------


def on_purpose() -> list[str]:
    """Steps of one rank alone that are as they should be; what is warned of."""
    import warnings

    import harness
    from keras_job import assert_equal_bits, data, keras_and_hvd, network

    keras, hvd = keras_and_hvd()
    model = compiled(keras, distributed(keras, hvd))
    fit(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if harness.rank() == 0:
            # Another model, which rank 0 trains alone.
            other = network(keras)
            other.compile(keras.optimizers.SGD(0.01), loss="mse")
            other.fit(*data(16), batch_size=8, verbose=0)
            other.fit(*data(16), batch_size=8, verbose=0)
        messages = [str(w.message) for w in caught if "is not distributed" in str(w.message)]
        # Variables that are each rank's own, with an optimizer of its own.
        for own in ("local", "may differ"):
            mixed = network(keras)
            head = mixed.layers[1].trainable_variables
            optimizer = distributed(keras, hvd, may_differ=head if own == "may differ" else ())
            if own == "local":
                for variable in head:
                    optimizer.register_local_var(variable)
            mixed.compile(optimizer, loss="mse")
            mixed.fit(*data(16), batch_size=8, verbose=0)
            if harness.rank() == 1:
                apply(keras, mixed, _step(keras.optimizers.SGD(0.1)), head)
            mixed.fit(*data(16), batch_size=8, verbose=0)
        assert [str(w.message) for w in caught if "is not distributed" in str(w.message)] == messages
    # Two models with an optimizer each, as of a GAN, taking turns.
    one, two = (compiled(keras, distributed(keras, hvd)) for _ in range(2))
    for _ in range(2):
        fit(one, 1)
        fit(two, 1)
    for trained in (model, one, two):
        assert_equal_bits(trained, trained.optimizer)
    return messages


def _step(optimizer: Any) -> Any:
    if hasattr(optimizer, "apply"):
        return optimizer.apply
    return lambda gradients, variables: optimizer.apply_gradients(zip(gradients, variables, strict=True))


def with_tape() -> int:
    """A loop of tapes and a plain optimizer, for variables that a distributed one has trained before."""
    import tensorflow as tf
    from keras_job import assert_equal_bits, data, keras_and_hvd

    import adacons_hvd.tensorflow as tapes
    from adacons_hvd import AdaCons

    keras, hvd = keras_and_hvd()
    model = compiled(keras, distributed(keras, hvd))
    fit(model)
    x, y = data(8)
    plain = keras.optimizers.SGD(0.01)

    def train() -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x) - y))
        tape = tapes.DistributedGradientTape(tape, aggregator=AdaCons())
        gradients = tape.gradient(loss, model.trainable_variables)
        plain.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    for step in (train, tf.function(train)):
        step()
        step()
        assert_equal_bits(model)
    return int(plain.iterations.numpy())


class Guards:
    strays: dict[str, Any] = STRAYS

    @pytest.mark.parametrize("aggregated", [True, False], ids=["aggregator", "average"])
    def test_a_step_that_was_not_aggregated_stops_every_rank(self, cluster, aggregated):
        assert cluster.run(stray, self.strays, aggregated) == [len(self.strays)] * 2

    def test_replicas_that_have_drifted_apart_stop_every_rank(self, cluster):
        assert_drift_was_found(cluster.run(drift))

    def test_what_a_rank_does_alone_on_purpose(self, cluster):
        first, second = cluster.run(on_purpose)
        assert len(first) == 1
        assert first[0].startswith("SGD is not distributed, so its steps use gradients of rank 0 alone.")
        assert second == []

    def test_a_rank_that_strays_when_others_have_ended_does_not_wait_for_ever(self, cluster):
        seconds = cluster.run(stray_alone, fresh=True)
        assert 1 <= seconds[1] < 20


@pytest.mark.ranks(2, launcher=("mpi", "gloo"), soak={"mpi": (2,)}, pool="tensorflow")
class TestOnTensorFlow(Guards):
    def test_tapes_aggregate_for_plain_optimizers(self, cluster):
        assert cluster.run(with_tape) == [4, 4]


@pytest.mark.ranks(2, launcher="gloo", **ON_TORCH)
class TestOnTorch(Guards):
    strays = STRAYS_ON_TORCH


@pytest.mark.ranks(2, launcher="gloo", **KERAS_2)
class TestOfKeras2(Guards):
    strays = STRAYS_OF_KERAS_2

    def test_tapes_aggregate_for_plain_optimizers(self, cluster):
        assert cluster.run(with_tape) == [4, 4]
