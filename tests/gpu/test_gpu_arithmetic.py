"""The GPU's results are those of float64 on the host, and nobody waits for them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from gpu_job import DEVICE, not_waiting, why_not

from adacons_hvd import AdaCons, Aggregator, Curvature, Decision, Mean, NormalizedMean, Statistics
from adacons_hvd.insight import SickWorkers
from adacons_hvd.ops import torch as ops

if why_not():
    pytest.skip(why_not(), allow_module_level=True)

#: What an element type keeps of a number, give or take.
TYPES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
#: What is left of a sum over many elements in single precision.
SUM = 2e-5
#: Below, at and beyond the number up to which a Gramian is computed for the statistics' sake; and odd ones.
WORKERS = (1, 2, 3, 4, 8, 16, 17, 32)


def random_rows(workers: int, length: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows that agree with each other somewhat, as gradients do."""
    generator = torch.Generator(DEVICE).manual_seed(workers)
    shared = torch.randn(length, generator=generator, device=DEVICE)
    return (shared + torch.randn(workers, length, generator=generator, device=DEVICE)).to(dtype)


def off(found: torch.Tensor, right: torch.Tensor) -> float:
    """The relative error."""
    return float((found.double() - right).norm() / right.norm())


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("workers", WORKERS)
def test_statistics_and_sums_of_rows(workers, dtype):
    rows = random_rows(workers, 100_003, dtype)
    wide = rows.double()
    products = wide @ wide.T
    assert off(ops.gramian(rows), products) < SUM
    found = ops.consensus(rows)
    assert off(found[:, 0], products.sum(1)) < SUM
    assert off(found[:, 1], products.diagonal()) < SUM
    weights = torch.linspace(-1, 2, workers, dtype=torch.float64, device=DEVICE)
    assert off(ops.combine(weights, rows), weights @ wide) < TYPES[dtype]
    out = torch.empty_like(rows[0])
    assert ops.combine(weights, rows[:, 7:1008], out=out[:1001]).data_ptr() == out.data_ptr()
    assert off(out[:1001], weights @ wide[:, 7:1008]) < TYPES[dtype]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_moments_and_scaling(dtype):
    g, s = random_rows(2, 100_003, dtype)
    right = torch.stack([g.double() @ s.double(), g.double() @ g.double()])
    assert off(ops.moments(g, s), right) < SUM
    assert off(ops.square(g), right[1]) < SUM
    factor = torch.tensor(0.3, dtype=torch.float64, device=DEVICE)
    scaled = ops.scale_segments(g.clone(), [(0, 50_000, factor), (50_000, 100_003, 2 * factor)])
    right = torch.cat([0.3 * g[:50_000].double(), 0.6 * g[50_000:].double()])
    assert off(scaled, right) < TYPES[dtype]
    narrow = ops.narrow_segments(g, [(0, len(g), factor)], torch.zeros(len(g), dtype=torch.float16, device=DEVICE))
    assert off(narrow, 0.3 * g.double()) < 1e-3


def test_arithmetic_over_more_than_one_block():
    length = (1 << 23) + 5
    rows = random_rows(4, length)
    products = torch.stack([torch.stack([(a.double() * b).sum() for b in rows]) for a in rows])
    assert off(ops.gramian(rows), products) < SUM
    right = sum(0.25 * row.double() for row in rows)
    assert off(ops.combine(torch.full((4,), 0.25, device=DEVICE, dtype=torch.float64), rows), right) < 1e-6
    flat = rows.view(-1)
    assert off(ops.square(flat), products.trace()) < SUM


def test_weights_are_those_of_the_host():
    for workers in (1, 2, 5, 64, 1024):
        rows = random_rows(workers, 200).cpu()
        statistics = [Statistics.of(rows, gramian=True), Statistics.of(rows, gramian=True)]
        there = Statistics(*(x.to(DEVICE) for x in (statistics[1].dots, statistics[1].squares, statistics[1].present)))
        for aggregator in (AdaCons(), AdaCons(normalize=False), AdaCons(momentum=0, scale="average"), Mean()):
            memories: list[dict[str, Any]] = [{}, {}]
            for _ in range(3):
                here_decision = aggregator.decide(statistics[0], memories[0])
                there_decision = aggregator.decide(there, memories[1])
                memories = [here_decision.memory, there_decision.memory]
                assert off(there_decision.weights.cpu(), here_decision.weights) < 1e-12


