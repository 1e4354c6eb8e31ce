"""Every use of a Keras optimizer is held against a plain optimizer fed by the oracle."""

from __future__ import annotations

import pytest
from harness.launchers import KERAS_2, ON_TORCH

pytestmark = [pytest.mark.ranks(2, launcher="mpi", pool="tensorflow"), pytest.mark.time_limit(240)]

#: Steps that nothing is traced for, which is what takes long.
EAGERLY = {"run_eagerly": True}

#: What Keras does with gradients after they are aggregated. Together where Keras takes them together.
VARIANTS = {
    "clipnorm, moving average, rate schedule": {
        "make": "SGD(schedules.ExponentialDecay(0.1, 1, 0.5), clipnorm=0.1, use_ema=True, ema_momentum=0.5, "
        "ema_overwrite_frequency=2)",
    },
    "global_clipnorm, weight decay": {"make": "AdamW(0.01, weight_decay=0.5, global_clipnorm=0.3)", "fit": EAGERLY},
    # The length of a unit-long result is what could go wrong; an average follows its gradients.
    "clipvalue, loss_scale_factor": {
        "make": "SGD(0.05, clipvalue=0.1, loss_scale_factor=1024.0)",
        "scale": "unit",
        "fit": EAGERLY,
    },
    "gradient_accumulation_steps": {"make": "Adam(0.01, gradient_accumulation_steps=2)", "micro": 2, "fit": EAGERLY},
    "accumulation, then clipping": {
        "make": "SGD(0.05, gradient_accumulation_steps=2, global_clipnorm=0.3)",
        "micro": 2,
    },
    "backward_passes_per_step": {
        "make": "SGD(0.02)",
        "micro": 2,
        "summed": True,
        "backward_passes_per_step": 2,
    },
    "average_aggregated_gradients": {
        "make": "SGD(0.02)",
        "micro": 2,
        "backward_passes_per_step": 2,
        "average_aggregated_gradients": True,
        "fit": EAGERLY,
    },
    "steps_per_execution": {"make": "SGD(0.05)", "fit": {"steps_per_execution": 2}},
}


#: Of Keras 2 and of its older optimizers, which clip and add up in places of their own.
OF_KERAS_2 = {
    "clipnorm, moving average, rate schedule": VARIANTS["clipnorm, moving average, rate schedule"],
    **{name: VARIANTS[name] for name in ("global_clipnorm, weight decay", "backward_passes_per_step")},
    "average_aggregated_gradients": VARIANTS["average_aggregated_gradients"],
    "legacy Adam": {"make": "legacy.Adam(0.01)"},
    "legacy global_clipnorm": {"make": "legacy.SGD(0.05, momentum=0.9, global_clipnorm=0.3)", "fit": EAGERLY},
    "legacy backward_passes_per_step": {**VARIANTS["backward_passes_per_step"], "make": "legacy.SGD(0.02)"},
}


def train(variants: dict) -> list[str]:
    """Train by each of these; the names of those that took four steps."""
    from keras_job import beside_plain, keras_and_hvd

    keras, hvd = keras_and_hvd()
    optimizers = {name: getattr(keras.optimizers, name) for name in dir(keras.optimizers)}
    done = []
    for name, options in variants.items():
        more = dict(options)
        make = eval(f"lambda: {more.pop('make')}", optimizers)
        try:
            optimizer = beside_plain(keras, hvd, make, **more)
        except Exception as error:
            raise AssertionError(f"failed with {name}") from error
        # As in Horovod, a pass that only adds up is an iteration, too.
        iterations = 4 * options.get("backward_passes_per_step", 1)
        if optimizer.report.steps == 4 and int(optimizer.iterations.numpy()) == iterations:
            done.append(name)
    return done


def test_optimizer_options(cluster):
    assert cluster.run(train, VARIANTS) == [list(VARIANTS)] * 2


@pytest.mark.ranks(2, launcher="gloo", **ON_TORCH)
def test_optimizer_options_on_torch(cluster):
    variants = {name: options for name, options in VARIANTS.items() if name != "steps_per_execution"}
    assert cluster.run(train, variants) == [list(variants)] * 2


@pytest.mark.ranks(2, launcher="gloo", **KERAS_2)
def test_optimizer_options_of_keras_2(cluster):
    assert cluster.run(train, OF_KERAS_2) == [list(OF_KERAS_2)] * 2


