"""A step's graph never goes through Python and is traced once; a restored memory is everyone's."""

from __future__ import annotations

import pytest

pytestmark = [
    pytest.mark.ranks(2, launcher=("mpi", "gloo"), soak={"mpi": (2,)}, pool="tensorflow"),
    pytest.mark.time_limit(120),
]


def test_nothing_goes_through_python_and_steps_are_traced_once(cluster):
    def trace() -> list:
        import keras
        import tensorflow as tf
        from keras_job import data, network

        import adacons_hvd.keras as keras_hvd
        import adacons_hvd.tensorflow as hvd
        from adacons_hvd import AdaCons

        hvd.init()
        model = network(keras)
        optimizer = keras_hvd.DistributedOptimizer(
            keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01)), aggregator=AdaCons(), schedule="one-pass"
        )
        weights = [tf.Variable(tf.ones((7, 3))), tf.Variable(tf.ones((30, 2)))]
        traces = []

        @tf.function
        def step(x, y, rows):
            traces.append(1)
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(model(x) - y))
            optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
            for schedule in ("two-pass", "one-pass", "gather"):
                with tf.GradientTape() as tape:
                    loss = tf.reduce_sum(weights[0]) + tf.reduce_sum(tf.gather(weights[1], rows))
                tape = hvd.DistributedGradientTape(tape, aggregator=AdaCons(), schedule=schedule)
                loss += tf.add_n([tf.reduce_sum(tf.convert_to_tensor(g)) for g in tape.gradient(loss, weights)])
            return loss

        x, y = data(8)
        optimizer.build(model.trainable_variables)
        for number in range(4):
            step(tf.constant(x), tf.constant(y), tf.constant([1, number]))
        graph = step.get_concrete_function(tf.constant(x), tf.constant(y), tf.constant([1, 2])).graph.as_graph_def()
        # Where something is wrong Python is asked for words, in the branch of a condition that ends with an error.
        errors = [
            f.signature.name for f in graph.library.function if {"PyFunc", "Assert"} <= {n.op for n in f.node_def}
        ]
        functions = [f for f in graph.library.function if f.signature.name not in errors]
        nodes = [*graph.node, *(node for function in functions for node in function.node_def)]
        assert all(node.op == "If" for node in nodes if any(name in str(node.attr) for name in errors))
        kinds = {node.op for node in nodes}
        assert {"HorovodAllreduce", "HorovodAlltoall", "HorovodAllgather"} <= kinds
        names = [node.name for node in nodes if node.op.startswith("Horovod")]
        assert len(names) > 20
        return [len(traces), sorted(kind for kind in kinds if "Py" in kind)]

    assert cluster.run(trace) == [[1, []]] * 2
