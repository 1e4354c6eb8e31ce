"""A rank that trains alone is found by all ranks, with tapes, eagerly and in graphs."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = [
    pytest.mark.ranks(2, launcher=("mpi", "gloo"), soak={"mpi": (2,)}, pool="tensorflow"),
    pytest.mark.parametrize("in_graph", [True, False], ids=["graph", "eager"]),
    pytest.mark.time_limit(120),
]


class Training:
    """Steps of a tape over three variables."""

    def __init__(self, in_graph: bool, **options: Any) -> None:
        import tensorflow as tf

        import adacons_hvd.tensorflow as hvd
        from adacons_hvd import AdaCons

        hvd.init()
        self.rank = hvd.rank()
        self.options = {"aggregator": AdaCons(momentum=0.9), **options}
        self.variables = [tf.Variable(tf.ones(shape), name=name) for shape, name in (((3, 3), "a"), (5, "b"), (2, "c"))]
        self.local: list[Any] = []
        self.tape: Any = None
        self.take = tf.function(self._take, autograph=False) if in_graph else self._take

    def loss(self, used: int = 3) -> Any:
        import tensorflow as tf

        return tf.add_n([tf.reduce_sum(v * v) for v in self.variables[:used]]) * (1.0 + self.rank)

    def _take(self, used: int = 3, asked: int = 3) -> None:
        import tensorflow as tf

        import adacons_hvd.tensorflow as hvd

        with tf.GradientTape() as tape:
            loss = self.loss(used)
        self.tape = hvd.DistributedGradientTape(tape, **self.options)
        for variable in self.local:
            self.tape.register_local_source(variable)
        asked_about = self.variables[:asked]
        for variable, gradient in zip(asked_about, self.tape.gradient(loss, asked_about), strict=True):
            if gradient is not None:
                variable.assign_sub(0.01 * gradient)

    def error(self, *arguments: int) -> tuple[str, str]:
        """The error that the next step ends with: its class and its text, without what TensorFlow puts around it."""
        import tensorflow as tf

        from adacons_hvd.agreement import DisagreementError
        from adacons_hvd.tensorflow.errors import decoded

        with pytest.raises((tf.errors.InvalidArgumentError, DisagreementError)) as caught:
            self.take(*arguments)
        error = caught.value
        text = str(decoded(error) if isinstance(error, tf.errors.InvalidArgumentError) else error)
        assert text in str(error)
        return type(error).__name__, text

    def mend(self, root: int = 0) -> None:
        import adacons_hvd.tensorflow as hvd

        hvd.broadcast_variables(self.variables, root_rank=root)

    def check(self) -> None:
        """Mend, train on, and compare."""
        from tf_job import assert_equal_bits

        self.mend()
        for _ in range(2):
            self.take()
        assert_equal_bits(self.variables)


def alone(training: Training, way: str = "assign") -> None:
    """Something that a rank can do on its own."""
    import tensorflow as tf

    variables = training.variables
    if way == "assign":
        variables[1].assign_add(tf.one_hot(3, 5) * 1e-6)
        return
    with tf.GradientTape() as tape:
        loss = training.loss()
    gradients = tape.gradient(loss, variables)
    if way == "plain tape":
        variables[2].assign_sub(0.01 * gradients[2])
    else:
        tf.keras.optimizers.SGD(0.01).apply_gradients(zip(gradients, variables, strict=True))


def drift(in_graph: bool, options: dict[str, Any]) -> list[tuple[str, str]]:
    found = []
    for way in ("plain tape", "assign", "plain optimizer"):
        training = Training(in_graph, **options)
        training.take()
        if training.rank == 1:
            alone(training, way)
        found.append(training.error())
        training.check()
    return found


@pytest.mark.parametrize("options", [{}, {"aggregator": None}], ids=["aggregator", "average"])
def test_a_rank_that_trains_alone_is_found_by_all(cluster, in_graph, options):
    first, second = cluster.run(drift, in_graph, options)
    assert first == second
    assert {kind for kind, _ in first} == {"InvalidArgumentError" if in_graph else "ReplicaError"}
    for (_, text), place in zip(
        first, ["1 of 3 parameters: c", "1 of 3 parameters: b", "3 of 3 parameters: a, b, c"], strict=True
    ):
        assert f"before step 2 rank 1 held other values than rank 0 in {place}." in text


def test_replicas_are_compared_as_often_as_was_asked_for(cluster, in_graph):
    def when(in_graph: bool) -> list[str]:
        training = Training(in_graph, check_replicas=4)
        # What is made equal only after the first step is never noticed.
        training.variables[0].assign_add(training.variables[0] * training.rank)
        training.take()
        training.mend()
        training.take()
        if training.rank:
            alone(training)
        for _ in range(2):
            training.take()
        texts = [training.error()[1], training.error()[1]]
        training.check()
        return texts

    first, second = cluster.run(when, in_graph)
    assert first == second
    assert ["before step 5 rank 1" in text for text in first] == [True, True]


def test_what_is_meant_to_differ_is_not_compared(cluster, in_graph):
    def differ(in_graph: bool) -> bool:
        import tensorflow as tf
        from tf_job import assert_equal_bits

        import adacons_hvd.tensorflow as hvd
        from adacons_hvd import AdaCons

        never, some, local = Training(in_graph, check_replicas=0), Training(in_graph), Training(in_graph)
        some.options["may_differ"] = some.variables[:1]
        local.local = local.variables[:1]
        for training in (never, some, local):
            training.variables[0].assign_add(tf.fill((3, 3), float(training.rank)))
            for _ in range(3):
                training.take()
        assert_equal_bits([v for training in (some, local) for v in training.variables[1:]])
        # What a variable that may differ leaves is still compared.
        if some.rank:
            alone(some)
        some.options["check_replicas"] = 2
        some.take = tf.function(some._take, autograph=False) if in_graph else some._take
        some.take()
        assert "1 of 2 parameters: b" in some.error()[1]
        # Sources that are no variables have no values to compare.
        weight, inputs = tf.Variable([1.0, 2.0]), tf.constant([1.0 + some.rank, 3.0])

        def step() -> Any:
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                loss = tf.reduce_sum(weight * inputs)
            tape = hvd.DistributedGradientTape(tape, aggregator=AdaCons())
            weight.assign_sub(0.1 * tape.gradient(loss, [weight, inputs])[0])

        step = tf.function(step, autograph=False) if in_graph else step
        for _ in range(3):
            step()
        assert_equal_bits([weight])
        return True

    assert cluster.run(differ, in_graph) == [True] * 2


@pytest.mark.ranks(3, launcher=("mpi", "gloo"), soak={"mpi": (3,)}, pool="tensorflow")
def test_ranks_that_have_joined_are_left_out(cluster, in_graph):
    def uneven(in_graph: bool) -> list[str]:
        import adacons_hvd.tensorflow as hvd

        training = Training(in_graph)
        rank, texts = training.rank, []

        def epoch(steps: list[int]) -> None:
            for _ in range(steps[rank]):
                training.take()

        epoch([3, 5, 4])
        hvd.join()
        training.mend(root=1)
        epoch([3, 5, 4])
        hvd.join()
        # The ranks that left have missed steps, and nobody has made variables equal: found in the second step.
        training.take()
        texts.append(training.error()[1])
        training.check()
        # While a rank is away, the others compare among themselves.
        training.options["check_replicas"] = 1
        training = training if not in_graph else _again(training)
        epoch([2, 2, 1])
        if rank < 2:
            if rank == 1:
                alone(training)
            texts.append(training.error()[1])
        hvd.join()
        training.check()
        return texts

    def _again(training: Training) -> Training:
        import tensorflow as tf

        training.take = tf.function(training._take, autograph=False)
        return training

    first, second, third = cluster.run(uneven, in_graph)
    assert first == second
    assert third == first[:1]
    assert "before step 2 ranks 1-2 held other values than rank 0 in 3 of 3" in first[0]
    assert "before step 3 rank 1 held other values than rank 0 in 1 of 3 parameters: b" in first[1]


def test_each_layout_is_compared_by_itself(cluster, in_graph):
    def change(in_graph: bool) -> list[str]:
        training = Training(in_graph)
        texts = []
        # Variables without a gradient, fewer variables, a gradient where there was none.
        for arguments in ((2, 3), (2, 2), (3, 3)):
            training.take(*arguments)
            if training.rank:
                alone(training)
            texts.append(training.error(*arguments)[1])
            training.mend()
            training.take(*arguments)
        training.check()
        return texts

    first, second = cluster.run(change, in_graph)
    assert first == second
    for text, of in zip(first, (3, 2, 3), strict=True):
        assert f"before step 2 rank 1 held other values than rank 0 in 1 of {of} parameters: b." in text


def test_a_step_along_gradients_never_aggregated_is_an_error_on_all_ranks(cluster, in_graph):
    def stray(in_graph: bool) -> list[tuple[str, str]]:
        import harness
        import tensorflow as tf

        from adacons_hvd.engine import replicas
        from adacons_hvd.engine.replicas import StrayStepError
        from adacons_hvd.tensorflow import reducer as module

        training = Training(in_graph)
        found = []

        def go_astray(reducer: Any) -> None:
            def tell() -> None:
                reducer.stray("as a test")

            with pytest.raises(StrayStepError) as caught:
                (tf.function(tell, autograph=False) if in_graph else tell)()
            found.append((type(caught.value).__name__, str(caught.value)))

        training.take()
        # While the others take a step, while they lay out, and together.
        go_astray(training.tape._reducer) if training.rank else found.append(training.error())
        other = Training(in_graph, name="another")
        go_astray(module.Reducer(training.tape._settings)) if training.rank else found.append(other.error())
        go_astray(training.tape._reducer)
        # The others hear of it later than a rank waits for them.
        limit, replicas.STRAY_SECONDS = replicas.STRAY_SECONDS, 1
        if training.rank:
            go_astray(training.tape._reducer)
        replicas.STRAY_SECONDS = limit
        harness.gather(None)
        if not training.rank:
            found.append(training.error())
        harness.gather(None)
        training.check()
        return found

    first, second = cluster.run(stray, in_graph)
    step = "InvalidArgumentError" if in_graph else "StrayStepError"
    assert [kind for kind, _ in first] == [step, "StrayStepError", "StrayStepError", step]
    assert [kind for kind, _ in second] == ["StrayStepError"] * 4
    assert all("as a test" in text for _, text in second)
    took = "took a step along gradients that were never aggregated"
    for texts in (first, second):
        assert [text.split(took)[0] for _, text in texts] == ["rank 1 ", "rank 1 ", "ranks 0-1 ", "rank 1 "]