def test_embeddings_with_repeated_rows(cluster):
    def embedded() -> int:
        import harness
        import keras
        import numpy as np
        from keras_job import beside_plain

        import adacons_hvd.keras as hvd

        def model_of(keras):
            layers = [keras.Input((3,), dtype="int32"), keras.layers.Embedding(20, 4), keras.layers.Flatten()]
            model = keras.Sequential([*layers, keras.layers.Dense(1)])
            rng = np.random.default_rng(3)
            model.set_weights([rng.standard_normal(w.shape) * 0.5 for w in model.get_weights()])
            return model

        def inputs(rows):
            rng = np.random.default_rng(harness.rank())
            # Every word several times, and other words on other ranks.
            return rng.integers(6 * harness.rank(), 6 * harness.rank() + 8, (rows, 3)), rng.random((rows, 1), "f4")

        hvd.init()
        done = [
            beside_plain(keras, hvd, lambda: keras.optimizers.SGD(0.1), model_of=model_of, inputs=inputs, **options)
            for options in ({"schedule": "one-pass"}, {"sparse_as_dense": True, "fit": EAGERLY})
        ]
        return len(done)

    assert cluster.run(embedded) == [2, 2]


def mixed(explicit: bool) -> list[float]:
    import numpy as np
    from keras_job import assert_equal_bits, data, keras_and_hvd, network

    from adacons_hvd import AdaCons

    keras, hvd = keras_and_hvd()
    keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        model = network(keras)
        inner = keras.optimizers.SGD(0.01)
        if explicit:
            optimizer = hvd.DistributedOptimizer(
                keras.mixed_precision.LossScaleOptimizer(inner, initial_scale=64.0),
                aggregator=AdaCons(),
                schedule="two-pass",
            )
        else:
            optimizer = hvd.DistributedOptimizer(inner, aggregator=AdaCons(), schedule="two-pass")
        model.compile(optimizer, loss="mse")
    finally:
        keras.mixed_precision.set_global_policy("float32")
    scaled = model.optimizer
    assert scaled.inner_optimizer.aggregator == AdaCons()
    x, y = data(32)
    if hvd.rank() == 1:
        y[8:16] = np.inf  # the second of four steps overflows, on this rank only
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    assert_equal_bits(model, scaled)
    assert all(np.isfinite(w).all() for w in model.get_weights())
    scale = scaled.dynamic_scale if hasattr(scaled, "dynamic_scale") else scaled.loss_scale
    return [float(scale.numpy()) / scaled.initial_scale, float(scaled.inner_optimizer.report.steps)]


def test_mixed_precision_skips_a_step_on_every_rank_together(cluster):
    # Keras' own first scale is so large that the first step overflows, too.
    assert cluster.run(mixed, False) == [[0.25, 2.0]] * 2
    assert cluster.run(mixed, True) == [[0.5, 3.0]] * 2


@pytest.mark.ranks(2, launcher="gloo", **ON_TORCH)
def test_mixed_precision_on_torch(cluster):
    assert cluster.run(mixed, False) == [[0.25, 2.0]] * 2
    assert cluster.run(mixed, True) == [[0.5, 3.0]] * 2


@pytest.mark.ranks(2, launcher="gloo", **KERAS_2)
def test_mixed_precision_of_keras_2(cluster):
    # It looks at gradients after they are aggregated, so every step counts.
    assert cluster.run(mixed, False) == [[0.25, 4.0]] * 2
    assert cluster.run(mixed, True) == [[0.5, 4.0]] * 2


def freeze(granularity: str) -> list[float]:
    import numpy as np
    from keras_job import assert_equal_bits, data, keras_and_hvd, network

    from adacons_hvd import AdaCons

    keras, hvd = keras_and_hvd()
    model = network(keras)
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.Adam(0.01), aggregator=AdaCons(), granularity=granularity, schedule="two-pass"
    )
    counts = []
    for trainable in (True, False, True):
        before = [np.array(w) for w in model.get_weights()]
        model.layers[0].trainable = trainable
        model.compile(optimizer, loss="mse")
        model.fit(*data(24), batch_size=8, verbose=0)
        changed = [bool((a != b).any()) for a, b in zip(before, model.get_weights(), strict=True)]
        assert changed == [trainable] * 2 + [True] * 2
        assert_equal_bits(model, optimizer)
        counts.append(optimizer._adacons.exchange.state_dict()["steps"].reshape(-1).tolist())
    return counts


def test_layers_frozen_midway(cluster):
    # What is remembered of a layer is kept while it is frozen.
    assert cluster.run(freeze, "layer") == [[[3] * 4, [6] * 2, [6] * 2 + [9] * 2]] * 2


