"""Tapes compare what a layout holds of variables that are meant to be equal, eagerly and in graphs.

That a rank that trains alone is noticed, `tests/conformance` holds against every binding.
"""

from __future__ import annotations

import pytest

pytestmark = [
    pytest.mark.ranks(2, launcher=("mpi", "gloo"), soak={"mpi": (2,)}, pool="tensorflow"),
    pytest.mark.parametrize("in_graph", [True, False], ids=["graph", "eager"]),
    pytest.mark.time_limit(120),
]


def test_what_is_no_variable_of_all_is_not_compared(cluster, in_graph):
    def train(in_graph: bool) -> None:
        import tensorflow as tf
        from tf_job import assert_equal_bits

        import adacons_hvd.tensorflow as hvd
        from adacons_hvd import AdaCons

        hvd.init()
        rank = float(hvd.rank())
        # A source that is no variable has no value to compare, and a local one is each rank's own.
        weight, local, inputs = tf.Variable([1.0, 2.0]), tf.Variable([rank]), tf.constant([1.0 + rank, 3.0])

        def step() -> None:
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                loss = tf.reduce_sum(weight * inputs) + tf.reduce_sum(local * local)
            tape = hvd.DistributedGradientTape(tape, aggregator=AdaCons())
            tape.register_local_source(local)
            weight.assign_sub(0.1 * tape.gradient(loss, [weight, inputs, local])[0])

        take = tf.function(step, autograph=False) if in_graph else step
        for _ in range(3):
            take()
        assert_equal_bits([weight])

    cluster.run(train, in_graph)


def test_each_layout_is_compared_by_itself(cluster, in_graph):
    def change(in_graph: bool) -> list[str]:
        import tensorflow as tf
        from tf_job import assert_equal_bits

        import adacons_hvd.tensorflow as hvd
        from adacons_hvd import AdaCons
        from adacons_hvd.engine.replicas import ReplicaError
        from adacons_hvd.tensorflow.errors import decoded

        hvd.init()
        variables = [tf.Variable(tf.ones(shape), name=name) for shape, name in (((3, 3), "a"), (5, "b"), (2, "c"))]

        def step(used: int = 3, asked: int = 3) -> None:
            with tf.GradientTape() as tape:
                loss = tf.add_n([tf.reduce_sum(v * v) for v in variables[:used]]) * (1.0 + hvd.rank())
            tape = hvd.DistributedGradientTape(tape, aggregator=AdaCons(momentum=0.9))
            for variable, gradient in zip(variables, tape.gradient(loss, variables[:asked]), strict=False):
                if gradient is not None:
                    variable.assign_sub(0.01 * gradient)

        take, texts = tf.function(step, autograph=False) if in_graph else step, []

        def error(*arguments: int) -> str:
            with pytest.raises(tf.errors.InvalidArgumentError if in_graph else ReplicaError) as caught:
                take(*arguments)
            return str(decoded(caught.value) if in_graph else caught.value)

        # Variables without a gradient, fewer variables, a gradient where there was none.
        for arguments in ((2, 3), (2, 2), (3, 3)):
            take(*arguments)
            if hvd.rank():
                variables[1].assign_add(tf.one_hot(3, 5) * 1e-6)
            texts += [error(*arguments), error(*arguments)]  # a step that ends with an error does not count
            hvd.broadcast_variables(variables, root_rank=0)
            take(*arguments)
        assert_equal_bits(variables)
        return texts

    first, second = cluster.run(change, in_graph)
    assert first == second
    for text, of in zip(first, (3, 3, 2, 2, 3, 3), strict=True):
        assert f"before step 2 rank 1 held other values than rank 0 in 1 of {of} parameters: b." in text
