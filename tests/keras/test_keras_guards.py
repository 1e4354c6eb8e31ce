"""What a rank may do alone on purpose, and how long one that strays waits for others; in all three Kerases.

That a rank that trains alone is noticed, `tests/conformance` holds against every binding.
"""

from __future__ import annotations

from typing import Any

import pytest
from harness.launchers import KERAS_2, ON_TORCH
from keras_job import apply, compiled, distributed, fit

pytestmark = pytest.mark.time_limit(240)


def step_of_a_plain_optimizer(keras: Any) -> Any:
    optimizer = keras.optimizers.SGD(0.1)
    if hasattr(optimizer, "apply"):
        return optimizer.apply
    return lambda gradients, variables: optimizer.apply_gradients(zip(gradients, variables, strict=True))


def stray_alone() -> float:
    """Rank 1 strays when the other rank takes no more steps for a while; how long it waits."""
    import time

    import harness
    from keras_job import assert_equal_bits, keras_and_hvd

    from adacons_hvd.engine import replicas
    from adacons_hvd.engine.replicas import StrayStepError

    keras, hvd = keras_and_hvd()
    model = compiled(keras, distributed(keras, hvd))
    fit(model)
    start, limit = time.monotonic(), replicas.STRAY_SECONDS
    if harness.rank() == 1:
        replicas.STRAY_SECONDS = 1.0
        with pytest.raises(StrayStepError, match="rank 1 took"):
            apply(keras, model, step_of_a_plain_optimizer(keras))
        replicas.STRAY_SECONDS = limit
    seconds = time.monotonic() - start
    harness.gather(None)
    # The other one hears of it in its next step, and both can go on.
    if harness.rank() == 0:
        with pytest.raises(StrayStepError, match="rank 1 took"):
            fit(model)
    harness.gather(None)
    fit(model)
    assert_equal_bits(model)
    return seconds


def on_purpose() -> list[str]:
    """Steps of one rank alone that are as they should be; what is warned of."""
    import warnings

    import harness
    from keras_job import assert_equal_bits, data, keras_and_hvd, network

    keras, hvd = keras_and_hvd()
    # Without an aggregator, which nothing here asks for.
    model = fit(compiled(keras, distributed(keras, hvd, False), run_eagerly=True), 1)
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
            optimizer = distributed(keras, hvd, False, check_replicas=1, may_differ=head if own == "may differ" else ())
            if own == "local":
                for variable in head:
                    optimizer.register_local_var(variable)
            mixed.compile(optimizer, loss="mse")
            mixed.fit(*data(16), batch_size=8, verbose=0)
            if harness.rank() == 1:
                apply(keras, mixed, step_of_a_plain_optimizer(keras), head)
            mixed.fit(*data(16), batch_size=8, verbose=0)
        assert [str(w.message) for w in caught if "is not distributed" in str(w.message)] == messages
    # Two models with an optimizer each, as of a GAN, taking turns.
    one, two = (compiled(keras, distributed(keras, hvd, False)) for _ in range(2))
    for _ in range(2):
        fit(one, 1)
        fit(two, 1)
    for trained in (model, one, two):
        assert_equal_bits(trained, trained.optimizer)
    return messages


def with_tape() -> int:
    """A loop of tapes and a plain optimizer, for variables that a distributed one has trained before."""
    import tensorflow as tf
    from keras_job import assert_equal_bits, data, keras_and_hvd

    import adacons_hvd.tensorflow as tapes
    from adacons_hvd import AdaCons

    keras, hvd = keras_and_hvd()
    model = fit(compiled(keras, distributed(keras, hvd, False), run_eagerly=True), 1)
    x, y = data(8)
    plain = keras.optimizers.SGD(0.01)

    def train() -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x) - y))
        tape = tapes.DistributedGradientTape(tape, aggregator=AdaCons(), schedule="two-pass")
        gradients = tape.gradient(loss, model.trainable_variables)
        plain.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    for step in (train, tf.function(train)):
        step()
        step()
        assert_equal_bits(model)
    return int(plain.iterations.numpy())


class OnPurpose:
    def test_what_a_rank_does_alone_on_purpose(self, cluster):
        first, second = cluster.run(on_purpose)
        assert len(first) == 1
        assert first[0].startswith("SGD is not distributed, so its steps use gradients of rank 0 alone.")
        assert second == []


class Alone:
    def test_a_rank_that_strays_when_others_have_ended_does_not_wait_for_ever(self, cluster):
        assert 1 <= cluster.run(stray_alone)[1] < 20


class Tapes:
    def test_tapes_aggregate_for_plain_optimizers(self, cluster):
        assert cluster.run(with_tape) == [4, 4]


@pytest.mark.ranks(2, launcher=("mpi", "gloo"), soak={"mpi": (2,)}, pool="tensorflow")
class TestOnTensorFlow(OnPurpose, Alone, Tapes): ...


@pytest.mark.ranks(2, launcher="gloo", **ON_TORCH)
class TestOnTorch(OnPurpose, Alone): ...


# It strays as Keras 3 does on TensorFlow.
@pytest.mark.ranks(2, launcher="gloo", **KERAS_2)
class TestOfKeras2(OnPurpose, Tapes): ...
