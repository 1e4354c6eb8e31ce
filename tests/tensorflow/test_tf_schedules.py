"""Schedules whose statistics are nearly exact, and measuring the cluster, in TensorFlow's graphs."""

from __future__ import annotations

import pytest

pytestmark = [
    pytest.mark.ranks(2, 3, launcher=("mpi", "gloo"), soak={"mpi": (2, 3), "gloo": (3,)}, pool="tensorflow"),
    pytest.mark.time_limit(180),
]


def errors_of(schedule: str) -> tuple[list[float], str, str]:
    """How far each step's result is from the oracle's, on rank 0, and what the report says."""
    import harness
    import numpy as np
    import oracle
    import tensorflow as tf
    from tf_job import assert_equal_bits, fixed_gradients

    import adacons_hvd.tensorflow as hvd
    from adacons_hvd import AdaCons

    hvd.init()
    shapes = [(300, 1000), (50,)]
    variables = [tf.Variable(tf.zeros(shape)) for shape in shapes]
    aggregator = AdaCons(momentum=0.0, scale="average")
    reports = []

    @tf.function
    def step(*fixed):
        with tf.GradientTape() as tape:
            loss = tf.add_n([tf.reduce_sum(v * g) for v, g in zip(variables, fixed, strict=True)])
        tape = hvd.DistributedGradientTape(tape, aggregator=aggregator, schedule=schedule, bucket_bytes=1 << 19)
        reports.append(tape)
        gradients = tape.gradient(loss, variables)
        for variable, gradient in zip(variables, gradients, strict=True):
            variable.assign_sub(gradient)
        return gradients

    errors = []
    for number in range(4):
        fixed = fixed_gradients(hvd.rank(), number, shapes)
        found = [g.numpy() for g in step(*map(tf.constant, fixed))]
        everyone = harness.gather([np.float64(g) for g in fixed])
        expected = oracle.Grouped([[0, 1]], momentum=0.0, scale="average")(everyone)
        errors.append(oracle.error(found, expected))
    assert_equal_bits(variables)
    report = reports[0].report
    assert report.fallbacks == 0
    return errors, report.schedule, report.reason


def test_half_precision_in_the_first_pass_costs_the_weights_little(cluster):
    for errors, schedule, _ in cluster.run(errors_of, "half"):
        assert schedule == "half"
        assert 1e-7 < max(errors) < 1e-4


def test_a_sketch_costs_the_weights_a_few_percent(cluster):
    for errors, schedule, _ in cluster.run(errors_of, "sketch"):
        assert schedule == "sketch"
        assert 1e-5 < max(errors) < 0.03
        # Other signs in every step: errors are not the same again and again.
        assert len({round(error, 9) for error in errors}) == len(errors)


def measured() -> tuple[list[float], str, str, list[str]]:
    """:func:`errors_of` the automatic choice, by a process that knows nothing of the cluster; and what it warned of."""
    import logging

    import tensorflow as tf

    from adacons_hvd import calibration

    calibration._known.clear()
    said = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    tf.get_logger().addHandler(handler)
    try:
        return *errors_of("auto"), said
    finally:
        tf.get_logger().removeHandler(handler)


def test_auto_measures_the_cluster_and_all_ranks_choose_alike(cluster):
    answers = cluster.run(measured)
    assert len({answer[1:3] for answer in answers}) == 1
    assert f"{cluster.ranks} workers on 1 host, measured, {answers[0][1]} should take" in answers[0][2]
    for errors, _, _, said in answers:
        assert max(errors) < 1e-5
        # TensorFlow does not like that many functions are traced.
        assert said == []