AGGREGATORS = [AdaCons(), Mean(), NormalizedMean(), Curvature(), Curvature(workers=False), Curvature(memory=0)]
AGGREGATORS += [SickWorkers(AdaCons(), policy="exclude", callback=print)]


def random_table(aggregator: Aggregator, workers: int, groups: int, step: int) -> torch.Tensor:
    """The table that a schedule makes of gradients that differ from step to step."""
    generator = torch.Generator(DEVICE).manual_seed(step)
    rows = torch.randn(groups, workers, 50, generator=generator, device=DEVICE, dtype=torch.float64) + 0.5
    past = torch.randn(groups, aggregator.history, 50, generator=generator, device=DEVICE, dtype=torch.float64)
    products = rows @ rows.mT
    if not aggregator.needs_gramian:
        products = torch.stack([products.sum(-1), products.diagonal(dim1=-2, dim2=-1)], -1)
    return torch.cat([products, rows @ past.mT], -1)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("workers", [2, 32])
@pytest.mark.parametrize("aggregator", AGGREGATORS, ids=repr)
def test_a_recorded_decision_is_the_same_bits(aggregator, workers, groups):
    def decide(table: torch.Tensor, present: torch.Tensor, memory: dict[str, torch.Tensor]) -> Decision:
        statistics = Statistics.read(table, present, aggregator.needs_gramian, aggregator.history)
        return aggregator.decide(statistics, memory)

    recorded = ops.recorded(decide)
    plain, repeated, kept = {}, {}, []
    for step in range(12):
        table = random_table(aggregator, workers, groups, step)
        present = torch.ones(groups, workers, dtype=torch.bool, device=DEVICE)
        present[:, -1] = step % 4 != 3
        if step == 5:
            table[0, 0] = torch.nan
        expected = decide(table.clone(), present, plain)
        with not_waiting() if step > 3 else contextlib.nullcontext():
            found = recorded(repr(aggregator), table, present, repeated)
        plain, repeated = expected.memory, found.memory
        kept.append((expected, found))
    # All at the end, so that a result which the next step has overwritten is noticed.
    for expected, found in kept:
        assert equal_bits(found, expected)
    assert (recorded._graph is not None) == (DEVICE == "cuda")


def equal_bits(found: Decision, expected: Decision) -> bool:
    """Whether two decisions are the same in all that they hold."""
    pairs = [(getattr(found, field.name), getattr(expected, field.name)) for field in dataclasses.fields(Decision)]
    named = [(dict(a), dict(b)) for a, b in pairs if isinstance(a, Mapping)]
    pairs += [(a[name], b[name]) for a, b in named for name in a.keys() | b.keys()]
    return all(torch.equal(a, b) for a, b in pairs if isinstance(b, torch.Tensor)) and all(
        (a is None) == (b is None) for a, b in pairs
    )


def test_a_setting_that_changes_changes_what_is_recorded():
    aggregator, table = AdaCons(), random_table(AdaCons(), 4, 1, 0)
    present = torch.ones(1, 4, dtype=torch.bool, device=DEVICE)
    recorded = ops.recorded(lambda t, p, m: aggregator.decide(Statistics.read(t, p, False), m))
    memory = recorded(repr(aggregator), table, present, {}).memory
    for step in range(8):
        aggregator.scale = "average" if step > 3 else "unit"
        found = recorded(repr(aggregator), table, present, memory)
        assert equal_bits(found, aggregator.decide(Statistics.read(table, present, False), memory))
        memory = found.memory


def test_a_sketch_is_that_of_the_host():
    flat = random_rows(1, 300_000)[0]
    segments, lengths = [(0, 200_000, 0), (200_000, 299_999, 1)], [5000, 4097]
    step = torch.zeros((), dtype=torch.float64)

    def sketched(device: str) -> torch.Tensor:
        x = flat.to(device)
        signs = ops.signs(20_000, None, x)
        out = torch.zeros(sum(lengths), device=device)
        return ops.sketch_segments(x, segments, lengths, signs, 97, step.to(device), out)

    assert off(sketched(DEVICE).cpu(), sketched("cpu").double()) < 1e-5