@pytest.mark.ranks(2, launcher="gloo", **ON_TORCH)
def test_layers_frozen_midway_on_torch(cluster):
    assert cluster.run(freeze, "model") == [[[3], [6], [9]]] * 2


@pytest.mark.ranks(2, launcher="gloo", **KERAS_2)
def test_layers_frozen_midway_with_keras_2(cluster):
    assert cluster.run(freeze, "model") == [[[3], [6], [9]]] * 2


def test_a_rank_that_freezes_alone_is_an_error_everywhere(cluster):
    def freeze_alone() -> str:
        from keras_job import data, distributed, keras_and_hvd, network

        keras, hvd = keras_and_hvd()
        model = network(keras)
        optimizer = distributed(keras, hvd)
        model.compile(optimizer, loss="mse")
        model.fit(*data(8), batch_size=8, verbose=0)
        if hvd.rank() == 1:
            model.layers[0].trainable = False
            model.compile(optimizer, loss="mse")
        with pytest.raises(Exception, match="freeze") as caught:
            model.fit(*data(8), batch_size=8, verbose=0)
        return type(caught.value).__name__

    assert cluster.run(freeze_alone) == ["DisagreementError"] * 2


def test_a_rank_that_changes_back_alone_is_an_error_everywhere(cluster):
    """Every rank knows both sets of parameters, so none of them has anything new to agree on."""

    def change_back() -> str:
        from keras_job import apply, distributed, keras_and_hvd, network

        keras, hvd = keras_and_hvd()
        model = network(keras)
        everything = model.trainable_variables
        optimizer = distributed(keras, hvd)
        optimizer.build(everything)
        for variables in (everything, everything[2:]):
            apply(keras, model, optimizer.apply, variables)
        with pytest.raises(Exception, match="no longer train the same parameters") as caught:
            apply(keras, model, optimizer.apply, everything[2 * (1 - hvd.rank()) :])
        return type(caught.value).__name__

    assert cluster.run(change_back) == ["DisagreementError"] * 2


def disagree(difference: str) -> str:
    from keras_job import data, distributed, keras_and_hvd, network

    from adacons_hvd.agreement import DisagreementError

    keras, hvd = keras_and_hvd()
    model, optimizer = network(keras), distributed(keras, hvd)
    if hvd.rank() == 1 and difference == "parameters":
        model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(4), keras.layers.Dense(1)])
    if hvd.rank() == 1 and difference == "loss_scaling":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    model.compile(optimizer, loss="mse")
    with pytest.raises(DisagreementError) as caught:
        model.fit(*data(16), batch_size=8, verbose=0)
    return str(caught.value)


def assert_one_error(messages: list[str], difference: str) -> None:
    first, second = messages
    assert first.splitlines()[-3:] == second.splitlines()[-3:] or difference == "loss_scaling"
    assert "the ranks do not agree" in second
    assert difference in first
    assert "rank 0" in first
    assert "rank 1" in first


# About settings, see `tests/conformance`.
@pytest.mark.parametrize("difference", ["parameters", "loss_scaling"])
def test_ranks_that_disagree_get_an_error_at_the_first_step(cluster, difference):
    assert_one_error(cluster.run(disagree, difference), difference)


@pytest.mark.ranks(2, launcher="gloo", **ON_TORCH)
def test_ranks_that_disagree_on_torch(cluster):
    assert_one_error(cluster.run(disagree, "parameters"), "parameters")


@pytest.mark.ranks(2, launcher="gloo", **KERAS_2)
def test_ranks_that_disagree_with_keras_2(cluster):
    assert_one_error(cluster.run(disagree, "parameters"), "parameters")


def test_batches_of_other_sizes_retrace_on_one_rank_alone(cluster):
    def uneven() -> int:
        from keras_job import assert_equal_bits, data, distributed, keras_and_hvd, network

        keras, hvd = keras_and_hvd()
        traces = []

        class Counted(keras.Model):
            def __init__(self, inner):
                super().__init__()
                self.inner = inner

            def call(self, x):
                return self.inner(x)

            def train_step(self, batch):
                traces.append(1)
                return super().train_step(batch)

        model = Counted(network(keras))
        model.compile(distributed(keras, hvd), loss="mse")
        # Three steps everywhere, of 8, 8, 8 on rank 0 and of 8, 8, 3 on rank 1.
        model.fit(*data(24 if hvd.rank() == 0 else 19), batch_size=8, epochs=3, verbose=0)
        assert_equal_bits(model)
        return len(traces)

    traces = cluster.run(uneven)
    assert traces[0] == 1
    assert traces[1] <= 3


