"""A rank that trains alone is noticed, and all ranks stop; what only looks like it is left in peace."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.ranks(3, launcher="torchrun"), pytest.mark.time_limit(120)]


class Job:
    """A model, its optimizer and its data on one rank."""

    def __init__(self, seed: int = 0, **attached: Any) -> None:
        import harness
        import torch.distributed as dist
        from ddp_job import network, start, wrap

        import adacons_hvd.ddp
        from adacons_hvd import AdaCons

        start()
        # A group of its own, because a message that others wait for in vain leaves it of no use.
        group = dist.new_group(timeout=timedelta(seconds=20))
        self.model = wrap(network(seed, torch.float64), process_group=group)
        self.optimizer: Any = torch.optim.SGD(self.model.parameters(), lr=0.02)
        self.odd = harness.rank() == 1
        adacons_hvd.ddp.attach(self.model, self.optimizer, AdaCons(), **attached)

    def backward(self, step: int, through: Any = None) -> None:
        from ddp_job import loss_of

        self.optimizer.zero_grad()
        loss_of(through or self.model, step).backward()

    def step(self, step: int) -> None:
        self.backward(step)
        self.optimizer.step()

    def values(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


# --- ways to train alone ------------------------------------------------------------------------


def through_the_module(job: Job, step: int) -> None:
    job.backward(step, job.model.module)
    job.optimizer.step()


def under_no_sync(job: Job, step: int) -> None:
    with job.model.no_sync():
        job.backward(step)
    job.optimizer.step()


def more_after_the_aggregation(job: Job, step: int) -> None:
    from ddp_job import loss_of

    job.backward(step)
    loss_of(job.model.module, step).backward()
    job.optimizer.step()


def in_a_closure(job: Job, step: int) -> None:
    def closure() -> None:
        job.backward(step, job.model.module)

    job.optimizer.step(closure)


def in_a_compiled_step(job: Job, step: int) -> None:
    compiled = torch.compile(lambda: job.optimizer.step(), backend="eager")
    job.step(step)
    compiled()  # along the same gradients once more: no harm
    job.backward(step, job.model.module)
    compiled()


STRAYS = (through_the_module, under_no_sync, more_after_the_aggregation, in_a_closure, in_a_compiled_step)


def stray_alone(how: Callable[[Job, int], None]) -> str:
    from adacons_hvd.engine.replicas import StrayStepError

    job = Job()
    for step in range(2):
        job.step(step)
    before, began = job.values(), time.monotonic()
    # From its third pass on, DDP of such a model sends nothing of its own, so all wait in what is ours.
    with pytest.raises(StrayStepError) as raised:
        how(job, 2) if job.odd else [job.step(step) for step in range(2, 5)]
    # In the other ways all ranks have taken a step together before.
    if how in (through_the_module, under_no_sync):
        assert all(torch.equal(p, q) for p, q in zip(job.model.parameters(), before, strict=True))
    assert time.monotonic() - began < 15
    return str(raised.value)


@pytest.mark.parametrize("how", STRAYS, ids=lambda how: how.__name__)
def test_a_step_along_the_gradients_of_one_rank_stops_all(cluster, how):
    for message in cluster.run(stray_alone, how):
        assert message.startswith(
            "rank 1 took a step along gradients that were never aggregated: the last backward() failed"
        )


def stray_together() -> str:
    from ddp_job import assert_equal_bits

    from adacons_hvd.engine.replicas import StrayStepError

    job = Job()
    before = job.values()
    with pytest.raises(StrayStepError) as raised:
        under_no_sync(job, 0)
    assert all(torch.equal(p, q) for p, q in zip(job.model.parameters(), before, strict=True))
    job.step(1)  # nobody waits for anybody, so training can go on
    assert_equal_bits(job.model.parameters())
    return str(raised.value)


def test_a_step_that_no_rank_has_aggregated(cluster):
    for message in cluster.run(stray_together):
        assert message.startswith("ranks 0-2 took a step along gradients that were never aggregated")


def after_an_error() -> list[str]:
    """Gradients that the aggregator has refused are not aggregated."""
    import harness
    from ddp_job import assert_equal_bits, loss_of, network, wrap

    import adacons_hvd.ddp
    from adacons_hvd import AdaCons
    from adacons_hvd.engine.replicas import StrayStepError

    model = wrap(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    adacons_hvd.ddp.attach(model, optimizer, AdaCons(nonfinite="raise"))
    loss = loss_of(model, 0) * (float("inf") if harness.rank() == 1 else 1)
    with pytest.raises(FloatingPointError) as refused:
        loss.backward()
    with pytest.raises(StrayStepError) as raised:
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()  # along nothing
    loss_of(model, 1).backward()
    optimizer.step()
    assert_equal_bits(model.parameters())
    return [str(refused.value), str(raised.value)]


def test_a_step_along_gradients_that_were_refused(cluster):
    for refused, raised in cluster.run(after_an_error):
        assert "rank 1" in refused
        assert raised.startswith("ranks 0-2 took a step")


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


def foreign_step(job: Job, step: int) -> None:
    """Of another optimizer, along this rank's own gradient."""
    other = torch.optim.SGD(job.model.module[2].parameters(), lr=0.01)
    job.backward(step, job.model.module)
    other.step()


