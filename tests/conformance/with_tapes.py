"""TensorFlow's tapes take cases: those of an odd seed in a graph, the others eagerly."""

from __future__ import annotations

import gc
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import cases
import harness
import numpy as np
import tensorflow as tf
from cases import GIVEN, Case, Options, Seen, no_options

import adacons_hvd.tensorflow as hvd
from adacons_hvd import AdaCons
from adacons_hvd.tensorflow.errors import decoded

OPTIONS = ("schedule", "bucket_bytes", "sparse_as_dense", "gradient_predivide_factor")


def fitting(case: Case) -> Case:
    """Without passes, which a tape has not; and what it is asked about, and has a gradient for, is always the same."""
    options = {name: case.options[name] for name in OPTIONS if name in case.options}
    return replace(case, options=options, passes=1, missing=_missing_always(case), frozen={}, optimizer="SGD")


def run(case: Case) -> Counter[str]:
    """Train, compare, and count what was met."""
    hvd.init()
    me = harness.rank()
    used = [i for i in range(len(case.shapes)) if (0, me, i) not in case.missing]
    variables = [tf.Variable(tf.ones(s, k)) for s, k in zip(case.shapes, case.types, strict=True)]

    options = {
        **case.options,
        "aggregator": AdaCons(**case.aggregator, nonfinite=case.nonfinite),
        "compression": hvd.Compression.fp16 if case.fp16 else hvd.Compression.none,
        "granularity": cases.pick(case.granularity, variables),
        "groups": cases.pick(case.groups, variables),
    }

    trained = [(i, variables[i]) for i in used]
    wrapped: list[Any] = []

    def step(given: list[tf.Tensor]) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
        with tf.GradientTape(persistent=True) as tape:
            # Every row twice and one not at all, where the gradient is sparse.
            outputs = [tf.gather(v, _rows(v)) if i in case.sparse else tf.identity(v) for i, v in trained]
        own = tape.gradient(outputs, variables, given)
        tape = hvd.DistributedGradientTape(tape, **options)
        wrapped[:] = [tape]
        found = tape.gradient(outputs, variables, given)
        for i, _ in trained:
            few_rows = i in case.sparse and not case.options.get("sparse_as_dense")
            assert isinstance(found[i], tf.IndexedSlices) == few_rows
        own, found = (
            [tf.zeros_like(v) if g is None else tf.convert_to_tensor(g) for v, g in zip(variables, some, strict=True)]
            for some in (own, found)
        )
        for variable, gradient in zip(variables, found, strict=True):
            variable.assign_sub(tf.cast(0.01, variable.dtype) * gradient)
        return own, found

    take = tf.function(step, autograph=False) if case.seed % 2 else step
    raw, seen = {}, {}
    for epoch in case.times(me):
        for number in epoch:
            given = [_given(case, number, i) for i in used]
            mine, theirs = _step_and_see(take, given)
            # What was sent, also where the step ended with an error.
            if mine is None:
                mine = [_array(tf.zeros_like(v)) for v in variables]
                for i, value in zip(used, given, strict=True):
                    mine[i] = _raw(case, i, value)
            raw[number] = mine
            seen[number] = Seen(theirs) if isinstance(theirs, str) else Seen.of(theirs, wrapped[0].report)
        hvd.join()
        if case.epochs > 1:
            hvd.broadcast_variables(variables, root_rank=case.last_to_join)
    return cases.judged(case, raw, seen, [_array(v) for v in variables], hvd.TapeState().state_dict())


#: The arguments of which ranks may disagree.
ARGUMENTS = {"aggregator", "granularity", "groups", "compression", "check_replicas", "may_differ", *OPTIONS}
FP16 = hvd.Compression.fp16

OPTIMIZERS = ("",)
ROUNDING = 0.0
#: A graph says nothing.
SAYS_WHO_LEADS = False

_turns = itertools.count()


