"""Every schedule computes the method, to the last digits, and the same bits on every rank."""

from __future__ import annotations

import itertools

import pytest

ROWS = [(0.0, False), (0.99, False), (0.0, True), (0.99, True)]
SCHEDULES = ["two-pass", "one-pass", "gather"]
GRANULARITIES = ["model", "layer"]


def train(dtype_name: str, tolerance: float, schedules: list[str], steps: int) -> int:
    import torch
    from torch_job import Batches, compare, loss_of, network

    import adacons_hvd.torch as hvd
    from adacons_hvd import AdaCons

    hvd.init()
    dtype = getattr(torch, dtype_name)
    cases = itertools.product(ROWS, ["unit", "average"], schedules, GRANULARITIES)
    count = 0
    for seed, ((momentum, normalize), scale, schedule, granularity) in enumerate(cases):
        model = network(seed, dtype)
        settings = {"momentum": momentum, "normalize": normalize, "scale": scale}
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.02),
            named_parameters=model.named_parameters(),
            aggregator=AdaCons(**settings),
            schedule=schedule,
            granularity=granularity,
            bucket_bytes=256,
        )
        batches = Batches(seed, dtype)
        parameters = list(model.parameters())
        everything = list(range(len(parameters)))
        compare(
            optimizer,
            parameters,
            lambda _: loss_of(model, batches).backward(),  # noqa: B023 - called before the next
            steps=steps,
            settings=settings,
            groups=[[i] for i in everything] if granularity == "layer" else [everything],
            tolerance=tolerance,
        )
        assert optimizer.report.schedule == schedule
        count += 1
    return count


# All of it is 48 cases of 20 steps. Where eight ranks share two processors that takes minutes over Gloo, so the larger
# numbers of ranks have the whole in the long run alone, but for one launcher and precision.
@pytest.mark.ranks(2, 3, 4, launcher=("mpi", "gloo"))
@pytest.mark.time_limit(240)
def test_float32_agrees_with_the_oracle(cluster):
    assert cluster.run(train, "float32", 1e-5, SCHEDULES, 20) == [48] * cluster.ranks


@pytest.mark.ranks(5, 8, launcher="mpi")
@pytest.mark.time_limit(240)
def test_float32_agrees_with_the_oracle_on_many_ranks(cluster):
    assert cluster.run(train, "float32", 1e-5, SCHEDULES, 20) == [48] * cluster.ranks


@pytest.mark.ranks(2, 3, launcher=("mpi", "gloo"))
@pytest.mark.time_limit(240)
def test_float64_agrees_with_the_oracle(cluster):
    assert cluster.run(train, "float64", 1e-12, SCHEDULES, 20) == [48] * cluster.ranks


@pytest.mark.soak
@pytest.mark.ranks(4, 5, 8, launcher=("mpi", "gloo"))
@pytest.mark.time_limit(900)
def test_everything_agrees_with_the_oracle_on_many_ranks(cluster):
    assert cluster.run(train, "float32", 1e-5, SCHEDULES, 20) == [48] * cluster.ranks
    assert cluster.run(train, "float64", 1e-12, SCHEDULES, 20) == [48] * cluster.ranks


@pytest.mark.ranks(1, 4)
def test_auto_agrees_with_the_oracle(cluster):
    def auto() -> list[str]:
        import torch
        from torch_job import Batches, compare, loss_of, network

        import adacons_hvd.torch as hvd
        from adacons_hvd import AdaCons

        hvd.init()
        model, batches = network(), Batches()
        optimizer = hvd.DistributedOptimizer(
            torch.optim.Adam(model.parameters()),
            named_parameters=model.named_parameters(),
            aggregator=AdaCons(),
        )
        compare(optimizer, list(model.parameters()), lambda _: loss_of(model, batches).backward())
        return [optimizer.report.schedule, optimizer.report.reason]

    results = cluster.run(auto)
    assert all(result == results[0] for result in results)
    assert results[0][1].startswith("auto: for ")
