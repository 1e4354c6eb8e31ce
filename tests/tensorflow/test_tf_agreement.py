"""Ranks whose tapes differ all get an error, and checkpoints hold what tapes remember."""

from __future__ import annotations

import pytest

pytestmark = [
    pytest.mark.ranks(2, launcher=("mpi", "gloo"), soak={"mpi": (2,)}, pool="tensorflow"),
    pytest.mark.time_limit(120),
]


def test_a_checkpoint_holds_what_two_tapes_remember(cluster, tmp_path):
    def resume(folder: str) -> list[float]:
        import gc

        import numpy as np
        import tensorflow as tf
        from tf_job import fixed_gradients, pulling

        import adacons_hvd.tensorflow as hvd
        from adacons_hvd import AdaCons

        hvd.init()
        gc.collect()  # tapes of what is not there any more are not saved

        def training(weights):
            tapes = []

            def step(fixed):
                for schedule in ("one-pass", "gather"):
                    with tf.GradientTape() as tape:
                        loss = pulling(weights, fixed)
                    tape = hvd.DistributedGradientTape(tape, aggregator=AdaCons(momentum=0.9), schedule=schedule)
                    tapes.append(tape)
                    for weight, gradient in zip(weights, tape.gradient(loss, weights), strict=True):
                        weight.assign_sub(0.1 * gradient)

            graph = tf.function(step, autograph=False)

            def steps(numbers):
                for number in numbers:
                    graph([tf.constant(g) for g in fixed_gradients(hvd.rank(), number, [(5,), (3, 2)])])
                return tapes[-1].report

            return steps

        def fresh():
            return [tf.Variable(tf.ones(5)), tf.Variable(tf.ones((3, 2)))]

        weights = fresh()
        checkpoint = tf.train.Checkpoint(weights=weights, tapes=hvd.TapeState())
        steps = training(weights)
        steps(range(3))
        path = checkpoint.write(f"{folder}/{hvd.rank()}")
        steps(range(3, 6))
        expected = [weight.numpy() for weight in weights]
        # Into the same process, and into one that has taken no step yet.
        checkpoint.read(path)
        assert steps(range(3, 6)).steps == 6
        same = [bool((a == b.numpy()).all()) for a, b in zip(expected, weights, strict=True)]
        del weights, checkpoint, steps
        gc.collect()
        other = fresh()
        tf.train.Checkpoint(weights=other, tapes=hvd.TapeState()).read(path)
        assert training(other)(range(3, 6)).steps == 6
        return [*same, *(bool(np.all(a == b.numpy())) for a, b in zip(expected, other, strict=True))]

    assert cluster.run(resume, str(tmp_path)) == [[True] * 4] * 2


def test_a_graph_for_workers_who_were_there_before_is_refused(cluster):
    def start_over() -> list[float]:
        import tensorflow as tf

        import adacons_hvd.tensorflow as hvd
        from adacons_hvd import AdaCons
        from adacons_hvd.tensorflow import reducer

        hvd.init()
        weights = tf.Variable([1.0, 2.0])

        @tf.function
        def step():
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(weights * weights)
            return hvd.DistributedGradientTape(tape, aggregator=AdaCons(scale="average")).gradient(loss, weights)

        concrete = step.get_concrete_function()
        found = [concrete()]
        reducer.start_over()  # what an elastic job does when workers have come or gone
        with pytest.raises(tf.errors.InvalidArgumentError, match="it has to be traced again"):
            concrete()
        found.append(step())
        return [value for gradient in found for value in gradient.numpy().tolist()]

    assert cluster.run(start_over) == [[2.0, 4.0, 2.0, 4.0]] * 2