class Training:
    """A training with these options, which are told of the variables: in a graph, eagerly, in a graph, ..."""

    def __init__(self, options: Options = no_options, optimizer: str = "") -> None:
        hvd.init()
        gc.collect()
        self.variables = [tf.Variable(tf.ones(s, tf.float64), name=n) for n, s in zip("ab", GIVEN.shapes, strict=True)]
        self.options = {"aggregator": AdaCons(momentum=0.9), "schedule": "one-pass", **options(self.variables)}
        self.tape: Any = None
        self.in_graph = next(_turns) % 2 == 0
        self.take = tf.function(self._take) if self.in_graph else self._take

    def _take(self, given: list[tf.Tensor]) -> None:
        with tf.GradientTape() as tape:
            outputs = [tf.identity(v) for v in self.variables]
        self.tape = hvd.DistributedGradientTape(tape, **self.options)
        for variable, gradient in zip(self.variables, self.tape.gradient(outputs, self.variables, given), strict=True):
            variable.assign_sub(0.01 * gradient)

    def step(self, number: int) -> None:
        given = [tf.constant(gradient.numpy(), tf.float64) for gradient in cases.given_gradients(number)]
        try:
            self.take(given)
        except tf.errors.InvalidArgumentError as error:
            # In a graph TensorFlow knows no other error, and has the text within its own.
            found = decoded(error) if self.in_graph else None
            if found is None or str(found) not in str(error):
                raise
            raise found from None

    def values(self) -> list[np.ndarray]:
        return [v.numpy() for v in self.variables]

    def assign(self, values: Sequence[Any]) -> None:
        for variable, value in zip(self.variables, values, strict=True):
            variable.assign(value)

    @property
    def report(self) -> Any:
        return self.tape.report

    def until_all_are_out_of_data(self) -> Any:
        return cases.joining(hvd.join)

    def save(self) -> dict[str, Any]:
        """All there is, and by itself what the aggregator remembers."""
        memory = {name.removeprefix("0/"): value for name, value in hvd.TapeState().state_dict().items()}
        return {"values": self.values(), "memory": memory, "optimizer": None}

    def load(self, saved: dict[str, Any]) -> None:
        hvd.TapeState().load_state_dict({f"0/{name}": value for name, value in saved["memory"].items()})
        self.assign(saved["values"])

    def through_plain(self, saved: dict[str, Any]) -> dict[str, Any]:
        """The state of a training without an aggregator, which remembers nothing."""
        return {**saved, "memory": {}}


#: None that a tape can see; Keras' optimizers use the same graph, and have some.
STRAYS: dict[str, Any] = {}
COMPARES_AVERAGED = True
FOUND = 1
OUT_OF_DATA_IS_TOLD = False


def _missing_always(case: Case) -> list[tuple[int, int, int]]:
    """Gradients that are missing in every step, but not all of a rank's."""
    pairs = {(rank, number) for _, rank, number in case.missing}
    few = [pair for pair in sorted(pairs) if sum(rank == pair[0] for rank, _ in pairs) < len(case.shapes)]
    return [(step, *pair) for step in range(case.epochs * max(case.steps)) for pair in few]


def _rows(variable: tf.Variable) -> tf.Tensor:
    return tf.repeat(tf.range(variable.shape[0] - 1), 2)


def _given(case: Case, step: int, number: int) -> tf.Tensor:
    """The gradient of what a variable is used for."""
    value = cases.gradient(case, step, 0, harness.rank(), number)
    assert value is not None
    if number in case.sparse:
        value = value[:-1].repeat_interleave(2, 0)
    wide = value if value.is_complex() else value.double()  # numpy knows no bfloat16
    return tf.cast(tf.constant(wide.numpy()), case.types[number])


def _raw(case: Case, number: int, given: tf.Tensor) -> np.ndarray:
    """The gradient of the variable itself."""
    if number not in case.sparse:
        return _array(given)
    rows = given.numpy().astype(np.float64)
    shape = case.shapes[number]
    return np.concatenate([rows[::2] + rows[1::2], np.zeros((1, *shape[1:]))]).reshape(-1)


def _array(tensor: Any) -> np.ndarray:
    """As real float64 numbers."""
    tensor = tf.convert_to_tensor(tensor)
    if tensor.dtype.is_complex:
        tensor = tf.stack([tf.math.real(tensor), tf.math.imag(tensor)], -1)
    array: np.ndarray = tf.cast(tensor, tf.float64).numpy().reshape(-1)
    return array


def _step_and_see(take: Any, given: list[tf.Tensor]) -> tuple[list[np.ndarray] | None, list[np.ndarray] | str]:
    """This rank's gradients and the aggregated ones, or the error there was instead."""
    try:
        own, found = take(given)
    except (FloatingPointError, tf.errors.InvalidArgumentError) as error:
        # In a graph TensorFlow puts lines of its own around the message.
        text = re.search(r"the gradient of rank .* was told to raise", str(error))
        if text is None:
            raise
        return None, text[0]
    return [_array(g) for g in own], [_array(g) for g in found]