def local_change(job: Job, step: int) -> None:
    with torch.no_grad():
        job.model.module[2].bias[0] += 1e-12
        job.model.module[2].weight.mul_(1 + 1e-12)


def plain_optimizer(job: Job, step: int) -> None:
    """In place of the attached one."""
    job.optimizer = torch.optim.Adam(job.model.parameters(), lr=0.01)


def loaded_state(job: Job, step: int) -> None:
    state = {k: v * (1 + k.startswith("2.")) for k, v in job.model.module.state_dict().items()}
    job.model.module.load_state_dict(state)


ONE_LAYER = "in 2 of 6 parameters: 2.weight, 2.bias. "
DRIFTS = {
    foreign_step: ONE_LAYER,
    local_change: ONE_LAYER,
    plain_optimizer: "in 6 of 6 parameters: 0.weight, 0.bias, 2.weight and 3 more. ",
    loaded_state: ONE_LAYER,
}


def drift(how: Callable[[Job, int], None], at: int, attached: dict[str, Any]) -> tuple[str, int]:
    """Train alone once, at the step given; returns the error and the step that had it."""
    from ddp_job import assert_equal_bits

    from adacons_hvd.engine.replicas import ReplicaError

    job, reached = Job(**attached), []

    def train() -> None:
        for step in range(12):
            reached.append(step)
            if job.odd and step == at:
                how(job, step)
            job.step(step)

    with pytest.raises(ReplicaError) as raised:
        train()
    # The model is fit for use, so who makes its replicas equal can go on.
    with torch.no_grad():
        for p in job.model.parameters():
            torch.distributed.broadcast(p, 0)
    job.optimizer = torch.optim.SGD(job.model.parameters(), lr=0.02)
    for step in range(12, 16):
        job.step(step)
    assert_equal_bits(job.model.parameters())
    return str(raised.value), reached[-1]


@pytest.mark.parametrize("how", DRIFTS, ids=lambda how: how.__name__)
def test_replicas_that_drift_apart_stop_all(cluster, how):
    # As it is unless one says otherwise: compared in the second step, and found in the third.
    for message, step in cluster.run(drift, how, 0, {}):
        assert step == 2
        assert f"before step 3 rank 1 held other values than ranks 0, 2 {DRIFTS[how]}" in message
    # Later, and every third step.
    for message, step in cluster.run(drift, how, 4, {"check_replicas": 3}):
        assert step == 7
        assert f"before step 8 rank 1 held other values than ranks 0, 2 {DRIFTS[how]}" in message


