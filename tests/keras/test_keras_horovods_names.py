"""Loops written for Horovod with Keras 2: ``compute_gradients`` aggregates, and ``apply_gradients`` does not again."""

from __future__ import annotations

from typing import Any

import pytest
from harness.launchers import KERAS_2
from keras_job import compiled, fit

pytestmark = [pytest.mark.ranks(2, launcher="gloo", **KERAS_2), pytest.mark.time_limit(240)]

#: Optimizers, and what apply_gradients is told so that it does not aggregate.
KINDS = {
    "SGD": ("SGD(0.5)", {"skip_gradients_aggregation": True}),
    "legacy SGD": ("legacy.SGD(0.5)", {"experimental_aggregate_gradients": False}),
    "LossScaleOptimizer": ("scaled(SGD(0.5))", {"skip_gradients_aggregation": True}),
    "legacy LossScaleOptimizer": ("scaled(legacy.SGD(0.5))", {"experimental_aggregate_gradients": False}),
}


def make(keras: Any, kind: str) -> tuple[Any, dict[str, Any]]:
    names = {name: getattr(keras.optimizers, name) for name in ("SGD", "legacy")}
    expression, told = KINDS[kind]
    return eval(expression, {**names, "scaled": keras.mixed_precision.LossScaleOptimizer}), told


#: Loops: in a graph or eagerly, with a tape of one's own or a function, changing what is computed or not, adding up so
#: many steps, with an aggregator or an average.
LOOPS = {
    "eager, tape": (False, True, False, 1, True),
    "graph, function, two passes": (True, False, False, 2, True),
    "graph, tape, halved, average": (True, True, True, 1, False),
    "eager, function, halved, two passes, average": (False, False, True, 2, False),
    "graph, function, halved, two passes": (True, False, True, 2, True),
    "eager, function, average": (False, False, False, 1, False),
}


def loop(keras: Any, hvd: Any, kind: str, how: tuple[bool, bool, bool, int, bool]) -> None:
    """Four steps of one variable, whose gradient is 1 on rank 0 and 2 on rank 1: averaged 1.5, and by AdaCons 1."""
    import harness
    import numpy as np
    import tensorflow as tf

    from adacons_hvd import AdaCons

    in_graph, tape, halved, passes, aggregated = how
    plain, told = make(keras, kind)
    scales = hasattr(plain, "get_scaled_loss")
    aggregator = AdaCons() if aggregated else None
    options = {"aggregator": aggregator, "schedule": "two-pass", "check_replicas": 0}  # which is traced soonest
    optimizer = hvd.DistributedOptimizer(plain, backward_passes_per_step=passes, **options)
    slope, x = 1.0 + harness.rank(), tf.Variable([0.0])

    def take() -> None:
        if tape and not scales:
            with tf.GradientTape() as own:
                loss = x * slope
            pairs = optimizer._compute_gradients(loss, [x], tape=own)
        else:
            pairs = optimizer._compute_gradients(lambda: x * slope, var_list=[x])
        if halved:
            # As by clipping: not what compute_gradients() returned, but equal on all ranks.
            optimizer.apply_gradients([(gradient * 0.5, variable) for gradient, variable in pairs], **told)
        else:
            optimizer.apply_gradients(pairs)

    run = tf.function(take, autograph=False) if in_graph else take
    for step in range(4):
        run()
        if passes > 1:
            assert optimizer._agg_helper.counter.numpy() == (step + 1) % passes
            assert optimizer._agg_helper.backward_passes_per_step == passes
        else:
            assert optimizer._agg_helper is None
    assert optimizer.iterations.numpy() == 4
    first, second = harness.gather(x.numpy())
    assert first == second
    # AdaCons' result has length one, however many gradients were added up; an average is of their sum.
    length = 4 / passes if aggregated else 4 * 1.5
    np.testing.assert_allclose(first, [-0.5 * length * (0.5 if halved else 1)], rtol=1e-5)


def loops(kind: str) -> list[str]:
    from keras_job import keras_and_hvd

    keras, hvd = keras_and_hvd()
    for name, how in LOOPS.items():
        try:
            loop(keras, hvd, kind, how)
        except Exception as error:
            raise AssertionError(f"failed: {name}") from error
    return list(LOOPS)


def looked_at() -> list[str]:
    """Gradients that are only looked at do not make the next step one of this rank alone."""
    import warnings

    import tensorflow as tf
    from keras_job import apply, assert_equal_bits, distributed, keras_and_hvd

    keras, hvd = keras_and_hvd()

    def look(passes: int) -> tuple[Any, Any]:
        optimizer = distributed(keras, hvd, False, backward_passes_per_step=passes, check_replicas=0)
        model = compiled(keras, optimizer)
        for _ in range(passes):
            optimizer._compute_gradients(lambda: tf.reduce_sum(model(tf.ones((2, 6)))), model.trainable_variables)
        return model, optimizer

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for passes in (1, 2):
            model, optimizer = look(passes)
            assert_equal_bits(fit(model, 2), optimizer)
        # Only where other gradients are given to it next is there any doubt.
        model, optimizer = look(1)
        apply(keras, model, lambda g, v: optimizer.apply_gradients(zip(g, v, strict=True)))
    assert_equal_bits(fit(model, 2), optimizer)
    return [str(w.message) for w in caught if "compute_gradients" in str(w.message)]


def others() -> list[bool]:
    """Horovod's other entrances: ``_allreduce`` and ``get_gradients``, which only older optimizers have."""
    import numpy as np
    import tensorflow as tf
    from keras_job import keras_and_hvd

    keras, hvd = keras_and_hvd()
    older = hvd.DistributedOptimizer(keras.optimizers.legacy.SGD(1.0))
    x = tf.Variable([0.0])
    (mean,) = older._allreduce([tf.constant([1.0 + hvd.rank()])], [x])
    older.apply_gradients([(mean, x)])
    np.testing.assert_allclose(x.numpy(), [-1.5])
    return [hasattr(older, "get_gradients"), hasattr(hvd.DistributedOptimizer(keras.optimizers.SGD()), "get_gradients")]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_computed_first_are_aggregated_once(cluster, kind):
    assert cluster.run(loops, kind) == [list(LOOPS)] * 2


def test_gradients_that_are_only_looked_at(cluster):
    first, second = cluster.run(looked_at)
    assert first == second
    assert len(first) == 1
    assert first[0].startswith("these are not the gradients that compute_gradients() returned, so they are aggregated.")


def test_horovods_other_entrances(cluster):
    assert cluster.run(others) == [[True, False]] * 2
