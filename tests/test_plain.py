"""The mathematics on Python's own numbers: the same as on tensors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adacons_hvd import AdaCons, Mean
from adacons_hvd.aggregators import Statistics
from adacons_hvd.ops import Plain, as_plain, ops_for

seeds = st.integers(0, 10**6)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 5))


def tensor(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same(plain: Plain, expected: torch.Tensor) -> None:
    assert plain.shape == tuple(expected.shape)
    found = ops_for(expected).beside(plain, expected)
    assert found.dtype == expected.dtype or expected.dtype == torch.int64
    # Numbers are about as long as one, so the second is what rounding leaves of sums that cancel.
    assert torch.allclose(found.to(torch.float64), expected.to(torch.float64), rtol=1e-14, atol=1e-14, equal_nan=True)


OPERATORS = {
    "+": lambda x, y: x + y,
    "-": lambda x, y: x - y,
    "*": lambda x, y: x * y,
    "/": lambda x, y: x / y,
    ">": lambda x, y: x > y,
    ">=": lambda x, y: x >= y,
    "<": lambda x, y: x < y,
    "<=": lambda x, y: x <= y,
    "==": lambda x, y: x == y,
    "& |": lambda x, y: (x > 0) & (y > 0) | ~(x > y),
    "2 - x": lambda x, y: 2.0 - x,
    "1 / x": lambda x, y: 1 / x,
    "x * 3": lambda x, y: 3.0 * (x * 3),
}


@pytest.mark.parametrize("name", OPERATORS)
@settings(max_examples=25, deadline=None)
@given(shape=shapes, seed=seeds)
def test_operators_broadcast_as_tensors_do(name, shape, seed):
    groups, workers = shape
    x = tensor(shape, seed)
    for other in ((groups, workers), (groups, 1), (workers,), (1,), ()):
        y = tensor(other, seed + 1)
        function = OPERATORS[name]
        assert_same(function(as_plain(x), as_plain(y)), function(x, y))
        if name not in ("2 - x", "1 / x", "x * 3"):
            assert_same(function(as_plain(y), as_plain(x)), function(y, x))


FUNCTIONS = {
    "wide": lambda ops, x: ops.wide(x > 0),
    "sqrt": lambda ops, x: ops.sqrt(x * x),
    "absolute": lambda ops, x: ops.absolute(x),
    "floor": lambda ops, x: ops.floor(x),
    "clip": lambda ops, x: ops.clip(x, -0.5, 0.5),
    "isfinite": lambda ops, x: ops.isfinite(x / ops.floor(x)),
    "total": lambda ops, x: ops.total(x),
    "every": lambda ops, x: ops.every(x > 0),
    "any_of": lambda ops, x: ops.any_of(x > 0),
    "argsort": lambda ops, x: ops.argsort(ops.floor(x)),
    "take": lambda ops, x: ops.take(x, ops.argsort(x)),
    "zeros": lambda ops, x: ops.zeros((2, 3), x),
    "booleans": lambda ops, x: ops.booleans((2, 3), True, x),
    "ones_like": lambda ops, x: ops.ones_like(x) + ops.zeros_like(x),
    "like": lambda ops, x: ops.like([1.0, 2.0], x),
    "stack": lambda ops, x: ops.stack([x, x + 1]),
    "add_n": lambda ops, x: ops.add_n([x, x, x]),
    "concat": lambda ops, x: ops.concat([ops.reshape(x, (-1,)), ops.like([4.0], x)]),
    "in_row": lambda ops, x: ops.in_row(x, 1, 3),
    "reshape": lambda ops, x: ops.reshape(x, (-1, 1, x.shape[1])),
    "[..., 0]": lambda ops, x: ops.stack([x, x])[..., 0],
    "where": lambda ops, x: ops.where(x > 0, x, ops.zeros_like(x)),
    "where, of rows": lambda ops, x: ops.where(ops.any_of(x > 0), x, ops.total(x)),
    "transposed": lambda ops, x: ops.transposed(x),
    "first row": lambda ops, x: ops.first_row(x),
    "where, of columns": lambda ops, x: ops.where(x > 0, ops.total(x), x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@settings(max_examples=25, deadline=None)
@given(shape=shapes, seed=seeds)
def test_functions_are_those_of_tensors(name, shape, seed):
    x = tensor(shape, seed)
    function = FUNCTIONS[name]
    assert_same(function(ops_for(as_plain(x)), as_plain(x)), function(ops_for(x), x))


def test_values_come_back_as_they_went():
    for shape in ((), (3,), (2, 3), (2, 3, 4)):
        x = tensor(shape, 1)
        assert ops_for(as_plain(x)).to_list(as_plain(x)) == x.tolist()


@pytest.mark.parametrize(("x", "y"), [(1.0, 0.0), (-1.0, 0.0), (0.0, 0.0), (math.nan, 0.0), (1.0, -0.0)])
def test_division_by_zero_is_no_error(x, y):
    x, y = torch.tensor([x], dtype=torch.float64), torch.tensor([y], dtype=torch.float64)
    assert_same(as_plain(x) / as_plain(y), x / y)


@pytest.mark.parametrize(
    "aggregator",
    [AdaCons(), AdaCons(momentum=0.0), AdaCons(normalize=False), AdaCons(scale="average"), Mean()],
    ids=repr,
)
@settings(max_examples=40, deadline=None)
@given(shape=shapes, seed=seeds)
def test_aggregators_decide_alike(aggregator, shape, seed):
    groups, workers = shape
    memory, plain_memory = {}, {}
    for step in range(4):
        rows = tensor((groups, workers, 6), seed + step) * 10.0 ** (seed % 9 - 4)
        present = tensor((groups, workers), seed - step) > -1.0
        rows = rows * present[..., None]
        if seed % 5 == step:
            rows[:, 0] = 0  # a worker without a gradient
        if seed % 7 == step:
            rows[0, -1, 0] = math.nan
        table = torch.stack([(rows * rows.sum(1, keepdim=True)).sum(-1), (rows * rows).sum(-1)], -1)
        decision = aggregator.decide(Statistics.read(table, present, False), memory)
        plain = aggregator.decide(Statistics.read(as_plain(table), as_plain(present), False), plain_memory)
        memory, plain_memory = decision.memory, plain.memory
        for found, expected in [
            (plain.weights, decision.weights),
            (plain.fallback, decision.fallback),
            *((plain_memory[name], memory[name]) for name in memory),
            *((plain.stages[name], decision.stages[name]) for name in decision.stages),
        ]:
            found = ops_for(expected).beside(found, expected)
            assert torch.allclose(found.double(), expected.double(), rtol=1e-11, atol=1e-300, equal_nan=True)


def test_a_class_derived_from_a_portable_one_has_to_say_so_itself():
    class Own(AdaCons):
        def weigh(self, statistics, memory):
            return super().weigh(Statistics(*map(torch.abs, (statistics.dots, statistics.squares))), memory)

    assert AdaCons().is_portable
    assert not Own().is_portable
