"""Schedules whose statistics are nearly exact, and the choice between schedules."""

from __future__ import annotations

import pytest


def errors_of(
    schedule: str, size: float = 1.0, loss_scale: float = 0.0, granularity: str = "model", fallbacks: int = 0
) -> list[float]:
    """How far the results of some steps are from the oracle's. Momentum is off, so each step shows its own error."""
    import harness
    import oracle
    import torch
    from torch_job import array, assert_equal_bits

    import adacons_hvd.torch as hvd
    from adacons_hvd import AdaCons

    hvd.init()
    shared = torch.Generator().manual_seed(1)
    own = torch.Generator().manual_seed(2 + hvd.rank())
    parameters = [torch.nn.Parameter(torch.zeros(300, 1000)), torch.nn.Parameter(torch.zeros(50))]
    scaler = torch.amp.GradScaler("cpu", init_scale=loss_scale) if loss_scale else None
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(parameters, lr=1.0),
        aggregator=AdaCons(momentum=0.0, scale="average"),
        schedule=schedule,
        granularity=granularity,
        grad_scaler=scaler,
        bucket_bytes=1 << 19,
    )
    raw, found = [], []
    for step in range(4):
        if loss_scale and step == 0:
            scaler.scale(torch.ones(()))  # a scaler makes its scale when it is first used
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=own) * (1 + hvd.rank())
            parameter.grad = (torch.randn(parameter.shape, generator=shared) + noise) * size * (loss_scale or 1)
        raw.append([array(p.grad, p) for p in parameters])
        optimizer.step()
        found.append([array(p.grad, p) for p in parameters])
    assert optimizer.report.schedule == schedule
    assert optimizer.report.fallbacks == fallbacks
    assert_equal_bits(parameters)
    everyone = harness.gather(raw)
    groups = [[0], [1]] if granularity == "layer" else [[0, 1]]
    judge = oracle.Grouped(groups, momentum=0.0, scale="average")
    expected = [judge([worker[step] for worker in everyone]) for step in range(4)]
    return [oracle.error(f, e) for f, e in zip(found, expected, strict=True)]


@pytest.mark.ranks(2, 3, launcher=("mpi", "gloo"))
def test_gather_is_exact_for_many_elements_and_for_few(cluster):
    # Those are gathered, and sums of the others leave before it is known who is here.
    for granularity in ("model", "layer"):
        for errors in cluster.run(errors_of, "gather", granularity=granularity):
            assert max(errors) < 1e-6


@pytest.mark.ranks(2, 3, launcher=("mpi", "gloo"))
def test_half_precision_in_the_first_pass_costs_the_weights_little(cluster):
    for granularity in ("model", "layer"):
        for errors in cluster.run(errors_of, "half", granularity=granularity):
            # Less than half precision has digits, because the roundings of many elements cancel; more
            # than float32 leaves, or nothing was rounded.
            assert 1e-7 < max(errors) < 1e-4


@pytest.mark.ranks(2)
def test_half_precision_adapts_to_the_length_of_gradients(cluster):
    # In half precision as it is, elements of 1e-9 are zeros, and of 1e6 infinite. The first step knows no better,
    # and where the mean overflows it is an average.
    for size, loss_scale in ((1e-9, 0), (1e6, 0), (1e-6, 2.0**16), (1.0, 2.0**16)):
        for errors in cluster.run(errors_of, "half", size, loss_scale, fallbacks=int(size == 1e6)):
            assert max(errors[1:]) < 1e-4, (size, loss_scale, errors)


@pytest.mark.ranks(2, 3, launcher=("mpi", "gloo"))
def test_a_sketch_costs_the_weights_a_few_percent(cluster):
    for granularity in ("model", "layer"):
        for errors in cluster.run(errors_of, "sketch", granularity=granularity):
            assert 1e-5 < max(errors) < 0.03
            # Other signs in every step: errors are not the same again and again.
            assert len({round(error, 9) for error in errors}) == len(errors)


def choice(schedule: object, elements: int, hosts: int = 1) -> tuple[str, str]:
    """Return the choice of ranks that take themselves to be on so many hosts, and its reason."""
    from unittest import mock

    import torch

    import adacons_hvd.torch as hvd
    from adacons_hvd import AdaCons
    from adacons_hvd.torch import reducer

    hvd.init()
    parameter = torch.nn.Parameter(torch.zeros(elements))
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([parameter], lr=1.0), aggregator=AdaCons(), schedule=schedule)
    with mock.patch.object(reducer, "host_name", return_value=f"host {hvd.rank() % hosts}"):
        for _ in range(2):
            parameter.grad = torch.ones(elements)
            optimizer.step()
    return optimizer.report.schedule, optimizer.report.reason


@pytest.mark.ranks(3, launcher=("mpi", "gloo"))
def test_auto_measures_the_cluster_and_all_ranks_choose_alike(cluster):
    from adacons_hvd.schedules import SCHEDULES

    for schedule in ("auto", "fast"):
        choices = cluster.run(choice, schedule, 200_000)
        assert len(set(choices)) == 1
        name, reason = choices[0]
        assert reason.startswith(f"{schedule}: for 0.8 MB and 3 workers on 1 host, measured, {name} takes ")
        assert " by a trial (" in reason
        for other, cls in SCHEDULES.items():
            assert (other in reason) == (cls.exact or schedule == "fast"), reason


@pytest.mark.ranks(2)
def test_for_a_small_gradient_schedules_are_only_tried_out(cluster):
    for _ in range(2):
        (schedule, reason), second = cluster.run(choice, "auto", 1000)
        assert second == (schedule, reason)
        assert schedule == "gather"
        assert "measured" not in reason
        assert " by a trial (" in reason


@pytest.mark.ranks(2)
def test_between_hosts_even_a_small_gradient_is(cluster):
    choices = cluster.run(choice, "auto", 1000, 2)
    assert len(set(choices)) == 1
    assert choices[0][1].startswith("auto: for 0.004 MB and 2 workers on 2 hosts, measured, ")


@pytest.mark.ranks(2)
def test_auto_goes_by_the_figures_it_is_given(cluster):
    from adacons_hvd.costs import Network

    slow, quick = Network(latency=10.0), Network(latency=0.0, memory_bandwidth=1e9)
    assert cluster.run(choice, slow, 100_000)[0][0] == "gather"  # one round trip
    assert cluster.run(choice, quick, 100_000)[0][0] == "one-pass"  # the least to move
    rough = Network(latency=0.0, memory_bandwidth=1e9, approximate=True)
    assert cluster.run(choice, rough, 100_000)[0][0] in ("half", "sketch", "one-pass")


@pytest.mark.ranks(2)
def test_networks_that_differ_are_a_disagreement(cluster):
    def differing() -> str:
        import harness

        from adacons_hvd.agreement import DisagreementError
        from adacons_hvd.costs import Network

        try:
            choice(Network(bandwidth=1e9 + harness.rank()), 1000)
        except DisagreementError as error:
            return str(error)
        return "no error"

    for message in cluster.run(differing):
        assert "schedule: Network(bandwidth=1000000000.0" in message
        assert "on rank 1" in message
