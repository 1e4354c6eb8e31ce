"""Ranks that run out of data leave with hvd.join(), and the others go on among themselves."""

from __future__ import annotations

import pytest

pytestmark = [
    pytest.mark.ranks(3, launcher=("mpi", "gloo"), pool="tensorflow"),
    pytest.mark.time_limit(180),
]

#: (schedule, whether one variable's gradient is sparse, whether there is an aggregator)
CASES = [
    ("one-pass", False, True),
    ("one-pass", True, True),
    ("gather", False, True),
    ("two-pass", True, True),
    ("two-pass", False, True),
    ("auto", True, False),
]
STEPS = [4, 6, 5]


def uneven(in_graph: bool, cases: list) -> list:
    """Two epochs of unequal length; which schedule each step of each case took."""
    import harness
    import numpy as np
    import oracle
    import tensorflow as tf
    from tf_job import array, assert_equal_bits

    import adacons_hvd.tensorflow as hvd
    from adacons_hvd import AdaCons

    hvd.init()
    rank = hvd.rank()
    rng = np.random.default_rng(5)
    models = [
        [tf.Variable(rng.standard_normal((12, 4)).astype("f4")), tf.Variable(rng.standard_normal((4, 1)).astype("f4"))]
        for _ in cases
    ]

    def gradients_of(model, case, words, targets, distributed=True):
        schedule, sparse, aggregated = case
        with tf.GradientTape() as tape:
            rows = tf.gather(model[0], words) if sparse else tf.matmul(tf.one_hot(words, 12), model[0])
            loss = tf.reduce_mean(tf.square(tf.matmul(rows, model[1]) - targets))
        if distributed:
            aggregator = AdaCons(momentum=0.9) if aggregated else None
            tape = hvd.DistributedGradientTape(tape, aggregator=aggregator, schedule=schedule, bucket_bytes=150)
        gradients = tape.gradient(loss, model)
        return gradients, (tape if distributed else None)

    tapes = [None] * len(cases)

    def step(words, targets):
        everything = []
        for k, (model, case) in enumerate(zip(models, cases, strict=True)):
            gradients, tapes[k] = gradients_of(model, case, words, targets)
            everything.append(gradients)
        return everything

    function = tf.function(step) if in_graph else step
    own = np.random.default_rng(10 + rank)
    taken, raw, found = [], [], []
    for _ in range(2):
        for _ in range(STEPS[rank]):
            words = tf.constant(own.integers(2 * rank, 2 * rank + 6, 7))
            targets = tf.constant((3 + own.standard_normal((7, 1))).astype("f4"))
            arrays = []
            for model, case in zip(models, cases, strict=True):
                mine, _ = gradients_of(model, case, words, targets, distributed=False)
                arrays.append([array(g, v) for g, v in zip(mine, model, strict=True)])
            raw.append(arrays)
            results = function(words, targets)
            pairs = zip(results, models, strict=True)
            found.append([[array(g, v) for g, v in zip(some, model, strict=True)] for some, model in pairs])
            for model, gradients in zip(models, results, strict=True):
                for variable, gradient in zip(model, gradients, strict=True):
                    variable.assign_sub(0.05 * tf.convert_to_tensor(gradient))
            taken.append([tape.report and tape.report.schedule for tape in tapes])
        present = [tape.report and tape.report.present[0] for tape in tapes]
        hvd.join()
        # A rank that left early has missed the last steps; as in plain Horovod, an epoch starts equal. What aggregators
        # remember needs no broadcast.
        hvd.broadcast_variables([v for model in models for v in model], root_rank=1)
    assert present == [[worker != 0 or rank == 0 for worker in range(3)] if c[2] else None for c in cases] or rank
    everyone = harness.gather((raw, found))
    for k, (_, _, aggregated) in enumerate(cases):
        judge = oracle.Grouped([[0, 1]], momentum=0.9)
        for step_number in range(6):
            here = [r for r in range(3) if step_number < STEPS[r]]
            results = [everyone[r][1][step_number][k] for r in here]
            for other in results[1:]:
                assert all((a == b).all() for a, b in zip(results[0], other, strict=True))
            raws = [everyone[r][0][step_number][k] for r in here]
            if not aggregated:
                # As in Horovod: those who left count as zeros.
                expected = [sum(worker[i] for worker in raws) / 3 for i in range(2)]
            elif len(here) == 3:
                expected = judge(raws)
            else:
                continue  # the momentum is stretched then, which the oracle does not know
            assert oracle.error(results[0], expected) < 1e-5
    # Steps that all took in the second epoch: the memory of the rank that stayed longest is everyone's.
    for step_number in range(4):
        results = [everyone[r][1][STEPS[r] + step_number] for r in range(3)]
        for other in results[1:]:
            pairs = zip(results[0], other, strict=True)
            assert all((a == b).all() for one, two in pairs for a, b in zip(one, two, strict=True))
    assert_equal_bits([v for model in models for v in model])
    return taken


@pytest.mark.parametrize("in_graph", [True, False], ids=["graph", "eager"])
def test_joined_ranks_are_not_missed(cluster, in_graph):
    cases = CASES if in_graph else CASES[1:3]
    results = cluster.run(uneven, in_graph, cases)
    for rank, steps in enumerate(results):
        for k, (schedule, _, aggregated) in enumerate(cases):
            usual = schedule if aggregated else None
            expected = ([usual] * 4 + [usual and "two-pass"] * (STEPS[rank] - 4)) * 2
            assert [taken[k] for taken in steps] == expected


@pytest.mark.ranks(3, launcher="gloo", pool="tensorflow")
def test_what_cannot_go_on_says_so(cluster):
    def refuse() -> list[str]:
        import tensorflow as tf

        import adacons_hvd.tensorflow as hvd
        from adacons_hvd import Aggregator, Curvature

        class ByGramian(Aggregator):
            needs_gramian = True

            def weights(self, statistics):
                return tf.ones_like(statistics.squares) / 3

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
    first, second, third = cluster.run(refuse, fresh=True)
    assert second == []
    for messages in (first, third):
        assert "needs the Gramian" in messages[0]
        assert "and rank 1 did" in messages[0]
        assert "needs the mean gradients of earlier steps, which cannot be had once a rank has called" in messages[1]
        assert "rank 1 called hvd.join(); new parameters cannot be agreed on" in messages[2]
