"""TensorFlow's operations mean what PyTorch's do: the same mathematics, run through both."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Hashable
from types import FunctionType
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import torch

from adacons_hvd import AdaCons, Aggregator, Curvature, Decision, Mean, NormalizedMean, Statistics
from adacons_hvd.insight import SickWorkers
from adacons_hvd.ops import ops_for, tensorflow_graphs
from adacons_hvd.ops import tensorflow as ours
from adacons_hvd.ops import torch as theirs
from adacons_hvd.ops.structures import tensors_in

AGGREGATORS: list[Aggregator] = [
    AdaCons(),
    AdaCons(momentum=0),
    AdaCons(normalize=False),
    AdaCons(momentum=0, normalize=False),
    AdaCons(scale="average"),
    AdaCons(nonfinite="exclude"),
    Mean(),
]


def matrices(steps: int = 5, workers: int = 5, length: int = 1000) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    mean = rng.standard_normal(length)
    return [(mean + rng.standard_normal((workers, length))).astype(np.float32) for _ in range(steps)]


def public(module: Any) -> set[str]:
    return {name for name, value in vars(module).items() if isinstance(value, FunctionType) and name[0] != "_"}


def test_both_frameworks_offer_the_same_functions() -> None:
    assert public(theirs) <= public(ours)
    assert ops_for(tf.ones(3)) is ours
    assert ops_for(tf.Variable([1.0])) is ours


@pytest.mark.parametrize("aggregator", AGGREGATORS, ids=repr)
def test_aggregators_agree_with_torch_step_by_step(aggregator: Aggregator) -> None:
    twin = type(aggregator)(**vars(aggregator))
    for rows in matrices():
        got = aggregator(tf.constant(rows)).numpy()
        expected = twin(torch.from_numpy(rows)).numpy()
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    for name, value in twin._memory.items():
        np.testing.assert_allclose(aggregator._memory[name].numpy(), value.numpy(), rtol=1e-6)


@pytest.mark.parametrize("aggregator", [AdaCons(), AdaCons(scale="average"), Mean()], ids=repr)
def test_a_graph_computes_what_eager_code_does(aggregator: Aggregator) -> None:
    present = tf.constant([True, True, True, False])

    def decide(rows: tf.Tensor, memory: dict[str, tf.Tensor]) -> Any:
        decision = aggregator.decide(Statistics.of(rows, present=present), memory)
        return decision.weights, decision.memory

    graph = tf.function(decide)
    memory: dict[str, tf.Tensor] = {}
    twin: dict[str, tf.Tensor] = {}
    for rows in matrices(workers=4):
        masked = tf.constant(rows) * tf.cast(present, tf.float32)[:, None]
        weights, memory = decide(masked, memory)
        traced, twin = graph(masked, twin)
        np.testing.assert_allclose(traced.numpy(), weights.numpy(), rtol=1e-12)
    assert weights.numpy()[3] == 0


PURE: list[Aggregator] = [AdaCons(), NormalizedMean(), Curvature(), SickWorkers(AdaCons(), policy="exclude")]


@pytest.mark.parametrize("aggregator", PURE, ids=repr)
def test_a_recorded_decision_is_the_same_step_by_step(aggregator: Aggregator) -> None:
    def decide(table: tf.Tensor, present: tf.Tensor, memory: dict[str, tf.Tensor]) -> Decision:
        statistics = Statistics.read(table, present, aggregator.needs_gramian, aggregator.history)
        return aggregator.decide(statistics, memory)

    recorded = ours.recorded(decide)
    memory: dict[str, tf.Tensor] = {}
    twin: dict[str, tf.Tensor] = {}
    for step in range(6):
        rows = tf.constant(np.random.default_rng(step).standard_normal((2, 4, 20)) + 0.5)
        products = tf.matmul(rows, rows, transpose_b=True)
        if not aggregator.needs_gramian:
            products = tf.stack([tf.reduce_sum(products, -1), tf.linalg.diag_part(products)], -1)
        table = tf.concat([products, rows[..., : aggregator.history]], -1)
        if step == 3:
            table *= np.nan
        present = tf.constant([[True, True, True, step != 2]] * 2)
        expected, found = decide(table, present, memory), recorded(aggregator.identity, table, present, twin)
        memory, twin = expected.memory, found.memory
        assert [*found.stages, *twin] == [*expected.stages, *memory]
        for a, b in zip(tensors_in(found, tf.Tensor), tensors_in(expected, tf.Tensor), strict=True):
            np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-9, atol=1e-12)


def test_operations_are_recorded_once_for_each_key_and_each_form_of_the_arguments() -> None:
    made: list[Any] = []

    def double(x: tf.Tensor, held: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        made.append(tf.compat.v1.get_default_graph())
        return {name: 2 * x + value for name, value in held.items()}

    def step(key: str, *arguments: Any) -> Any:
        return tf.function(lambda: ours.recorded(double)(key, *arguments), autograph=False)()

    one, two = tf.ones((1,), tf.float64), tf.ones((2,), tf.float64)
    with tf.device("cpu"):
        assert step("recorded here", one, {"a": one})["a"].numpy() == 3
    assert step("recorded here", one, {"a": 2 * one})["a"].numpy() == 4
    assert len(made) == 1
    assert {operation.device for operation in made[0].get_operations()} == {""}
    assert step("recorded here", two, {"a": two})["a"].numpy().tolist() == [3, 3]
    assert list(step("recorded here", one, {"b": one})) == ["b"]
    assert step("recorded there", one, {"a": one})["a"].numpy() == 3
    assert len(made) == 4


def test_what_is_recorded_keeps_nothing_alive_and_is_forgotten_in_the_end() -> None:
    class Model:
        def double(self, x: tf.Tensor) -> tf.Tensor:
            return 2 * x

    def step(key: Hashable) -> tuple[weakref.ref[Any], weakref.ref[Any]]:
        model, variable = Model(), tf.Variable(tf.ones((3,)))
        graph = tf.function(lambda: ours.recorded(model.double)(key, variable + 1), autograph=False)
        assert graph().numpy().tolist() == [4, 4, 4]
        return weakref.ref(model), weakref.ref(variable)

    references = step(("kept", 0))
    gc.collect()
    assert [reference() for reference in references] == [None, None]
    for number in range(70):
        step(("kept", number))
    assert len(tensorflow_graphs._graphs) <= 64


@pytest.mark.parametrize("case", ["zero", "opposed", "nan", "one worker zero"])
def test_edge_cases_agree_with_torch(case: str) -> None:
    rows = matrices(1, 4, 50)[0]
    if case == "zero":
        rows[:] = 0
    elif case == "opposed":
        rows[1::2] = -rows[::2]
    elif case == "nan":
        rows[2, 3] = np.nan
    else:
        rows[1] = 0
    decision, _ = AdaCons().explain(tf.constant(rows))
    twin, _ = AdaCons().explain(torch.from_numpy(rows))
    np.testing.assert_allclose(decision.weights.numpy(), twin.weights.numpy(), rtol=1e-6)
    assert decision.fallback.numpy().tolist() == twin.fallback.tolist()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(("workers", "length"), [(1, 7), (3, 0), (4, 300_001), (20, 30_011)])
def test_large_operations(dtype: str, workers: int, length: int) -> None:
    rng = np.random.default_rng(1)
    numbers = rng.standard_normal((workers, length)).astype(np.float32)
    rows = tf.cast(tf.constant(numbers), dtype)
    exact = tf.cast(rows, tf.float64).numpy()
    products = exact @ exact.T
    close = {"rtol": 1e-5, "atol": 1e-4 * np.sqrt(length)}
    np.testing.assert_allclose(ours.gramian(rows).numpy(), products, **close)
    np.testing.assert_allclose(
        ours.consensus(rows).numpy(), np.stack([products.sum(1), products.diagonal()], 1), rtol=1e-5, atol=1e-2
    )
    np.testing.assert_allclose(ours.square(rows[0]).numpy(), products[0, 0], **close)
    np.testing.assert_allclose(ours.moments(rows[0], rows[-1]).numpy(), [products[0, -1], products[0, 0]], **close)
    weights = tf.constant(rng.random(workers), tf.float64)
    combined = ours.combine(weights, rows)
    assert combined.dtype == rows.dtype
    rounding = {"float16": 1e-2, "bfloat16": 1e-1}.get(dtype, 1e-5)
    np.testing.assert_allclose(tf.cast(combined, tf.float64).numpy(), weights.numpy() @ exact, atol=rounding, rtol=1e-2)


def test_segments_are_laid_side_by_side() -> None:
    rows = tf.constant(np.arange(20, dtype=np.float32).reshape(2, 10))
    first, second = tf.constant([1.0, 0.0], tf.float64), tf.constant([0.0, 2.0], tf.float64)
    got = ours.combine_segments(rows, [(1, 3, first), (3, 8, second)], None).numpy()
    assert got.tolist() == [0, 1, 2, 26, 28, 30, 32, 34, 0, 0]
    assert ours.placed(rows[1, :3], 1, 3, None).numpy().tolist() == [0, 0, 0, 10, 11, 12, 0, 0, 0]
    half, three = tf.constant(0.5, tf.float64), tf.constant(3.0, tf.float64)
    got = ours.scale_segments(rows[0], [(0, 4, half), (4, 6, three)]).numpy()
    assert got.tolist() == [0, 0.5, 1, 1.5, 12, 15, 0, 0, 0, 0]


def test_sparse_operations_agree_with_torch() -> None:
    rng = np.random.default_rng(2)
    owners = np.array([0, 0, 0, 1, 2, 2])
    rows = np.array([4, 1, 7, 4, 7, 1])
    values = rng.standard_normal((6, 3)).astype(np.float32)
    weights = rng.random(4)
    packed = [ours.pack_rows(*_of(tf.constant, rows, values, owners == k), k, 4) for k in range(4)]
    twin = [theirs.pack_rows(*_of(torch.from_numpy, rows, values, owners == k), k, 4) for k in range(4)]
    for one, other in zip(packed, twin, strict=True):
        # Not as numbers: they may be anything, and anything but equal to themselves.
        assert one.numpy().tobytes() == other.numpy().tobytes()
    found = ours.unpack_rows(tf.concat(packed, 0), 4)
    for one, other in zip(found, (owners, rows, values), strict=True):
        np.testing.assert_array_equal(one.numpy(), other)

    got = _sparse_results(ours, *found, tf.constant(weights))
    expected = _sparse_results(theirs, *theirs.unpack_rows(torch.cat(twin), 4), torch.from_numpy(weights))
    order = np.argsort(got[0])
    assert got[0][order].tolist() == expected[0].tolist()
    np.testing.assert_allclose(got[1][order], expected[1], rtol=1e-6)
    np.testing.assert_allclose(got[2], expected[2], rtol=1e-5)
    np.testing.assert_allclose(got[3], expected[3], rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_rows_travel_in_the_type_of_their_values(dtype: str) -> None:
    rows, values = [0, 2**40, 7], [[1.0], [2.0], [float("inf")]]
    mine = ours.pack_rows(tf.constant(rows, tf.int64), tf.constant(values, dtype), 2, 3)
    twin = theirs.pack_rows(torch.tensor(rows), torch.tensor(values, dtype=getattr(torch, dtype)), 2, 3)
    for ops, packed in ((ours, mine), (theirs, twin)):
        assert packed.dtype == getattr(tf if ops is ours else torch, dtype)
        assert [
            x.numpy().tolist() if x.dtype != torch.bfloat16 else x.tolist() for x in ops.unpack_rows(packed, 3)
        ] == [
            [2, 2, 2],
            rows,
            values,
        ]


def _of(tensor: Any, rows: np.ndarray, values: np.ndarray, which: np.ndarray) -> tuple[Any, Any]:
    return tensor(rows[which]), tensor(values[which])


def _sparse_results(ops: Any, owners: Any, rows: Any, values: Any, weights: Any) -> list[np.ndarray]:
    """Distinct rows, the weighed sums of their values, and both tables of statistics."""
    once, places = ops.distinct(rows)
    summed = ops.sum_rows(values, places, once)
    tables = [
        ops.sparse_consensus(owners, places, summed, values, 4),
        ops.sparse_gramian(owners, places, once, values, 4),
    ]
    weighed = ops.sum_rows(ops.sparse_weigh(owners, values, weights), places, once)
    return [x.numpy() for x in (once, weighed, *tables)]


def test_sparse_operations_on_nothing() -> None:
    packed = ours.pack_rows(tf.zeros((0,), tf.int64), tf.zeros((0, 3)), 0, 4)
    once, weighed, *tables = _sparse_results(ours, *ours.unpack_rows(packed, 4), tf.ones(4, tf.float64))
    assert once.shape == (0,)
    assert weighed.shape == (0, 3)
    assert tables[0].tolist() == [[0, 0]] * 4
    assert tables[1].tolist() == [[0] * 4] * 4


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "float32", "float64", "complex64", "complex128", "int32", "int64", "uint8", "bool"]
)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (64, 33)])
def test_a_digest_tells_each_bit(dtype: str, shape: tuple[int, ...]) -> None:
    numbers = np.random.default_rng(3).integers(0, 2, shape).astype("float32")
    value = tf.cast(tf.constant(numbers), dtype)
    array, same = np.array(value.numpy()), tf.Variable(value)
    assert ours.digest([value, same]).numpy() == (ours.digest([same]) + ours.digest([value])).numpy()
    assert ours.digest([value]).dtype == tf.int64
    graph = tf.function(lambda: ours.digest([same]), autograph=False)
    assert graph().numpy() == ours.digest([value]).numpy()
    others = []
    for place in {0, array.nbytes // 3, array.nbytes - 1}:
        for bit in range(8) if dtype != "bool" else [0]:
            raw = bytearray(array.tobytes())
            raw[place] ^= 1 << bit
            other = np.frombuffer(raw, array.dtype).reshape(shape)
            others.append(ours.digest([tf.constant(other)]).numpy())
    assert ours.digest([value]).numpy() not in others


def test_digests_of_nothing() -> None:
    assert ours.digest([]).numpy() == 0
    assert ours.digest([tf.zeros((0, 3))]).numpy() == 0
