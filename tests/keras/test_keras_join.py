"""Ranks whose data ends early leave with hvd.join(), and model.fit goes on among the others."""

from __future__ import annotations

import pytest

pytestmark = [
    pytest.mark.ranks(3, launcher=("mpi", "gloo"), soak={"mpi": (3,)}, pool="tensorflow"),
    pytest.mark.time_limit(120),
]


def test_the_result_is_that_of_the_ranks_still_there(cluster):
    def case() -> list:
        import harness
        import keras
        import numpy as np
        import oracle
        from keras_job import network, own_gradients, recording

        import adacons_hvd.keras as hvd
        import adacons_hvd.tensorflow as tensorflow_hvd
        from adacons_hvd import AdaCons

        hvd.init()
        rank = hvd.rank()
        model = network(keras)
        optimizer = hvd.DistributedOptimizer(
            recording(keras)(0.01), aggregator=AdaCons(momentum=0), schedule="one-pass"
        )
        model.compile(optimizer, loss="mse")
        rng = np.random.default_rng(rank)
        records = []

        class Watch(keras.callbacks.Callback):
            def on_train_batch_begin(self, batch, logs=None):
                part = slice(8 * batch, 8 * batch + 8)
                records.append([own_gradients(model, x[part], y[part])])

            def on_train_batch_end(self, batch, logs=None):
                records[-1].append([np.array(v.numpy()) for v in optimizer.seen])

        # 4 batches on rank 0, 2 on rank 1, 5 on rank 2, whose last one is short: another trace when others have left.
        rows = [32, 16, 37][rank]
        x, y = rng.standard_normal((rows, 6)).astype("f4"), rng.standard_normal((rows, 1)).astype("f4")
        model.fit(x, y, batch_size=8, verbose=0, shuffle=False, callbacks=[Watch()])
        weights, present = optimizer.report.weights[0], optimizer.report.present[0]
        tensorflow_hvd.join()
        everyone = harness.gather(records)
        for step in range(5):
            here = [theirs[step] for theirs in everyone if step < len(theirs)]
            judge = oracle.Grouped([list(range(4))], momentum=0.0)
            expected = judge([raw for raw, _ in here])
            for _, found in here:
                assert oracle.error(found, expected) < 1e-5
        return [weights, present, optimizer.report.schedule]

    results = cluster.run(case)
    assert [present for _, present, _ in results] == [[True, False, True], [True] * 3, [False, False, True]]
    assert [weights[1] == 0 for weights, _, _ in results] == [True, False, True]
    assert [schedule for _, _, schedule in results] == ["two-pass", "one-pass", "two-pass"]