def unchecked() -> None:
    from ddp_job import assert_equal_bits

    off = Job(check_replicas=0)
    if off.odd:
        local_change(off, 0)
    for step in range(4):
        off.step(step)
    with pytest.raises(AssertionError, match="the ranks hold different parameters"):
        assert_equal_bits(off.model.parameters())

    import adacons_hvd.ddp
    from adacons_hvd import AdaCons
    from adacons_hvd.agreement import DisagreementError
    from adacons_hvd.engine.replicas import ReplicaError

    # One parameter is meant to differ, and may be trained alone; another is not.
    for both in (False, True):
        job = Job(check_replicas=0)
        job.model = type(job.model)(job.model.module)
        job.optimizer = torch.optim.SGD(job.model.parameters(), lr=0.02)
        bias = job.model.module[2].bias
        adacons_hvd.ddp.attach(job.model, job.optimizer, AdaCons(), may_differ=[bias], check_replicas=2)
        if job.odd:
            with torch.no_grad():
                bias.add_(1)
                job.model.module[2].weight.add_(both)
        with pytest.raises(ReplicaError, match=r"in 1 of 5 parameters: 2\.weight\.") if both else nullcontext():
            for step in range(6):
                job.step(step)
        if not both:
            job.optimizer.zero_grad()
            bias.sum().backward()
            job.optimizer.step()

    for settings, words in (({"check_replicas": 7}, "check_replicas: 100"), ({"may_differ": True}, "parameters")):
        odd = Job(check_replicas=0)
        model = type(odd.model)(odd.model.module)
        if "may_differ" in settings:
            settings = {"may_differ": [model.module[0].bias]}
        with pytest.raises(DisagreementError, match=words):
            adacons_hvd.ddp.attach(
                model, torch.optim.SGD(model.parameters(), lr=0.02), AdaCons(), **(settings if odd.odd else {})
            )


def test_the_comparison_can_be_left_out_or_be_of_some_parameters(cluster):
    cluster.run(unchecked)


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


# --- ranks that run out of data -----------------------------------------------------------------


def joined(changes: str) -> str:
    """Rank 1 runs out of data after three steps; then some rank changes a parameter."""
    import harness
    from ddp_job import assert_equal_bits

    from adacons_hvd.engine.replicas import ReplicaError

    job = Job(check_replicas=2)
    expected = changes == "rank 2"
    error = ""
    try:
        with job.model.join():
            for step in range(3 if job.odd else 10):
                job.step(step)
                if step == 4 and changes == f"rank {harness.rank()}":
                    with torch.no_grad():
                        job.model.module[0].weight.add_(1)
            if job.odd and changes == "rank 1":
                # Nobody minds: it gets the others' in the end.
                with torch.no_grad():
                    job.model.module[0].weight.add_(1)
    except ReplicaError as raised:
        error = str(raised)
    assert bool(error) == expected
    if not expected:
        assert_equal_bits(job.model.parameters())
    return error


@pytest.mark.parametrize("changes", ["rank 1", "rank 2", "no rank"])
def test_ranks_that_have_run_out_of_data_are_not_compared(cluster, changes):
    messages = cluster.run(joined, changes)
    assert len(set(messages)) == 1
    if changes == "rank 2":
        assert "rank 2 held other values than rank 0 in 1 of 6 parameters: 0.weight" in messages[0]


# --- what the aggregator remembers --------------------------------------------------------------


def memory_on_one_rank() -> tuple[list[str], list[int]]:
    """Rank 1 alone loads a state in the fourth step; returns warnings, and the steps remembered after each."""
    import harness
    from ddp_job import assert_equal_bits

    job = Job()
    for step in range(5):
        job.step(step)
    saved = job.optimizer.state_dict()

    job = Job(schedule="one-pass", check_replicas=2)
    steps = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(6):
            if job.odd and step == 3:
                job.optimizer.load_state_dict(saved)
            job.step(step)
            steps.append(job.optimizer.report.steps)
    curves = harness.gather(job.optimizer.state_dict()["adacons"]["curve"].tolist())
    assert all(curve == curves[0] for curve in curves)
    assert_equal_bits(job.model.parameters())
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