def test_several_optimizers_and_an_own_train_step(cluster):
    def adversarial() -> list[int]:
        import keras
        import tensorflow as tf
        from keras_job import assert_equal_bits, data, network

        import adacons_hvd.keras as hvd
        from adacons_hvd import AdaCons

        hvd.init()

        class Pair(keras.Model):
            def __init__(self):
                super().__init__()
                self.first, self.second = network(keras), network(keras)

            def call(self, x):
                return self.first(x) + self.second(x)

            def compile(self, one, other):
                super().compile(loss="mse")
                self.one, self.other = one, other

            def train_step(self, batch):
                x, y = batch
                with tf.GradientTape(persistent=True) as tape:
                    loss = tf.reduce_mean(tf.square(self(x) - y))
                    penalty = loss + tf.reduce_mean(tf.abs(self.second(x)))
                first, second = self.first.trainable_variables, self.second.trainable_variables
                self.one.apply_gradients(zip(tape.gradient(loss, first), first, strict=True))
                self.other.apply_gradients(zip(tape.gradient(penalty, second), second, strict=True))
                return {"loss": loss}

        options = {"aggregator": AdaCons(), "schedule": "two-pass"}  # one instance may serve several optimizers
        one = hvd.DistributedOptimizer(keras.optimizers.SGD(0.01), **options)
        other = hvd.DistributedOptimizer(keras.optimizers.Adam(0.01), **options)
        model = Pair()
        model.compile(one, other)
        model.fit(*data(24), batch_size=8, verbose=0)
        assert_equal_bits(model, other)
        return [one.report.steps, other.report.steps]

    assert cluster.run(adversarial) == [[3, 3], [3, 3]]


def test_local_layers_stay_each_ranks_own(cluster):
    def partial() -> bool:
        import harness
        import keras
        import numpy as np
        from keras_job import data, digest, network, own_gradients

        import adacons_hvd.keras as hvd
        from adacons_hvd import AdaCons

        hvd.init()
        for options in ({"aggregator": AdaCons()}, {}):
            model = network(keras)
            x, y = data(8)
            before = np.array(model.layers[0].get_weights()[0])
            mine = own_gradients(model, x, y)[0]
            optimizer = hvd.PartialDistributedOptimizer(
                keras.optimizers.SGD(1.0), local_layers=model.layers[0], **options
            )
            model.compile(optimizer, loss="mse")
            model.fit(x, y, batch_size=8, verbose=0)
            # As in Horovod, as long as its share of an average.
            np.testing.assert_allclose(model.layers[0].get_weights()[0], before - mine / hvd.size(), atol=1e-5)
            shared = set(harness.gather(digest(model.layers[1].get_weights())))
            own = set(harness.gather(digest(model.layers[0].get_weights())))
            assert len(shared) == 1
            assert len(own) == 2
        return True

    assert cluster.run(partial) == [True, True]


def test_without_an_aggregator_gradients_are_averaged_or_added(cluster):
    def plain() -> bool:
        import harness
        import keras
        import numpy as np
        from keras_job import assert_equal_bits, data, network, own_gradients

        import adacons_hvd.keras as hvd

        hvd.init()
        model = network(keras)
        x, y = data(8)
        # Each operation by itself, in groups and in half precision; the plain average is everywhere else.
        for op, factor, more in (
            (hvd.Average, 1 / hvd.size(), {"groups": 2}),
            (hvd.Average, 1 / hvd.size(), {"compression": hvd.Compression.fp16}),
            (hvd.Sum, 1.0, {}),
        ):
            before = [np.array(w) for w in model.get_weights()]
            everyone = harness.gather(own_gradients(model, x, y))
            optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), op=op, check_replicas=0, **more)
            model.compile(optimizer, loss="mse", **EAGERLY)
            model.fit(x, y, batch_size=8, verbose=0)
            for k, weight in enumerate(model.get_weights()):
                expected = before[k] - 0.1 * factor * sum(worker[k] for worker in everyone)
                np.testing.assert_allclose(
                    weight,
                    expected,
                    rtol=1e-2 if "compression" in more else 1e-5,
                    atol=1e-2 if "compression" in more else 1e-6,
                )
            assert_equal_bits(model)
        return True

    assert cluster.run(plain) == [True, True]
