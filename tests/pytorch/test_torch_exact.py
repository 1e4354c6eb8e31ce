"""Every schedule computes the method, to the last digits, and the same bits on every rank."""

from __future__ import annotations

import itertools

import pytest

ROWS = [(0.0, False), (0.99, False), (0.0, True), (0.99, True)]
SCHEDULES = ["two-pass", "one-pass", "gather"]
GRANULARITIES = ["model", "layer"]


def train(dtype_name: str, tolerance: float, every: int = 1) -> int:
    """Train for 10 steps by every schedule with every setting, or by every `every`-th; how many there were."""
    import torch
    from torch_job import Batches, compare, loss_of, network

    import adacons_hvd.torch as hvd
    from adacons_hvd import AdaCons

    hvd.init()
    dtype = getattr(torch, dtype_name)
    cases = enumerate(itertools.product(ROWS, ["unit", "average"], SCHEDULES, GRANULARITIES))
    chosen = list(cases)[::every]
    for seed, ((momentum, normalize), scale, schedule, granularity) in chosen:
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
            steps=10,
            settings=settings,
            groups=[[i] for i in everything] if granularity == "layer" else [everything],
            tolerance=tolerance,
        )
        assert optimizer.report.schedule == schedule
    return len(chosen)


# All of it is 48 cases, which takes minutes where many ranks share two processors over Gloo. A fifth of it still has
# every schedule with both granularities, every row and both scales; the rest is for the long run.
@pytest.mark.ranks(2, 3, 4, launcher="mpi", soak={"mpi": (2, 4)})
@pytest.mark.time_limit(480)
def test_every_combination_agrees_with_the_oracle(cluster):
    assert cluster.run(train, "float32", 1e-5) == [48] * cluster.ranks


@pytest.mark.ranks(2, 3, 4, launcher="gloo")
def test_a_fifth_agrees_with_the_oracle(cluster):
    assert cluster.run(train, "float32", 1e-5, 5) == [10] * cluster.ranks


@pytest.mark.ranks(2, 5, 8, launcher="mpi")
def test_a_fifth_agrees_with_the_oracle_under_mpi(cluster):
    assert cluster.run(train, "float32", 1e-5, 5) == [10] * cluster.ranks


@pytest.mark.ranks(2, 3, soak={"mpi": (2,), "gloo": (3,)})
def test_a_fifth_agrees_with_the_oracle_in_float64(cluster):
    assert cluster.run(train, "float64", 1e-12, 5) == [10] * cluster.ranks


@pytest.mark.soak
@pytest.mark.ranks(2, 3, 4, 5, 8)
@pytest.mark.time_limit(900)
def test_everything_agrees_with_the_oracle(cluster):
    assert cluster.run(train, "float32", 1e-5) == [48] * cluster.ranks
    assert cluster.run(train, "float64", 1e-12) == [48] * cluster.ranks


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
