"""Ranks that run out of data leave with hvd.join(), and the others go on among themselves."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.ranks(3, launcher=("mpi", "gloo")), pytest.mark.time_limit(120)]


def uneven(schedule, sparse):
    """Two epochs with 4, 6 and 5 batches; returns which schedule each step took."""
    import harness
    import torch
    from torch_job import array, assert_equal_bits

    import adacons_hvd.torch as hvd

    hvd.init()
    torch.manual_seed(0)
    table = torch.nn.Embedding(30, 4, sparse=sparse)
    head = torch.nn.Linear(4, 1)
    parameters = [table.weight, *head.parameters()]
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(parameters, lr=0.05), aggregator=hvd.AdaCons(), schedule=schedule
    )
    draw = torch.Generator().manual_seed(harness.rank())
    schedules, results = [], []
    for _ in range(2):
        for _ in range([4, 6, 5][harness.rank()]):
            optimizer.zero_grad()
            rows = torch.randint(0, 30, (16,), generator=draw)
            (head(table(rows)) - 3 - 0.3 * torch.randn(16, 1, generator=draw)).square().mean().backward()
            optimizer.step()
            results.append([array(p.grad, p) for p in parameters])
            schedules.append(optimizer.report.schedule)
        hvd.join()
        # A rank that left early has missed the last steps; as in plain Horovod, scripts make parameters equal
        # before the next epoch. What the aggregator remembers becomes equal by itself.
        for number, p in enumerate(parameters):
            hvd.broadcast_(p.data, root_rank=1, name=f"parameter.{number}")
    assert_equal_bits(parameters)
    assert optimizer.report.steps == 6 + [4, 6, 5][harness.rank()]
    first_epochs = [theirs[: [4, 6, 5][rank]] for rank, theirs in enumerate(harness.gather(results))]
    for step in range(6):
        here = [theirs[step] for theirs in first_epochs if step < len(theirs)]
        for other in here[1:]:
            assert all((a == b).all() for a, b in zip(here[0], other, strict=True))
    return schedules


@pytest.mark.parametrize("schedule", ["one-pass", "gather", "two-pass"])
@pytest.mark.parametrize("sparse", [False, True])
def test_joined_ranks_are_not_missed(cluster, schedule, sparse):
    first, second, third = cluster.run(uneven, schedule, sparse)
    assert first == [schedule] * 8
    assert second == ([schedule] * 4 + ["two-pass"] * 2) * 2
    assert third == ([schedule] * 4 + ["two-pass"]) * 2


def test_the_result_is_that_of_the_ranks_still_there(cluster):
    def case():
        import harness
        import oracle
        import torch
        from torch_job import array

        import adacons_hvd.torch as hvd

        hvd.init()
        weight = torch.nn.Parameter(torch.ones(40))
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD([weight], lr=0.01), aggregator=hvd.AdaCons(momentum=0), schedule="one-pass"
        )
        records = []
        draw = torch.Generator().manual_seed(harness.rank())
        for _ in range(3 if harness.rank() == 1 else 6):
            optimizer.zero_grad()
            (weight @ (1 + torch.randn(40, generator=draw))).backward()
            raw = array(weight.grad, weight)
            optimizer.synchronize()
            records.append((raw, array(weight.grad, weight)))
        shares = optimizer.report.weights[0], optimizer.report.present[0]
        hvd.join()
        everyone = harness.gather(records)
        for step in range(6):
            here = [records[step] for records in everyone if step < len(records)]
            expected = oracle.Oracle(momentum=0.0)([raw for raw, _ in here])
            for _, found in here:
                assert oracle.error([found], [expected]) < 1e-5
        return shares

    for rank, (weights, present) in enumerate(cluster.run(case)):
        assert present == ([True] * 3 if rank == 1 else [True, False, True])
        assert (weights[1] == 0) is (rank != 1)
