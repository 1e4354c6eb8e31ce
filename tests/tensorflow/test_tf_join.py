"""Ranks that run out of data leave with hvd.join(), and the others go on among themselves."""

from __future__ import annotations

import pytest

pytestmark = [
    pytest.mark.ranks(3, launcher=("mpi", "gloo"), pool="tensorflow"),
    pytest.mark.time_limit(180),
]

STEPS = [2, 4, 3]


def test_without_an_aggregator_those_who_left_count_as_zeros(cluster):
    """As in Horovod. With one, `tests/conformance` has ranks join."""

    def uneven() -> bool:
        import harness
        import numpy as np
        import oracle
        import tensorflow as tf
        from tf_job import array

        import adacons_hvd.tensorflow as hvd

        hvd.init()
        rank = hvd.rank()
        for in_graph in (True, False):
            model = [tf.Variable(tf.ones((12, 4))), tf.Variable(tf.ones((4, 1)))]

            def step(words, distributed=True):
                with tf.GradientTape() as tape:
                    loss = tf.reduce_mean(tf.matmul(tf.gather(model[0], words), model[1]))  # noqa: B023
                tape = hvd.DistributedGradientTape(tape) if distributed else tape
                return tape.gradient(loss, model)  # noqa: B023

            function = tf.function(step) if in_graph else step
            own = np.random.default_rng(10 + rank)
            raw, found = [], []
            for _ in range(STEPS[rank]):
                words = tf.constant(own.integers(2 * rank, 2 * rank + 6, 7))
                raw.append([array(g, v) for g, v in zip(step(words, False), model, strict=True)])
                found.append([array(g, v) for g, v in zip(function(words), model, strict=True)])
            hvd.join()
            everyone = harness.gather((raw, found))
            for number in range(max(STEPS)):
                here = [theirs for theirs, steps in zip(everyone, STEPS, strict=True) if number < steps]
                expected = [sum(theirs[number][i] for theirs, _ in here) / 3 for i in range(2)]
                assert all(oracle.error(found[number], expected) < 1e-5 for _, found in here)
        return True

    assert cluster.run(uneven) == [True] * 3


@pytest.mark.ranks(2, launcher="gloo", pool="tensorflow")
def test_what_cannot_go_on_says_so(cluster):
    def refuse() -> list[str]:
        import tensorflow as tf

        import adacons_hvd.tensorflow as hvd
        from adacons_hvd import Aggregator, Curvature

        class ByGramian(Aggregator):
            needs_gramian = True

            def weights(self, statistics):
                return tf.ones_like(statistics.squares) / 2

        hvd.init()
        weights, more = tf.Variable([1.0, 2.0]), tf.Variable([3.0])

        by_gramian = ByGramian()

        def step(variables, aggregator=by_gramian):
            with tf.GradientTape() as tape:
                loss = tf.add_n([tf.reduce_sum(v) for v in variables]) * (hvd.rank() + 1.0)
            tape = hvd.DistributedGradientTape(tape, aggregator=aggregator)
            return tape.gradient(loss, variables)

        step([weights])
        history = Curvature(2, workers=False)
        step([weights], history)
        messages = []
        if hvd.rank() != 1:
            with pytest.raises(RuntimeError) as gramian:
                step([weights])
            with pytest.raises(RuntimeError) as past:
                step([weights], history)
            with pytest.raises(RuntimeError) as another:
                step([weights, more])
            messages = [str(gramian.value), str(past.value), str(another.value)]
        hvd.join()
        return messages

    # Ranks have not numbered alike what they refused, so nobody can go on with these processes.
    messages, none = cluster.run(refuse, fresh=True)
    assert none == []
    assert "needs the Gramian" in messages[0]
    assert "and rank 1 did" in messages[0]
    assert "needs the mean gradients of earlier steps, which cannot be had once a rank has called" in messages[1]
    assert "rank 1 called hvd.join(); new parameters cannot be agreed on" in messages[2]
