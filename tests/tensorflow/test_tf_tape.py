"""DistributedGradientTape: the method itself, by every schedule, eagerly and in graphs."""

from __future__ import annotations

from typing import Any

import pytest
from harness.launchers import MORE_RANKS

pytestmark = pytest.mark.time_limit(300)

SETTINGS: list[dict[str, Any]] = [
    {"momentum": 0.99, "normalize": True, "scale": "unit"},
    {"momentum": 0.0, "normalize": True, "scale": "average"},
    {"momentum": 0.9, "normalize": False, "scale": "unit"},
]
SCHEDULES = ["two-pass", "one-pass", "gather"]

Case = tuple[dict[str, Any], dict[str, Any]]


def train(steps: int, cases: list[Case], in_graph: bool) -> int:
    """Train a set of variables for every case, all in the same steps, and judge each."""
    import numpy as np
    import tensorflow as tf
    from tf_job import array, assert_equal_bits, fixed_gradients, judge, make_variables, pulling

    import adacons_hvd.tensorflow as hvd
    from adacons_hvd import AdaCons

    hvd.init()
    models = [make_variables() for _ in cases]
    aggregators = [AdaCons(**settings) for settings, _ in cases]
    traces = []

    def step(*fixed):
        traces.append(1)
        everything = []
        for variables, aggregator, (_, options) in zip(models, aggregators, cases, strict=True):
            with tf.GradientTape() as tape:
                loss = pulling(variables, fixed)
            compression = getattr(hvd.Compression, options.get("compression", "none"))
            options = {**options, "compression": compression, "bucket_bytes": 150}
            tape = hvd.DistributedGradientTape(tape, aggregator=aggregator, **options)
            gradients = tape.gradient(loss, variables)
            for variable, gradient in zip(variables, gradients, strict=True):
                variable.assign_sub(0.05 * gradient)
            everything.append(gradients)
        return everything

    function = tf.function(step) if in_graph else step
    raw: list[list[Any]] = [[] for _ in cases]
    found: list[list[Any]] = [[] for _ in cases]
    for number in range(steps):
        fixed = fixed_gradients(hvd.rank(), number)
        for k, variables in enumerate(models):
            raw[k].append([np.float64(g) + np.float64(v.numpy()) for g, v in zip(fixed, variables, strict=True)])
        for k, gradients in enumerate(function(*map(tf.constant, fixed))):
            found[k].append([array(g, v) for g, v in zip(gradients, models[k], strict=True)])
    assert len(traces) == (1 if in_graph else steps)
    for k, (settings, options) in enumerate(cases):
        tolerance = 5e-3 if "compression" in options else 1e-5
        judge(raw[k], found[k], layerwise=options.get("granularity") == "layer", tolerance=tolerance, **settings)
    assert_equal_bits([variable for variables in models for variable in variables])
    return len(cases)


@pytest.mark.ranks(2, 3, 4, launcher=("mpi", "gloo"), soak=MORE_RANKS, pool="tensorflow")
def test_gradients_in_a_graph_agree_with_the_oracle(cluster):
    cases: list[Case] = [(settings, {"schedule": name}) for settings, name in zip(SETTINGS, SCHEDULES, strict=True)]
    cases += [(SETTINGS[0], {"schedule": "one-pass", "granularity": "layer"})]
    cases += [(SETTINGS[0], {"schedule": "gather", "compression": "fp16"})]
    assert cluster.run(train, 10, cases, True) == [len(cases)] * cluster.ranks


@pytest.mark.ranks(2, 3, 4, launcher=("mpi", "gloo"), soak=MORE_RANKS, pool="tensorflow")
def test_eager_gradients_agree_with_the_oracle(cluster):
    cases: list[Case] = [(SETTINGS[0], {"schedule": name}) for name in SCHEDULES]
    cases += [(SETTINGS[0], {"schedule": name, "compression": "fp16"}) for name in ("two-pass", "one-pass")]
    assert cluster.run(train, 10, cases, False) == [len(cases)] * cluster.ranks


