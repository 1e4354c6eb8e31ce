"""Aggregators that need the mean gradients of earlier steps, or gradients element by element, under DDP."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.ranks(3, launcher="torchrun")

SCHEDULES = ["one-pass", "gather"]
SETTINGS: list[dict[str, Any]] = [
    {"memory": 8},
    {"memory": 3, "damping": 0.3, "length": "average"},
    {"memory": 4, "workers": False, "length": "agreement"},
    {"memory": 0},
]


def beside_the_oracle(dtype_name: str, tolerance: float, more: int) -> int:
    """Every setting, for as many steps as it remembers and some more, which push the first ones out."""
    import oracle
    import torch
    from ddp_job import network, train

    from adacons_hvd import Curvature, NormalizedMean

    cases = list(itertools.product(SETTINGS, SCHEDULES, ["model", "layer"]))
    for seed, (settings, schedule, granularity) in enumerate(cases):
        optimizer = train(
            network(seed, getattr(torch, dtype_name)),
            steps=settings["memory"] + more,
            aggregator=Curvature(**settings),
            granularity=granularity,
            schedule=schedule,
            groups=(lambda names: [[i] for i in range(len(names))]) if granularity == "layer" else None,
            oracle_settings={"oracle": oracle.CurvatureOracle, **settings},
            tolerance=tolerance,
        )
        report = optimizer.report
        assert (report.schedule, report.fallbacks) == (schedule, 0)
        assert (report.history_bytes > 0) == (settings["memory"] > 0)
    for schedule, length in (("two-pass", "unit"), ("one-pass", "agreement")):
        optimizer = train(
            network(0, getattr(torch, dtype_name)),
            aggregator=NormalizedMean(length),
            schedule=schedule,
            oracle_settings={"oracle": oracle.NormalizedMeanOracle, "length": length},
            tolerance=tolerance,
        )
        assert optimizer.report.fallbacks == 0
    return len(cases)


@pytest.mark.ranks(2, 4, launcher="torchrun")
@pytest.mark.time_limit(240)
def test_curvature_agrees_with_the_oracle(cluster):
    """DDP makes its buckets anew after the first step, so each of these moves the history to another layout."""
    assert cluster.run(beside_the_oracle, "float32", 1e-5, 4) == [16] * cluster.ranks


@pytest.mark.time_limit(240)
def test_curvature_agrees_with_the_oracle_in_float64(cluster):
    assert cluster.run(beside_the_oracle, "float64", 1e-12, 4) == [16] * cluster.ranks


@pytest.mark.soak
@pytest.mark.ranks(5, 8, launcher="torchrun")
@pytest.mark.time_limit(900)
def test_curvature_agrees_with_the_oracle_on_many_ranks(cluster):
    assert cluster.run(beside_the_oracle, "float32", 1e-5, 22) == [16] * cluster.ranks


def attached(schedule: str = "one-pass", bucket: float = 0.0004) -> Any:
    import torch
    from ddp_job import network, wrap

    import adacons_hvd.ddp
    from adacons_hvd import Curvature

    model = wrap(network(), bucket_cap_mb=bucket)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    adacons_hvd.ddp.attach(model, optimizer, Curvature(4), schedule=schedule)
    return model, optimizer


def step(model: Any, optimizer: Any, number: int) -> None:
    from ddp_job import loss_of

    optimizer.zero_grad()
    loss_of(model, number).backward()
    optimizer.step()


def resume(folder: str, schedule: str, gathered: bool, into_a_running_one: bool) -> None:
    """Half of the steps, then a checkpoint is loaded for the rest, beside a job that just goes on."""
    import harness
    import torch
    from ddp_job import assert_equal_bits

    import adacons_hvd.ddp

    path = Path(folder) / ("all.pt" if gathered else f"{harness.rank()}.pt")
    model, optimizer = attached(schedule)
    again, resumed = attached(schedule, 1.0 if gathered and not into_a_running_one else 0.0004)
    if into_a_running_one:
        for number in range(3):
            step(again, resumed, 90 + number)
    for number in range(12):
        if number == 6:
            if gathered:
                adacons_hvd.ddp.gather_history(model)
            if harness.rank() == 0 or not gathered:
                torch.save([model.state_dict(), optimizer.state_dict()], path)
            harness.gather(None)
            saved_model, saved_optimizer = torch.load(path, weights_only=True)
            again.load_state_dict(saved_model)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                resumed.load_state_dict(saved_optimizer)
        step(model, optimizer, number)
        if number >= 6:
            step(again, resumed, number)
    for mine, other in zip(model.parameters(), again.parameters(), strict=True):
        if into_a_running_one:  # whose buckets are those of the saved one
            assert torch.equal(mine, other)
        else:  # the first step's buckets are others, and their sums differ in the last digits
            assert torch.allclose(mine, other, rtol=1e-5, atol=1e-7)
    assert resumed.report.fallbacks == 0
    assert resumed.report.decision.memory["kept"][0, 0] == 12
    assert_equal_bits(list(again.parameters()))


def test_checkpoints_go_on(cluster, tmp_path):
    for schedule, gathered, running in itertools.product(SCHEDULES, [False, True], [False, True]):
        cluster.run(resume, str(tmp_path), schedule, gathered, running)


def oracle_continues(path: Path) -> Any:
    """Train some steps from the state that was saved, if any; each is held against an oracle of all steps so far."""
    import copy

    import harness
    import oracle
    import torch
    from ddp_job import array, assert_equal_bits, loss_of

    import adacons_hvd.ddp

    model, optimizer = attached()
    judge = oracle.Grouped([list(range(6))], oracle.CurvatureOracle, memory=4)
    if path.exists():
        saved_model, saved, judge.oracles[0].means = torch.load(path, weights_only=False)
        model.load_state_dict(saved_model)
        optimizer.load_state_dict(saved)
    parameters = list(model.parameters())
    for number in range(8):
        twin = copy.deepcopy(model.module)
        optimizer.zero_grad()
        loss_of(twin, number).backward()
        loss_of(model, number).backward()
        everyone = harness.gather([array(p.grad, p) for p in twin.parameters()])
        assert oracle.error([array(p.grad, p) for p in parameters], judge(everyone)) < 1e-5
        optimizer.step()
    adacons_hvd.ddp.gather_history(model)
    if harness.rank() == 0:
        torch.save([model.state_dict(), optimizer.state_dict(), judge.oracles[0].means], path)
    assert_equal_bits(parameters)
    return optimizer.state_dict()["adacons"]["workers"]


def test_another_number_of_workers_takes_up_a_gathered_history(cluster, tmp_path):
    for number in (3, 2, 3):
        assert cluster.with_ranks(number).run(oracle_continues, tmp_path / "state.pt") == [number] * number


def one_state_for_all() -> int:
    """All ranks load what one rank saved without gathering: the history begins afresh, and the ranks stay alike."""
    import torch.distributed as dist
    from ddp_job import assert_equal_bits

    model, optimizer = attached()
    for number in range(5):
        step(model, optimizer, number)
    state = [optimizer.state_dict()]
    dist.broadcast_object_list(state)
    model, optimizer = attached()
    optimizer.load_state_dict(state[0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(5, 9):
            step(model, optimizer, number)
    assert_equal_bits(list(model.parameters()))
    assert any("so the aggregator's history begins afresh" in str(w.message) for w in caught)
    return int(optimizer.report.decision.memory["kept"][0, 0])


def test_a_history_that_is_not_whole_begins_afresh(cluster):
    assert cluster.run(one_state_for_all) == [4] * 3


def foreign_in_the_middle(path: str) -> int:
    """One rank loads its part of a longer history while training goes on: all begin afresh, with nothing left over."""
    import copy

    import harness
    import oracle
    import torch
    from ddp_job import array, assert_equal_bits, loss_of

    model, optimizer = attached()
    for number in range(9):
        step(model, optimizer, number)
    if harness.rank() == 0:
        torch.save(optimizer.state_dict(), path)
    harness.gather(None)

    model, optimizer = attached()
    parameters = list(model.parameters())
    step(model, optimizer, 0)
    if harness.rank() == 0:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other elements are this rank's now than after the first step
            optimizer.load_state_dict(torch.load(path, weights_only=True))
    # Its memory is compared with this step's messages, and shared at the beginning of the next.
    step(model, optimizer, 1)
    judge = oracle.Grouped([list(range(6))], oracle.CurvatureOracle, memory=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(2, 7):
            twin = copy.deepcopy(model.module)
            optimizer.zero_grad()
            loss_of(twin, number).backward()
            loss_of(model, number).backward()
            everyone = harness.gather([array(p.grad, p) for p in twin.parameters()])
            assert oracle.error([array(p.grad, p) for p in parameters], judge(everyone)) < 1e-5
            optimizer.step()
    assert any("so the aggregator's history begins afresh" in str(w.message) for w in caught)
    assert_equal_bits(parameters)
    return int(optimizer.report.decision.memory["kept"][0, 0])


def test_nothing_is_left_of_a_history_that_begins_afresh_while_training_goes_on(cluster, tmp_path):
    assert cluster.run(foreign_in_the_middle, str(tmp_path / "state.pt")) == [5] * 3


def uneven() -> int:
    """One rank after the other runs out of data; what it keeps of the past stays in use."""
    import harness
    from ddp_job import assert_equal_bits

    model, optimizer = attached()
    with model.join():
        for number in range(6 + 2 * harness.rank()):
            step(model, optimizer, number)
    assert_equal_bits(list(model.parameters()))
    return int(optimizer.report.fallbacks)


def test_ranks_that_run_out_of_data_keep_their_part(cluster):
    assert cluster.run(uneven) == [0] * 3


def elements() -> None:
    import copy

    import harness
    import oracle
    import torch
    from ddp_job import array, assert_equal_bits, loss_of, network, wrap
    from element_wise import TrimmedMean

    import adacons_hvd.ddp

    for schedule in SCHEDULES:
        model = wrap(network())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        adacons_hvd.ddp.attach(model, optimizer, TrimmedMean(), schedule=schedule)
        parameters = list(model.parameters())
        for number in range(4):
            twin = copy.deepcopy(model.module)
            optimizer.zero_grad()
            loss_of(twin, number).backward()
            loss_of(model, number).backward()
            everyone = harness.gather([array(p.grad, p) for p in twin.parameters()])
            expected = [oracle.trimmed_mean([worker[i] for worker in everyone]) for i in range(len(parameters))]
            assert oracle.error([array(p.grad, p) for p in parameters], expected) < 1e-6
            optimizer.step()
        assert_equal_bits(parameters)


@pytest.mark.ranks(4, launcher="torchrun")
def test_an_aggregator_that_works_element_by_element(cluster):
    cluster.run(elements)
