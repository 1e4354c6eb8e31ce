"""A tape refuses senseless arguments in a sentence, and tells different ones apart."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = [pytest.mark.ranks(2, launcher="gloo", pool="tensorflow"), pytest.mark.time_limit(120)]

#: A wrong argument, and what the error says.
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"aggregator": "adacons"}, "aggregator must be an Aggregator such as AdaCons(), got 'adacons'"),
    ({"schedule": ["one-pass"]}, "schedule must be one of .*, or a Network, got ['one-pass']"),
    ({"schedule": "one-pas"}, "schedule must be one of .*, or a Network, got 'one-pas'"),
    ({"schedule": "one-pas", "aggregator": None}, "schedule must be one of .*, or a Network, got 'one-pas'"),
    ({"granularity": None}, "granularity must be lists of parameters, got None"),
    ({"granularity": 4}, "granularity must be lists of parameters, got 4"),
    ({"granularity": "layers"}, 'granularity must be "model", "layer" or lists of parameters, got \'layers\''),
    ({"granularity": "variable"}, "granularity must be lists of parameters, got <tf.Variable"),
    (
        {"granularity": ["variable"]},
        "granularity must be lists of parameters, found ResourceVariable in place of a list",
    ),
    ({"granularity": [[3]]}, "granularity must hold parameters, found int"),
    ({"granularity": [["variable"], ["variable"]]}, "a parameter of shape (2,) is in granularity twice"),
    ({"granularity": [["variable", "foreign"]]}, "granularity names 1 parameter that this optimizer does not train"),
    ({"groups": -1}, "groups must not be negative, got -1"),
    ({"groups": 1.5}, "groups must be lists of parameters, got 1.5"),
    ({"groups": [[3]]}, "groups must hold parameters, found int"),
    ({"compression": True}, "compression must be a compressor such as Compression.fp16, .*, got True"),
    ({"process_set": 3}, "process_set must be a ProcessSet such as hvd.add_process_set([0, 1]), got 3"),
    ({"bucket_bytes": 0}, "bucket_bytes must be a positive whole number, got 0"),
    ({"bucket_bytes": 1.5}, "bucket_bytes must be a positive whole number, got 1.5"),
    ({"gradient_predivide_factor": "2"}, "gradient_predivide_factor must be a positive number, got '2'"),
    ({"op": "Sum"}, "op=Sum and an aggregator are two answers to one question"),
    ({"check_replicas": -1}, "check_replicas must be a whole number of steps, or 0 to compare replicas never, got -1"),
    (
        {"check_replicas": 0.5},
        "check_replicas must be a whole number of steps, or 0 to compare replicas never, got 0.5",
    ),
    ({"may_differ": "variable"}, "may_differ must be lists of parameters"),
    ({"may_differ": [3]}, "may_differ must hold parameters, found int"),
    ({"workers": "host"}, 'workers="host" is for PyTorch over Horovod and for DDP'),
]


def refusals(cases: list[dict[str, Any]]) -> list[str]:
    """The sentence with which each of these arguments is refused."""
    import tensorflow as tf
    from tf_job import assert_equal_bits

    import adacons_hvd.tensorflow as hvd
    from adacons_hvd import AdaCons

    hvd.init()
    weight = tf.Variable([1.0, 2.0])
    words = {"variable": weight, "foreign": tf.Variable([3.0]), "Sum": hvd.Sum}

    def meant(value: Any) -> Any:
        if isinstance(value, list):
            return [meant(item) for item in value]
        return words.get(value, value) if isinstance(value, str) else value

    def step(**options: Any) -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(weight * weight)
        tape = hvd.DistributedGradientTape(tape, **{"aggregator": AdaCons(), **options})
        weight.assign_sub(0.1 * tape.gradient(loss, weight))

    found = []
    for options in cases:
        with pytest.raises((TypeError, ValueError)) as caught:
            step(**{name: meant(value) for name, value in options.items()})
        found.append(str(caught.value))
    # A frozen variable may be named: it can be trained later.
    frozen = tf.Variable([3.0], trainable=False)
    step(granularity=[[weight, frozen]])
    assert_equal_bits([weight])
    return found


@pytest.fixture(scope="module")
def sentences() -> dict[str, list[str]]:
    """Keep the outcomes of all cases, which one job tries together."""
    return {}


@pytest.mark.parametrize(
    "number", range(len(WRONG)), ids=lambda i: "-".join(f"{k}={v}" for k, v in WRONG[i][0].items())
)
def test_a_wrong_argument_is_refused_in_a_sentence(cluster, sentences, number):
    import re

    if not sentences:
        first, second = cluster.run(refusals, [options for options, _ in WRONG])
        assert first == second
        sentences["all"] = first
    parts = WRONG[number][1].split(".*")
    assert re.match(".*".join(map(re.escape, parts)), sentences["all"][number]), sentences["all"][number]
    assert "\n" not in sentences["all"][number]


def test_tapes_share_a_reducer_only_if_their_settings_are_equal(cluster):
    def tell_apart() -> list[int]:
        import gc

        import tensorflow as tf
        from tf_job import assert_equal_bits

        import adacons_hvd.tensorflow as hvd
        from adacons_hvd import AdaCons
        from adacons_hvd.costs import Network
        from adacons_hvd.tensorflow import tape as module

        hvd.init()
        gc.collect()
        before = len(module._reducers)
        weights = [tf.Variable([1.0, 2.0]), tf.Variable([3.0])]

        def wrapped(**options: Any) -> tuple[Any, Any]:
            with tf.GradientTape() as tape:
                loss = tf.add_n([tf.reduce_sum(weight * weight) for weight in weights])
            return hvd.DistributedGradientTape(tape, **{"aggregator": AdaCons(), **options}), loss

        different: list[dict[str, Any]] = [
            {},
            {"bucket_bytes": 1000},
            {"device_dense": "cpu:0"},
            {"device_sparse": "cpu:0"},
            {"granularity": [weights[:1]]},
            {"aggregator": AdaCons(momentum=0.5)},
            {"compression": hvd.Compression.fp16},
            {"schedule": Network()},
            {"granularity": "layer"},
            {"granularity": [weights]},
            {"groups": [weights[:1]]},
            {"sparse_as_dense": True},
            {"check_replicas": 7},
            {"may_differ": weights[:1]},
        ]
        # Made anew for every step, equal settings are equal.
        count = len({wrapped(**options)[0]._settings for options in [*different, *different]})
        for options in [*different[:5], *different[:5]]:
            tape, loss = wrapped(**options)
            for weight, gradient in zip(weights, tape.gradient(loss, weights), strict=True):
                weight.assign_sub(0.01 * gradient)
            for name in ("bucket_bytes", "device_dense", "device_sparse"):
                assert name not in options or getattr(tape._reducer.settings, name) == options[name]
        assert_equal_bits(weights)
        found = len(module._reducers) - before
        # Lists of variables keep none of them.
        del weights[:], weight, gradient, tape, loss, different, options
        gc.collect()
        return [count, found, len(module._reducers) - before]

    assert cluster.run(tell_apart) == [[14, 5, 0]] * 2


def test_many_models_in_a_process_are_no_cause_for_warnings(cluster):
    def train() -> list[str]:
        import logging

        import tensorflow as tf
        from tf_job import assert_equal_bits

        import adacons_hvd.tensorflow as hvd

        hvd.init()
        said: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
        tf.get_logger().addHandler(handler)
        models = [tf.Variable(tf.ones(3 + i)) for i in range(7)]
        for weight in models:
            for _ in range(2):
                with tf.GradientTape() as tape:
                    loss = tf.reduce_sum(weight * weight) * (1.0 + hvd.rank())
                weight.assign_sub(hvd.DistributedGradientTape(tape).gradient(loss, weight))
            hvd.join()
        tf.get_logger().removeHandler(handler)
        assert_equal_bits(models)
        return said

    assert cluster.run(train) == [[]] * 2