@pytest.mark.ranks(2, launcher="mpi", pool="tensorflow")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_is_sent_is_what_was_asked_for(cluster, schedule):
    """Told by what gets lost: an element too small for half precision, one that a compressor of the
    user's drops, and a sum that a predivide factor makes too large for half precision."""

    def sent() -> list[bool]:
        import numpy as np
        import tensorflow as tf

        import adacons_hvd.tensorflow as hvd
        from adacons_hvd import AdaCons

        hvd.init()

        class FirstOnly(hvd.Compression.none):
            @staticmethod
            def compress(tensor):
                return tensor * tf.constant([1.0, 0.0]), None

            @staticmethod
            def decompress(tensor, ctx):
                return tensor

        def aggregated(*pulls, **options):
            weights = [tf.Variable(tf.zeros_like(pull)) for pull in pulls]
            with tf.GradientTape() as tape:
                products = [weight * pull for weight, pull in zip(weights, pulls, strict=True)]
                loss = tf.add_n([tf.reduce_sum(tf.cast(product, tf.float32)) for product in products])
            tape = hvd.DistributedGradientTape(tape, aggregator=AdaCons(), schedule=schedule, **options)
            return [gradient.numpy() for gradient in tape.gradient(loss, weights)]

        small = tf.constant([1.0, 1e-9])
        long = tf.constant([4000.0], tf.float16)
        of_small, of_long = aggregated(small, long)
        (halved,) = aggregated(small, compression=hvd.Compression.fp16)
        (first,) = aggregated(small, compression=FirstOnly)
        (predivided,) = aggregated(long, gradient_predivide_factor=1 / 64)
        return [
            bool(of_small[1] > 0),
            bool(halved[1] == 0),
            bool(first[1] == 0),
            bool(np.isfinite(of_long).all()),
            bool(np.isfinite(predivided).all()),
        ]

    # Only sums are predivided.
    assert cluster.run(sent) == [[True, True, True, True, schedule != "two-pass"]] * 2


@pytest.mark.ranks(2, launcher="mpi", pool="tensorflow")
def test_groups_travel_together_and_the_rest_alone(cluster):
    def parcels() -> list[list[list[int]]]:
        import tensorflow as tf

        import adacons_hvd.tensorflow as hvd
        from adacons_hvd import AdaCons

        hvd.init()
        found = []
        for number, groups in enumerate((None, 2, [[0, 2]])):
            variables = [tf.Variable([1.0, 2.0]) for _ in range(4)]
            given = [[variables[i] for i in group] for group in groups] if isinstance(groups, list) else groups
            with tf.GradientTape() as tape:
                loss = tf.add_n([tf.reduce_sum(v) for v in variables])
            tape = hvd.DistributedGradientTape(tape, groups=given, aggregator=AdaCons(), name=f"case {number}")
            tape.gradient(loss, variables)
            found.append(sorted(sorted(slot.index for slot in p.slots) for p in tape._reducer.session().last.packings))
        return found

    assert cluster.run(parcels) == [[[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0, 2], [1], [3]]]] * 2


@pytest.mark.ranks(2, launcher="mpi", pool="tensorflow")
def test_a_shard_that_is_all_padding_is_still_exchanged(cluster):
    """One element is the shard of one rank; the other has no use for what it receives, and a graph might drop it."""

    def tiny() -> float:
        import tensorflow as tf
        from tf_job import assert_equal_bits

        import adacons_hvd.tensorflow as hvd
        from adacons_hvd import AdaCons

        hvd.init()
        weight = tf.Variable([1.0])

        @tf.function
        def step():
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(weight) * (hvd.rank() + 1)
            tape = hvd.DistributedGradientTape(tape, aggregator=AdaCons(scale="average"), schedule="one-pass")
            weight.assign_sub(0.01 * tape.gradient(loss, weight))

        for _ in range(5):
            step()
        assert_equal_bits([weight])
        return round(float(weight.numpy()[0]), 5)

    # All gradients have one direction, so the result is their average, 1.5.
    assert cluster.run(tiny, timeout=90) == [0.925] * 2