def test_sparse_statistics_are_those_of_the_host_and_the_same_every_time():
    generator = torch.Generator().manual_seed(0)
    rows = torch.cat([torch.randperm(3000, generator=generator)[:2000] for _ in range(4)])
    owners = torch.arange(4).repeat_interleave(2000)
    values = torch.randn(8000, 64, generator=generator) + 0.3
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)

    def on(device: str) -> list[torch.Tensor]:
        o, r, v = (x.to(device) for x in (owners, rows, values))
        o, r, v = ops.unpack_rows(torch.cat([ops.pack_rows(r[o == k], v[o == k], k, 4) for k in range(4)]), 4)
        found, places = ops.distinct(r)
        table = ops.sparse_consensus(o, places, ops.sum_rows(v, places, found), v, 4)
        products = ops.sparse_gramian(o, places, found, v, 4)
        summed = ops.sum_rows(ops.sparse_weigh(o, v, weights.to(device)), places, found)
        return [x.cpu() for x in (table, products, found, summed)]

    right, first = on("cpu"), on(DEVICE)
    assert off(first[0], right[0].double()) < 1e-6
    assert off(first[1], right[1].double()) < 1e-6
    assert torch.equal(first[2], right[2])
    assert off(first[3], right[3].double()) < 1e-6
    # Every rank computes these for itself, and all need the same bits.
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(on(DEVICE), first, strict=True))


def test_a_digest_is_that_of_the_host():
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, generator=generator).to(t) for n in (0, 1, 7, 200_001) for t in (*TYPES, torch.complex64)]
    there = [t.to(DEVICE) for t in tensors]
    digest = int(ops.digest(there))
    assert digest == int(ops.digest(tensors))
    there[-1][5] += 1
    assert int(ops.digest(there)) != digest


def operations() -> dict[str, Callable[[], object]]:
    """Return the operations that run in a step."""
    rows, many = random_rows(4, 10_000), random_rows(32, 10_000)
    flat, other = rows[0], rows[1].clone()
    one = torch.ones((), dtype=torch.float64, device=DEVICE)
    gamma, more = torch.full((4,), 0.25, device=DEVICE).double(), torch.full((32,), 0.1, device=DEVICE).double()
    half, out = torch.zeros(10_000, dtype=torch.float16, device=DEVICE), torch.zeros(1000, device=DEVICE)
    signs = ops.signs(20_000, None, flat)
    return {
        "gramian": lambda: ops.gramian(rows),
        "consensus": lambda: (ops.consensus(rows), ops.consensus(many)),
        "combine": lambda: (ops.combine(gamma, rows), ops.combine(more, many.bfloat16())),
        "moments": lambda: (ops.moments(flat, other), ops.square(flat)),
        "scale": lambda: ops.scale_segments(other, [(0, 5000, one), (5000, 10_000, one)]),
        "narrow": lambda: ops.narrow_segments(flat, [(0, 10_000, one)], half),
        "sketch": lambda: ops.sketch_segments(flat, [(0, 10_000, 0)], [1000], signs, 97, one, out),
        "placed": lambda: ops.placed(flat, 1, 4, torch.empty(40_000, device=DEVICE)),
        "blank": lambda: ops.blank_unless(one > 0, other),
        "digest": lambda: ops.digest([flat, other, half]),
        "like": lambda: ops.like([1.0, 2.0], flat),
    }


@pytest.mark.parametrize("name", operations())
def test_no_operation_waits(name):
    once = operations()[name]
    once()
    with not_waiting():
        once()


@pytest.mark.parametrize("workers", [2, 1024])
@pytest.mark.parametrize("aggregator", [AdaCons(), AdaCons(normalize=False, scale="average"), Mean()], ids=repr)
def test_no_decision_waits(aggregator, workers):
    statistics = Statistics.of(random_rows(workers, 100))
    memory = aggregator.decide(statistics, {}).memory
    with not_waiting():
        aggregator.decide(statistics, memory)


def test_single_precision_may_be_shortened_by_the_user():
    """With TF32 allowed the products have 10 bits; over many elements the roundings cancel."""
    rows = random_rows(4, 1_000_000)
    right = rows.double() @ rows.double().T
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert off(ops.gramian(rows), right) < 1e-4
        gamma = torch.full((4,), 0.25, device=DEVICE, dtype=torch.float64)
        # The result itself must not lose digits.
        assert off(ops.combine(gamma, rows), gamma @ rows.double()) < 1e-6
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
