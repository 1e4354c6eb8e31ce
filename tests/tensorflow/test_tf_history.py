"""Aggregators that need more than dots and squares, in tapes; and the mean at a length of its own."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest
from harness.launchers import PROCESS_SETS

pytestmark = [pytest.mark.ranks(3, launcher="mpi", pool="tensorflow"), pytest.mark.time_limit(240)]

SCHEDULES = ["one-pass", "gather"]
BY_PAST: dict[str, Any] = {"memory": 4, "workers": False, "length": "agreement"}
#: Settings of Curvature; by which schedule, in which type, by what granularity, and whether in a graph.
CURVATURES: list[tuple[dict[str, Any], str, str, str, bool]] = [
    ({"memory": 8}, "one-pass", "float32", "layer", True),
    ({"memory": 3, "damping": 0.3, "length": "average"}, "gather", "float64", "model", False),
    (BY_PAST, "one-pass", "float64", "model", False),
    (BY_PAST, "gather", "float32", "layer", True),
    ({"memory": 0}, "one-pass", "float32", "model", False),
]
#: None has a single element: those of two workers may cancel, which leaves few correct digits.
SHAPES: list[tuple[int, ...]] = [(6, 5), (5,), (5, 7), (7,)]


class Training:
    """Variables that are trained with tapes; what was aggregated in each step, and what became of it."""

    def __init__(self, aggregator: Any, in_graph: bool = True, dtype: str = "float32", **options: Any) -> None:
        import tensorflow as tf
        from tf_job import array, fixed_gradients, pulling

        import adacons_hvd.tensorflow as hvd

        hvd.init()
        self.variables = [tf.Variable(tf.ones(shape, dtype)) for shape in SHAPES]
        self.raw: list[Any] = []
        self.found: list[Any] = []
        self.tape: Any = None
        options = {"schedule": "one-pass", "bucket_bytes": 200, "check_replicas": 0, **options}

        def step(*fixed):
            with tf.GradientTape() as tape:
                loss = pulling(self.variables, fixed)
            self.tape = hvd.DistributedGradientTape(tape, aggregator=aggregator, **options)
            gradients = self.tape.gradient(loss, self.variables)
            for variable, gradient in zip(self.variables, gradients, strict=True):
                variable.assign_sub(0.02 * gradient)
            return gradients

        function = tf.function(step) if in_graph else step

        def take(number: int, broken: bool = False) -> None:
            fixed = [g.astype(dtype) for g in fixed_gradients(hvd.rank(), number, SHAPES)]
            if broken:
                fixed[0][0, 0] = float("nan")
            self.raw.append([array(v + g, v) for g, v in zip(fixed, self.variables, strict=True)])
            self.found.append([array(g, g) for g in function(*map(tf.constant, fixed))])

        self.step = take

    @property
    def kept(self) -> int:
        return int(self.tape.report.decision.memory["kept"].numpy().max())


def beside_the_oracle() -> list[int]:
    """Every aggregator, those with a history by both schedules, eagerly or in a graph; its fallbacks."""
    import harness
    import oracle
    from element_wise import TrimmedMean
    from tf_job import assert_equal_bits, judge

    from adacons_hvd import Curvature, NormalizedMean

    class TrimmedOracle:
        def __call__(self, gradients: Any) -> Any:
            return oracle.trimmed_mean(gradients)

    cases: list[tuple[Any, ...]] = [
        *((Curvature(**s), {"oracle": oracle.CurvatureOracle, **s}, *how) for s, *how in CURVATURES),
        (
            NormalizedMean("agreement"),
            {"oracle": oracle.NormalizedMeanOracle, "length": "agreement"},
            "one-pass",
            "float64",
            "layer",
            True,
        ),
        (TrimmedMean(), {"oracle": TrimmedOracle}, "one-pass", "float32", "model", False),
    ]
    fallbacks = []
    for aggregator, settings, schedule, dtype, granularity, in_graph in cases if harness.size() > 2 else cases[:-1]:
        training = Training(aggregator, in_graph, dtype, schedule=schedule, granularity=granularity)
        for step in range(aggregator.history + 4):  # the last ones push the first ones out
            training.step(step)
        tolerance = {"float32": 1e-5, "float64": 1e-12}[dtype]
        layerwise = granularity == "layer"
        judge(training.raw, training.found, layerwise=layerwise, tolerance=tolerance, **settings)
        assert_equal_bits(training.variables)
        report = training.tape.report
        assert report.schedule == schedule
        assert len(report.past_weights) == (len(SHAPES) if layerwise else 1) * bool(aggregator.history)
        assert (report.history_bytes > 0) == (aggregator.history > 0)
        fallbacks.append(report.fallbacks)
    return fallbacks


@pytest.mark.ranks(2, 3, 4, launcher="mpi", soak={"mpi": (2, 4)}, pool="tensorflow")
def test_aggregators_agree_with_their_oracles(cluster):
    assert cluster.run(beside_the_oracle) == [[0] * (6 if cluster.ranks == 2 else 7)] * cluster.ranks


@pytest.mark.soak
@pytest.mark.ranks(5, 8, launcher="gloo", pool="tensorflow")
@pytest.mark.time_limit(900)
def test_aggregators_agree_with_their_oracles_on_many_ranks(cluster):
    assert cluster.run(beside_the_oracle) == [[0] * 7] * cluster.ranks


def resume(folder: str) -> None:
    """Half of the steps, a checkpoint, and the rest: straight on, and from the checkpoint in old and new tapes."""
    import harness
    import tensorflow as tf
    from tf_job import assert_equal_bits

    import adacons_hvd.tensorflow as hvd
    from adacons_hvd import Curvature

    for number, (schedule, gathered) in enumerate([("one-pass", False), ("one-pass", True), ("gather", True)]):
        gc.collect()  # tapes of what is not there any more are not saved
        training = Training(Curvature(4), in_graph=number % 2 == 0, schedule=schedule)
        for step in range(5):
            training.step(step)
        checkpoint = tf.train.Checkpoint(weights=training.variables, tapes=hvd.TapeState())
        path = f"{folder}/{number}.{0 if gathered else hvd.rank()}"
        if gathered:
            hvd.TapeState().gather_history()
        if hvd.rank() == 0 or not gathered:
            checkpoint.write(path)
        harness.gather(None)

        def rest(some: Training) -> list[bytes]:
            for step in range(5, 10):
                some.step(step)
            assert some.kept == 10
            assert_equal_bits(some.variables)
            return [variable.numpy().tobytes() for variable in some.variables]

        expected = rest(training)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            checkpoint.read(path).assert_consumed()
            assert rest(training) == expected
            # What was gathered is out of date by now.
            places = hvd.TapeState().state_dict()["0/means_at"]
            held = sum(stop - start for start, stop in zip(places[::2], places[1::2], strict=True))
            assert (held < sum(variable.shape.num_elements() for variable in training.variables)) == (
                schedule == "one-pass"
            )
            del training, checkpoint
            gc.collect()
            other = Training(Curvature(4), in_graph=number % 2 == 1, schedule=schedule)
            tf.train.Checkpoint(weights=other.variables, tapes=hvd.TapeState()).read(path).assert_consumed()
            assert rest(other) == expected
        del other


@pytest.mark.ranks(2, launcher="mpi", pool="tensorflow")
def test_checkpoints_go_on_bit_for_bit(cluster, tmp_path):
    cluster.run(resume, str(tmp_path))


def resized(path: str) -> list[int]:
    """Three workers, then two of them, then three again; each takes up what the former have gathered."""
    import harness
    import oracle
    import tensorflow as tf
    from tf_job import assert_equal_bits

    import adacons_hvd.tensorflow as hvd
    from adacons_hvd import Curvature

    hvd.init()
    judge = oracle.Grouped([list(range(len(SHAPES)))], oracle.CurvatureOracle, memory=4)
    workers = []
    pair = hvd.add_process_set([0, 2])
    for phase, process_set in enumerate([hvd.global_process_set, pair, hvd.global_process_set]):
        gc.collect()
        here = process_set.included()
        training = Training(Curvature(4), process_set=process_set) if here else None
        tapes = hvd.TapeState()
        raw, found = [], []
        if training is not None:
            checkpoint = tf.train.Checkpoint(tapes=tapes)
            if phase:
                checkpoint.read(f"{path}.{phase - 1}").assert_consumed()
            for step in range(6):
                training.step(10 * phase + step)
            raw, found = training.raw, training.found
            tapes.gather_history()
            workers.append(int(tapes.state_dict()["0/workers"]))
            if hvd.rank() == 0:
                checkpoint.write(f"{path}.{phase}")
            del checkpoint
        everyone = [rank for rank in harness.gather(raw) if rank]
        for step in range(6):
            expected = judge([worker[step] for worker in everyone])
            assert training is None or oracle.error(found[step], expected) < 1e-5, (phase, step)
        if training is not None:
            assert training.kept == 6 * (phase + 1)
            assert_equal_bits(training.variables) if phase != 1 else None
        del training
    hvd.remove_process_set(pair)
    return workers


@pytest.mark.ranks(3, launcher="mpi", pool="tensorflow", env=PROCESS_SETS)
def test_another_number_of_workers_takes_up_a_gathered_history(cluster, tmp_path):
    assert cluster.run(resized, str(tmp_path / "state")) == [[3, 2, 3], [3, 3], [3, 2, 3]]


def afresh(schedule: str) -> None:
    """A history that only some ranks have: it begins afresh on all."""
    import harness
    import oracle
    from tf_job import assert_equal_bits

    import adacons_hvd.tensorflow as hvd
    from adacons_hvd import Curvature

    gc.collect()
    training = Training(Curvature(4), schedule=schedule)
    for step in range(7):
        training.step(step)
    state = training.tape._reducer.state_dict()
    whole = schedule == "gather"  # every rank has all of it
    theirs = harness.gather(state)[0]
    for step in range(7, 10):
        training.step(step)

    def judge(before: int) -> None:
        everyone = harness.gather(training.raw)
        judge = oracle.Grouped([list(range(len(SHAPES)))], oracle.CurvatureOracle, memory=4)
        for step in range(before, len(training.raw)):
            assert oracle.error(training.found[step], judge([worker[step] for worker in everyone])) < 1e-5, step
        assert_equal_bits(training.variables)

    # One rank goes back while the others go on.
    if hvd.rank() == 1:
        training.tape._reducer.load_state_dict(state)
    for step in range(10, 16):
        training.step(step)
    judge(10)
    assert training.kept == 6
    # All load what one of them has saved without gathering.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        training.tape._reducer.load_state_dict(theirs)
    said = any("so the aggregator's history begins afresh" in str(w.message) for w in caught)
    assert said == (not whole and hvd.rank() != 0)
    for step in range(16, 22):
        training.step(step)
    assert training.kept == (13 if whole else 6)
    if not whole:
        judge(16)


def test_a_history_that_is_not_whole_begins_afresh(cluster):
    for schedule in SCHEDULES:
        cluster.run(afresh, schedule)


def nonfinite(policy: str) -> None:
    import harness
    import oracle
    import tensorflow as tf
    from tf_job import assert_equal_bits

    import adacons_hvd.tensorflow as hvd
    from adacons_hvd import Curvature

    judge = oracle.Grouped([list(range(len(SHAPES)))], oracle.CurvatureOracle, memory=3)
    training = Training(Curvature(3, nonfinite=policy))
    for step in range(9):
        bad = step % 3 == 1
        before = [variable.numpy() for variable in training.variables]
        if bad and policy == "raise":
            with pytest.raises(tf.errors.InvalidArgumentError, match="the gradient of rank 1 holds NaN"):
                training.step(step, hvd.rank() == 1)
            continue
        training.step(step, bad and hvd.rank() == 1)
        if bad and policy == "propagate":
            assert not all((g == g).all() for g in training.found[-1])
            for variable, value in zip(training.variables, before, strict=True):
                variable.assign(value)
            continue
        everyone = harness.gather(training.raw[-1])
        some = [everyone[0], everyone[2]] if bad else everyone
        assert oracle.error(training.found[-1], judge(some)) < 1e-5, step
    assert_equal_bits(training.variables)


def test_gradients_that_are_not_finite_leave_no_trace_in_the_history(cluster):
    for policy in ("propagate", "exclude", "raise"):
        cluster.run(nonfinite, policy)


def scaled() -> None:
    """Half-precision messages and a loss scale that changes: the history is one of true gradients."""
    import harness
    import numpy as np
    import oracle
    import tensorflow as tf

    import adacons_hvd.tensorflow as hvd
    from adacons_hvd import Curvature
    from adacons_hvd.tensorflow.reducer import Reducer

    hvd.init()
    own = np.random.default_rng(hvd.rank())
    variables = [tf.Variable(tf.zeros(301)), tf.Variable(tf.zeros(50))]
    for schedule in SCHEDULES:
        tape = hvd.DistributedGradientTape(
            tf.GradientTape(), aggregator=Curvature(4), schedule=schedule, compression=hvd.Compression.fp16
        )
        reducer = Reducer(tape._settings)
        judge = oracle.Grouped([[0, 1]], oracle.CurvatureOracle, memory=4)
        for step in range(8):
            scale = 2.0 ** (14 - step)
            sent = [((own.standard_normal(v.shape) + 0.3) * 1e-3 * scale).astype(np.float16) for v in variables]
            results = reducer.reduce([tf.constant(g, tf.float32) for g in sent], variables, 1 / scale)
            found = [g.numpy().astype(np.float64) / scale for g in results]
            expected = judge(harness.gather([g.astype(np.float64) / scale for g in sent]))
            assert oracle.error(found, expected) < 3e-3, step
        assert reducer.report is not None
        assert reducer.report.fallbacks == 0


def test_a_loss_scale_and_half_precision(cluster):
    cluster.run(scaled)


def refusals() -> None:
    import tensorflow as tf

    import adacons_hvd.tensorflow as hvd
    from adacons_hvd import Curvature

    hvd.init()
    with pytest.raises(ValueError, match=r"needs the mean gradients of earlier steps, which schedule='two-pass' never"):
        hvd.DistributedGradientTape(tf.GradientTape(), aggregator=Curvature(workers=False), schedule="two-pass")
    table = tf.Variable(tf.ones((10, 3)))
    with tf.GradientTape(persistent=True) as tape:
        loss = tf.reduce_sum(tf.gather(table, [1, 2]))
    with pytest.raises(NotImplementedError, match="sparse gradients do not have; make them dense"):
        hvd.DistributedGradientTape(tape, aggregator=Curvature()).gradient(loss, table)


def test_what_cannot_be_had_is_refused_in_words(cluster):
    cluster.run(refusals)
