"""What only looks as if a rank trained alone is left in peace, and ranks of a subgroup have their names.

That a rank that does train alone is noticed, `tests/conformance` holds against every binding.
"""

from __future__ import annotations

import warnings
from datetime import timedelta
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.ranks(3, launcher="torchrun"), pytest.mark.time_limit(120)]


def stray_in_a_subgroup() -> str:
    import harness
    import torch.distributed as dist
    from ddp_job import loss_of, network, start, wrap

    import adacons_hvd.ddp
    from adacons_hvd import AdaCons
    from adacons_hvd.engine.replicas import StrayStepError

    start()
    pair = dist.new_group([0, 2], timeout=timedelta(seconds=20))
    if harness.rank() == 1:
        return ""
    model = wrap(network(), process_group=pair)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    adacons_hvd.ddp.attach(model, optimizer, AdaCons(), schedule="gather")
    loss = loss_of(model.module if harness.rank() == 2 else model, 0)
    if harness.rank() == 2:
        loss.backward()
    with pytest.raises(StrayStepError) as raised:
        optimizer.step() if harness.rank() == 2 else loss.backward()
    return str(raised.value)


def test_ranks_of_a_subgroup_are_called_as_in_the_job(cluster):
    first, _, last = cluster.run(stray_in_a_subgroup)
    assert first == last
    assert first.startswith("rank 2 took a step")


# --- what is no stray step ----------------------------------------------------------------------


def legitimate() -> None:
    import harness
    from ddp_job import assert_equal_bits, batch, loss_of, network, wrap

    import adacons_hvd.ddp
    from adacons_hvd import AdaCons

    def attached(model: Any, optimizer: Any, **settings: Any) -> Any:
        adacons_hvd.ddp.attach(model, optimizer, AdaCons(scale="average"), check_replicas=1, **settings)
        return optimizer

    # Accumulation; a step without a backward pass; two along one gradient; gradients of one's own.
    model = wrap(network())
    optimizer = attached(model, torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9))
    optimizer.step()
    for step in range(3):
        optimizer.zero_grad()
        with model.no_sync():
            loss_of(model, 2 * step).backward()
        loss_of(model.module, step).backward()
        loss_of(model, 2 * step + 1).backward()
        optimizer.step()
        optimizer.step()
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert_equal_bits(model.parameters())

    # Gradients to look at on one rank, which the next zero_grad() throws away.
    for step in range(3):
        if harness.rank() == 1:
            loss_of(model.module, step).backward()
            optimizer.zero_grad()
            optimizer.step()
            loss_of(model.module, step).backward()
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        if harness.rank() != 1:  # without gradients there is nothing to step along
            optimizer.zero_grad()
            optimizer.step()
    assert_equal_bits(model.parameters())

    # More parameters than the model has, some of them trained alone; and fewer.
    model, alone = wrap(network()), torch.nn.Linear(6, 1)
    first, *rest = model.parameters()
    optimizer = attached(model, torch.optim.SGD([*rest, *alone.parameters()], lr=0.02))
    other = torch.optim.SGD([first], lr=0.02)
    for step in range(3):
        optimizer.zero_grad()
        other.zero_grad()
        (loss_of(model, step) + alone(batch(step)).square().sum()).backward()
        optimizer.step()
        other.step()
        optimizer.zero_grad()
        alone(batch(step)).square().sum().backward()
        first.square().sum().backward()  # not of this optimizer
        optimizer.step()
    assert_equal_bits(model.parameters())

    # A parameter that may differ, trained without the others.
    model = wrap(network())
    bias = model.module[2].bias
    optimizer = attached(model, torch.optim.SGD(model.parameters(), lr=0.02), may_differ=[bias])
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, 0).backward()
        optimizer.step()
        optimizer.zero_grad()
        bias.sum().backward()
        optimizer.step()
    assert_equal_bits(model.parameters())

    # Adversaries, the judge called without DDP where only the generator learns.
    torch.manual_seed(0)
    generator, judge = wrap(torch.nn.Linear(6, 5)), wrap(torch.nn.Linear(5, 1))
    teach, learn = (attached(m, torch.optim.Adam(m.parameters(), lr=0.01)) for m in (judge, generator))
    for step in range(4):
        x = batch(step)
        teach.zero_grad()
        (judge(generator(x).detach()).square().mean() + judge(x[:, :5]).mean()).backward()
        teach.step()
        learn.zero_grad()
        (judge.module(generator(x)) - 1).square().mean().backward()
        learn.step()
    assert_equal_bits([*generator.parameters(), *judge.parameters()])

    # A closure whose first pass is not synchronised, as sharpness-aware minimisation has it.
    model = wrap(network())
    optimizer = attached(model, torch.optim.SGD(model.parameters(), lr=0.02))
    for step in range(3):
        with model.no_sync():
            loss_of(model, step).backward()

        def closure(step: int = step) -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert_equal_bits(model.parameters())


def test_what_is_no_stray_step(cluster):
    cluster.run(legitimate)


# --- what the aggregator remembers --------------------------------------------------------------


def memory_on_one_rank() -> tuple[list[str], list[int]]:
    """Rank 1 alone loads a state in the fourth step; returns warnings, and the steps remembered after each."""
    import harness
    from ddp_job import assert_equal_bits, loss_of, network, wrap

    import adacons_hvd.ddp
    from adacons_hvd import AdaCons

    def job(**attached: Any) -> tuple[Any, Any]:
        model = wrap(network())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        adacons_hvd.ddp.attach(model, optimizer, AdaCons(), **attached)
        return model, optimizer

    def train(model: Any, optimizer: Any, step: int) -> None:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()

    model, optimizer = job()
    for step in range(5):
        train(model, optimizer, step)
    saved = optimizer.state_dict()

    model, optimizer = job(schedule="one-pass", check_replicas=2)
    steps = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(6):
            if harness.rank() == 1 and step == 3:
                optimizer.load_state_dict(saved)
            train(model, optimizer, step)
            steps.append(optimizer.report.steps)
    curves = harness.gather(optimizer.state_dict()["adacons"]["curve"].tolist())
    assert all(curve == curves[0] for curve in curves)
    assert_equal_bits(model.parameters())
    return [str(w.message) for w in caught if "remembers" in str(w.message)], steps


def test_a_state_loaded_later_on_one_rank_is_everybodys(cluster):
    """Compared in the fifth step, so found in the sixth."""
    results = cluster.run(memory_on_one_rank)
    assert [steps for _, steps in results] == [[1, 2, 3, 4, 5, 8], [1, 2, 3, 6, 7, 8], [1, 2, 3, 4, 5, 8]]
    for said, _ in results:
        assert len(said) == 1
        assert "([5, 7, 5] of them)" in said[0]


# --- decisions by the loss ----------------------------------------------------------------------


def line_search() -> None:
    import harness
    import torch.distributed as dist
    from ddp_job import assert_equal_bits, loss_of, network, wrap

    import adacons_hvd.ddp
    from adacons_hvd import AdaCons

    model = wrap(network(dtype=torch.float64))
    optimizer: Any = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5, line_search_fn="strong_wolfe")
    adacons_hvd.ddp.attach(model, optimizer, AdaCons(scale="average"), check_replicas=1)
    losses = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / dist.get_world_size())
        return mean / dist.get_world_size()

    for _ in range(3):
        optimizer.step(closure)
    assert all(theirs == losses for theirs in harness.gather(losses))
    assert losses[-1] < 0.8 * losses[0]
    assert_equal_bits(model.parameters())


def test_a_line_search_whose_closure_returns_the_mean_loss(cluster):
    cluster.run(line_search)
