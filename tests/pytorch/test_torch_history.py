"""Aggregators that need more than dots and squares: the mean gradients of earlier steps, and element by element."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

SCHEDULES = ["one-pass", "gather"]
SETTINGS: list[dict[str, Any]] = [
    {"memory": 8},
    {"memory": 3, "damping": 0.3, "length": "average"},
    {"memory": 4, "workers": False, "length": "agreement"},
    {"memory": 0},
]


def wrapped(model: Any, aggregator: Any, **options: Any) -> Any:
    import torch

    import adacons_hvd.torch as hvd

    options = {"schedule": "one-pass", "bucket_bytes": 256, **options}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    return hvd.DistributedOptimizer(optimizer, model.named_parameters(), aggregator=aggregator, **options)


def train(dtype_name: str, tolerance: float, every: int = 1) -> int:
    """Train by both schedules with every setting and granularity, or by every `every`-th; how many there were.

    And some steps with the mean at a length of its own.
    """
    import oracle
    import torch
    from torch_job import Batches, compare, loss_of, network

    import adacons_hvd.torch as hvd
    from adacons_hvd import Curvature, NormalizedMean

    hvd.init()
    dtype = getattr(torch, dtype_name)
    cases = itertools.product(SETTINGS, SCHEDULES, ["model", "layer"])
    chosen = list(enumerate(cases))[::every]
    for seed, (settings, schedule, granularity) in chosen:
        model, batches = network(seed, dtype), Batches(seed, dtype)
        optimizer = wrapped(model, Curvature(**settings), schedule=schedule, granularity=granularity)
        parameters = list(model.parameters())
        everything = list(range(len(parameters)))
        compare(
            optimizer,
            parameters,
            lambda _: loss_of(model, batches).backward(),  # noqa: B023 - called before the next
            # The longest memory is full after 8, and then the oldest make room.
            steps=12,
            settings={"oracle": oracle.CurvatureOracle, **settings},
            groups=[[i] for i in everything] if granularity == "layer" else [everything],
            tolerance=tolerance,
        )
        report = optimizer.report
        assert (report.schedule, report.fallbacks) == (schedule, 0)
        kept = -(-sum(p.numel() for p in parameters) // (1 if schedule == "gather" else hvd.size()))
        width = torch.finfo(dtype).bits // 8
        # One row more than steps, and padding in each bucket.
        assert report.history_bytes >= (settings["memory"] + 1) * kept * width * bool(settings["memory"])
    for schedule, length in (("two-pass", "unit"), ("one-pass", "agreement")):
        model, batches = network(0, dtype), Batches(0, dtype)
        optimizer = wrapped(model, NormalizedMean(length), schedule=schedule)
        compare(
            optimizer,
            list(model.parameters()),
            lambda _: loss_of(model, batches).backward(),  # noqa: B023 - called before the next
            settings={"oracle": oracle.NormalizedMeanOracle, "length": length},
            tolerance=tolerance,
        )
        assert optimizer.report.fallbacks == 0
    return len(chosen)


@pytest.mark.ranks(2, 3, launcher="mpi", soak={"mpi": (3,)})
def test_curvature_agrees_with_the_oracle(cluster):
    assert cluster.run(train, "float32", 1e-5) == [16] * cluster.ranks


# A third still has every setting, and both schedules with both granularities.
@pytest.mark.ranks(4, launcher="mpi")
def test_a_third_agrees_with_the_oracle(cluster):
    assert cluster.run(train, "float32", 1e-5, 3) == [6] * cluster.ranks


@pytest.mark.ranks(3, launcher="gloo")
def test_a_third_agrees_with_the_oracle_in_float64(cluster):
    assert cluster.run(train, "float64", 1e-12, 3) == [6] * cluster.ranks


@pytest.mark.soak
@pytest.mark.ranks(5, 8)
@pytest.mark.time_limit(900)
def test_curvature_agrees_with_the_oracle_on_many_ranks(cluster):
    assert cluster.run(train, "float32", 1e-5) == [16] * cluster.ranks
    assert cluster.run(train, "float64", 1e-12) == [16] * cluster.ranks


def resume(folder: str, schedule: str, gathered: bool) -> None:
    """Half of the steps, then a new optimizer from a checkpoint for the rest, beside one that just goes on."""
    from pathlib import Path

    import harness
    import torch
    from torch_job import Batches, assert_equal_bits, loss_of, network

    import adacons_hvd.torch as hvd
    from adacons_hvd import Curvature

    hvd.init()
    path = Path(folder) / ("all.pt" if gathered else f"{hvd.rank()}.pt")
    model, batches = network(), Batches()
    optimizer = wrapped(model, Curvature(4), schedule=schedule)
    for step in range(12):
        if step == 6:
            if gathered:
                optimizer.gather_history()
            if hvd.rank() == 0 or not gathered:
                torch.save([model.state_dict(), optimizer.state_dict()], path)
            harness.gather(None)
            saved_model, saved_optimizer = torch.load(path, weights_only=True)
            again, later = network(), Batches()
            # Another bucket size, so that other elements are this rank's.
            resumed = wrapped(again, Curvature(4), schedule=schedule, bucket_bytes=256 if not gathered else 1 << 20)
            again.load_state_dict(saved_model)
            resumed.load_state_dict(saved_optimizer)
            later.generator.set_state(batches.generator.get_state())
        pairs = [(model, optimizer, batches)] + ([(again, resumed, later)] if step >= 6 else [])
        for net, opt, data in pairs:
            opt.zero_grad()
            loss_of(net, data).backward()
            opt.step()
    for mine, other in zip(model.parameters(), again.parameters(), strict=True):
        if gathered:  # sums over other buckets differ in their last digits
            assert torch.allclose(mine, other, rtol=1e-5, atol=1e-7)
        else:
            assert torch.equal(mine, other)
    assert resumed.report.fallbacks == 0
    assert resumed._reducer.state.kept == 12
    assert_equal_bits(list(again.parameters()))


@pytest.mark.ranks(2, 3, soak={"mpi": (2,), "gloo": (3,)})
def test_a_state_goes_on_bit_for_bit_where_every_rank_saves_its_own(cluster, tmp_path):
    for schedule in SCHEDULES:
        cluster.run(resume, str(tmp_path), schedule, False)


@pytest.mark.ranks(3)
def test_a_gathered_state_goes_on_in_any_layout(cluster, tmp_path):
    for schedule in SCHEDULES:
        cluster.run(resume, str(tmp_path), schedule, True)


def oracle_continues(path: str, load: bool, steps: int = 8) -> Any:
    """Train some steps, from a saved state or to one; each step is held against an oracle of all steps so far."""
    import harness
    import oracle
    import torch
    from torch_job import Batches, array, loss_of, network

    import adacons_hvd.torch as hvd
    from adacons_hvd import Curvature

    hvd.init()
    model, batches = network(), Batches(int(load))
    optimizer = wrapped(model, Curvature(4))
    judge = oracle.Grouped([list(range(6))], oracle.CurvatureOracle, memory=4)
    if load:
        saved_model, saved, judge.oracles[0].means = torch.load(path, weights_only=False)
        model.load_state_dict(saved_model)
        optimizer.load_state_dict(saved)
    parameters = list(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, batches).backward()
        everyone = harness.gather([array(p.grad, p) for p in parameters])
        optimizer.synchronize()
        expected = judge(everyone)
        assert oracle.error([array(p.grad, p) for p in parameters], expected) < 1e-5
        with optimizer.skip_synchronize():
            optimizer.step()
    optimizer.gather_history()
    if hvd.rank() == 0 and not load:
        torch.save([model.state_dict(), optimizer.state_dict(), judge.oracles[0].means], path)
    return optimizer.state_dict()["adacons"]["workers"]


@pytest.mark.ranks(3, soak={"mpi": (3,)})
def test_another_number_of_workers_takes_up_a_gathered_history(cluster, tmp_path):
    path = str(tmp_path / "state.pt")
    assert cluster.run(oracle_continues, path, False) == [3] * 3
    for number in (2, 4):
        assert cluster.with_ranks(number).run(oracle_continues, path, True) == [number] * number


def changes(what: str) -> None:
    """A history that cannot go on: it starts afresh, on all ranks, and says so."""
    import warnings

    import harness
    import oracle
    from torch_job import Batches, array, assert_equal_bits, loss_of, network

    import adacons_hvd.torch as hvd
    from adacons_hvd import Curvature

    hvd.init()
    model, batches = network(), Batches()
    optimizer = wrapped(model, Curvature(4))
    parameters = list(model.parameters())

    def step(judge: Any) -> None:
        optimizer.zero_grad()
        loss_of(model, batches).backward()
        trained = [p for p in parameters if p.requires_grad]
        everyone = harness.gather([array(p.grad, p) for p in trained])
        optimizer.synchronize()
        if judge is not None:
            assert oracle.error([array(p.grad, p) for p in trained], judge(everyone)) < 1e-5
        with optimizer.skip_synchronize():
            optimizer.step()

    for _ in range(5):
        step(None)
    if what == "frozen":
        parameters[0].requires_grad_(False)
    elif what == "one rank's state for all":
        state = hvd.broadcast_object(optimizer.state_dict()["adacons"], 0)
        optimizer.load_state_dict({**optimizer.state_dict(), "adacons": state})
    count = sum(p.requires_grad for p in parameters)
    judge = oracle.Grouped([list(range(count))], oracle.CurvatureOracle, memory=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(6):
            step(judge)
    assert any("so the aggregator's history begins afresh" in str(w.message) for w in caught)
    assert optimizer._reducer.state.kept == 6
    assert_equal_bits(parameters)


@pytest.mark.ranks(2, 3, launcher="mpi")
def test_a_history_that_cannot_go_on_begins_afresh(cluster):
    for what in ("frozen", "one rank's state for all"):
        cluster.run(changes, what)


def scaled() -> None:
    """Half-precision messages and a loss scale that changes: the history is one of true gradients."""
    import harness
    import oracle
    import torch
    from torch_job import array, assert_equal_bits

    import adacons_hvd.torch as hvd
    from adacons_hvd import Curvature

    hvd.init()
    own = torch.Generator().manual_seed(hvd.rank())
    for schedule in SCHEDULES:
        parameters = [torch.nn.Parameter(torch.zeros(301)), torch.nn.Parameter(torch.zeros(50))]
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
        scaler.scale(torch.ones(()))
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(parameters, lr=1.0),
            aggregator=Curvature(4),
            schedule=schedule,
            compression=hvd.Compression.fp16,
            grad_scaler=scaler,
        )
        judge = oracle.Grouped([[0, 1]], oracle.CurvatureOracle, memory=4)
        for step in range(10):
            scale = 2.0 ** (14 - step)
            scaler._scale.fill_(scale)
            for parameter in parameters:
                parameter.grad = (torch.randn(parameter.shape, generator=own) + 0.3) * 1e-3 * scale
            sent = harness.gather([array(p.grad.half(), p) / scale for p in parameters])
            optimizer.synchronize()
            found = [array(p.grad, p) / scale for p in parameters]
            assert oracle.error(found, judge(sent)) < 3e-3, step
            with optimizer.skip_synchronize():
                optimizer.step()
        assert optimizer.report.fallbacks == 0
        assert_equal_bits(parameters)


@pytest.mark.ranks(2)
def test_a_loss_scale_and_half_precision(cluster):
    cluster.run(scaled)


def nonfinite(policy: str) -> None:
    import harness
    import oracle
    import torch
    from torch_job import array, assert_equal_bits

    import adacons_hvd.torch as hvd
    from adacons_hvd import Curvature

    hvd.init()
    own = torch.Generator().manual_seed(hvd.rank())
    parameters = [torch.nn.Parameter(torch.zeros(31)), torch.nn.Parameter(torch.zeros(5))]
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(parameters, lr=0.0), aggregator=Curvature(3, nonfinite=policy), schedule="one-pass"
    )
    judge = oracle.Grouped([[0, 1]], oracle.CurvatureOracle, memory=3)
    for step in range(12):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=own) + 0.3
        bad = step % 3 == 1
        if bad and hvd.rank() == 1:
            parameters[0].grad[7] = float("nan")
        everyone = harness.gather([array(p.grad, p) for p in parameters])
        if bad and policy == "raise":
            with pytest.raises(FloatingPointError, match="rank 1"):
                optimizer.synchronize()
            continue
        optimizer.synchronize()
        found = [array(p.grad, p) for p in parameters]
        if bad and policy == "propagate":
            assert any(math.isnan(x) for x in found[0].tolist())
            continue
        assert oracle.error(found, judge(everyone[:1] + everyone[2:] if bad else everyone)) < 1e-5, step
    assert_equal_bits(parameters)


@pytest.mark.ranks(3, launcher="mpi")
def test_gradients_that_are_not_finite_leave_no_trace_in_the_history(cluster):
    for policy in ("propagate", "exclude", "raise"):
        cluster.run(nonfinite, policy)


def refusals() -> None:
    import torch
    from torch_job import network

    import adacons_hvd.torch as hvd
    from adacons_hvd import Curvature

    hvd.init()
    with pytest.raises(ValueError, match=r"needs the mean gradients of earlier steps, which schedule='two-pass' never"):
        wrapped(network(), Curvature(workers=False), schedule="two-pass")
    table = torch.nn.Embedding(10, 3, sparse=True)
    optimizer = wrapped(table, Curvature())
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(NotImplementedError, match="sparse gradients do not have; make them dense"):
        optimizer.step()


@pytest.mark.ranks(2, launcher="gloo")
def test_what_cannot_be_had_is_refused_in_words(cluster):
    cluster.run(refusals)


def left_over(aggregator: Any) -> str:
    """One rank joins; the others find out in their step."""
    from torch_job import Batches, loss_of, network

    import adacons_hvd.torch as hvd

    hvd.init()
    model, batches = network(), Batches()
    optimizer = wrapped(model, aggregator)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model, batches).backward()
        optimizer.step()
    if hvd.rank() == 1:
        hvd.join()
        return ""
    optimizer.zero_grad()
    loss_of(model, batches).backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        optimizer.zero_grad = lambda: None
        hvd.join()
        return str(error)
    return "no error"


@pytest.mark.ranks(2, launcher="mpi")
def test_a_rank_that_has_joined_leaves_no_history_to_go_on_with(cluster):
    from adacons_hvd import Curvature

    (error, _) = cluster.run(left_over, Curvature(workers=False), fresh=True)
    assert "needs the mean gradients of earlier steps, which cannot be had once a rank has called hvd.join()" in error


def elements() -> None:
    """The example of the docs: a trimmed mean, in words that every framework understands."""
    import harness
    import oracle
    import torch
    from element_wise import TrimmedMean
    from torch_job import Batches, array, assert_equal_bits, loss_of, network

    import adacons_hvd.torch as hvd

    hvd.init()
    for schedule, nonfinite in itertools.product(SCHEDULES, ["propagate", "exclude"]):
        aggregator = TrimmedMean()
        aggregator.nonfinite = nonfinite
        model, batches = network(), Batches()
        optimizer = wrapped(model, aggregator, schedule=schedule)
        parameters = list(model.parameters())
        for step in range(4):
            optimizer.zero_grad()
            loss_of(model, batches).backward()
            broken = nonfinite == "exclude" and step == 2
            if broken and hvd.rank() == 2:
                parameters[1].grad[0] = float("inf")
            everyone = harness.gather([array(p.grad, p) for p in parameters])
            optimizer.synchronize()
            rest = everyone[:2] + everyone[3:] if broken else everyone
            expected = [oracle.trimmed_mean([worker[i] for worker in rest]) for i in range(len(parameters))]
            assert oracle.error([array(p.grad, p) for p in parameters], expected) < 1e-6
            with optimizer.skip_synchronize():
                optimizer.step()
        assert_equal_bits(parameters)
    with pytest.raises(ValueError, match="needs every worker's gradient element by element, which schedule='half'"):
        wrapped(network(), TrimmedMean(), schedule="half")
    model = torch.nn.Linear(3, 1)
    assert wrapped(model, TrimmedMean(), schedule="auto") is not None


@pytest.mark.ranks(4, launcher="mpi")
def test_an_aggregator_that_works_element_by_element(cluster):
    cluster.run(elements)
