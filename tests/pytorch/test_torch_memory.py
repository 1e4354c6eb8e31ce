"""Ranks of one host tell each other through memory that they share, if there is enough of it, and leave none behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

pytestmark = pytest.mark.ranks(2, 3, launcher=("mpi", "gloo"))


def results(schedule: str, length: int = 5_001, **options: Any) -> tuple[list[Any], bool]:
    """The gradients of some steps, and whether they went through memory."""
    import torch
    from torch_job import assert_equal_bits

    import adacons_hvd.torch as hvd
    from adacons_hvd import AdaCons

    hvd.init()
    own = torch.Generator().manual_seed(1 + hvd.rank())
    # The first is alone in its bucket, and used where it is if its length allows; the others are packed.
    parameters = [torch.nn.Parameter(torch.zeros(*shape)) for shape in ((6 * length,), (length,), (3, 7))]
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(parameters, lr=1.0),
        aggregator=AdaCons(momentum=0.9),
        schedule=schedule,
        groups=[[parameters[0]], parameters[1:]],
        **options,
    )
    found = []
    for step in range(5):
        values = [torch.randn(p.shape, generator=own) + 0.1 for p in parameters]
        optimizer.zero_grad()
        sum((p * v).sum() for p, v in zip(parameters, values, strict=True)).backward()
        if step == 3 and hvd.rank() == 1:
            parameters[1].grad.mul_(2)  # after it has left
        optimizer.step()
        found.append([p.grad.clone() for p in parameters])
        assert_equal_bits(parameters)
    reducer = optimizer._reducer
    link = reducer._collectives.direct
    direct = link is not None and link.in_memory and all(packing.bucket.direct for packing in reducer._packings)
    return found, direct


def with_and_without(schedule: str) -> None:
    """The results through memory are those that Horovod brings."""
    import torch

    from adacons_hvd.torch import reducer

    with mock.patch.object(reducer, "memory_device", return_value=-1):
        expected, direct = results(schedule)
    assert not direct
    found, direct = results(schedule)
    assert direct
    for mine, theirs in zip(found, expected, strict=True):
        for x, y in zip(mine, theirs, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("schedule", ["one-pass", "gather"])
def test_results_are_those_of_horovods_own_collectives(cluster, schedule):
    cluster.run(with_and_without, schedule)


def with_little_memory(schedule: str) -> bool:
    """One rank finds that there is too little memory for gradients and for statistics."""
    import harness

    from adacons_hvd.collectives import direct

    class Small(direct.SharedChannel):
        def __init__(self, token: str, size: int, rank: int, like: Any, buffers: int) -> None:
            if like.is_floating_point() and rank == 1:
                raise OSError("no space left")
            super().__init__(token, size, rank, like, buffers)

    expected, _ = results(schedule)
    with mock.patch.object(direct, "SharedChannel", Small):
        found, through_memory = results(schedule)
    assert all(harness.gather(not through_memory))
    import torch

    for mine, theirs in zip(found, expected, strict=True):
        for x, y in zip(mine, theirs, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-8)
    return through_memory


@pytest.mark.parametrize("schedule", ["one-pass", "gather"])
def test_all_ranks_do_without_where_one_has_too_little(cluster, schedule):
    cluster.run(with_little_memory, schedule)


def in_a_full_folder(schedule: str) -> list[str]:
    """Gradients would leave less than half of the folder."""
    import os

    from adacons_hvd.collectives import shared

    room = os.statvfs("/dev/shm")
    blocks = (1 << 30) // room.f_frsize
    full = os.statvfs_result((*room[:2], blocks, blocks // 2, blocks // 2, *room[5:]))
    with mock.patch.object(shared.os, "statvfs", return_value=full):
        left, direct = files_left(schedule, 100_002)
    assert not direct
    return left


def files_left(schedule: str, length: int) -> tuple[list[str], bool]:
    """What is left of a job's shared memory while the job goes on, and whether gradients went through it."""
    import secrets

    mine = f"test-{secrets.token_hex(8)}"
    from adacons_hvd.torch import reducer

    with mock.patch.object(reducer.secrets, "token_hex", return_value=mine):
        _, direct = results(schedule, length)
    return [path.name for path in Path("/dev/shm").glob(f"adacons-{mine}-*")], direct


@pytest.mark.parametrize("schedule", ["one-pass", "gather"])
def test_half_of_the_folder_is_left_to_others_and_no_file(cluster, schedule):
    for left in cluster.run(in_a_full_folder, schedule):
        assert left == []


@pytest.mark.parametrize("schedule", ["one-pass", "gather"])
def test_no_file_is_left(cluster, schedule):
    for left, direct in cluster.run(files_left, schedule, 5_001):
        assert direct
        assert left == []


def sparse_results() -> tuple[list[Any], list[int]]:
    """The gradients of an embedding whose numbers of rows differ between steps and ranks, and in which steps Horovod
    gathered rows."""
    import torch
    from torch_job import assert_equal_bits

    import adacons_hvd.torch as hvd
    from adacons_hvd import AdaCons
    from adacons_hvd.collectives.horovod_torch import HorovodTorch

    hvd.init()
    own = torch.Generator().manual_seed(1 + hvd.rank())
    torch.manual_seed(0)
    table = torch.nn.Embedding(4096, 6, sparse=True)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(table.parameters(), lr=1.0), aggregator=AdaCons())
    gather, found, gathered = HorovodTorch.allgather_rows, [], []

    def watched(self: Any, rows: torch.Tensor, name: str) -> Any:
        if rows.ndim == 2:
            gathered.append(len(found))
        return gather(self, rows, name)

    with mock.patch.object(HorovodTorch, "allgather_rows", watched):
        # The third is too much for one rank, by what there was before, and in the last one a rank has none.
        for count in (8, 12, 8 if hvd.rank() else 2000, 1500, 1500 if hvd.rank() else 0):
            optimizer.zero_grad()
            rows = torch.randint(4096, (count,), generator=own)
            (table(rows) * torch.randn(count, 6, generator=own)).sum().backward()
            optimizer.step()
            found.append(table.weight.grad.to_dense())
    assert_equal_bits([table.weight])
    return found, gathered


def sparse_with_and_without() -> tuple[list[int], list[int]]:
    from adacons_hvd.torch import reducer

    with mock.patch.object(reducer, "memory_device", return_value=-1):
        expected, always = sparse_results()
    found, sometimes = sparse_results()
    assert all(mine.equal(theirs) for mine, theirs in zip(found, expected, strict=True))
    return always, sometimes


def test_rows_go_through_memory_where_there_is_room(cluster):
    for always, sometimes in cluster.run(sparse_with_and_without):
        assert always == [0, 1, 2, 3, 4]
        assert sometimes == [0, 2]


def places_of_messages() -> set[int]:
    """Where the rows of a channel's messages begin, as far as arithmetic can tell."""
    import secrets

    import torch

    from adacons_hvd.collectives.shared import SharedChannel

    channel = SharedChannel(f"test-{secrets.token_hex(8)}", 1, 0, torch.zeros(5), buffers=2)
    places = set()
    for _ in range(4):
        places.add(channel.own.data_ptr() % 128)
        channel.start()
        places.add(channel.rows.data_ptr() % 128)
    channel.drop()
    return places


def test_every_step_computes_in_the_same_order(cluster):
    """Sums of numbers that lie elsewhere, seen from where a processor's wide registers begin, may end in other bits."""
    for places in cluster.run(places_of_messages):
        assert len(places) == 1
