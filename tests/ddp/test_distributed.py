"""Collectives over torch.distributed do what the interface says."""

from __future__ import annotations

import pytest
import torch

pytestmark = [pytest.mark.ranks(3, launcher="torchrun"), pytest.mark.time_limit(60)]


def operations() -> None:
    from ddp_job import start

    from adacons_hvd.collectives.distributed import TorchDistributed

    start()
    workers = TorchDistributed()
    size, rank = workers.size, workers.rank
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64):
        mine = torch.arange(2 * size).to(dtype) + rank
        kept = mine.clone()
        everyone = [torch.arange(2 * size).to(dtype) + r for r in range(size)]

        assert torch.equal(workers.allreduce(mine, "sum").wait(), sum(everyone, torch.zeros(2 * size).to(dtype)))
        room = torch.empty_like(mine)
        if dtype.is_floating_point:
            found = workers.allreduce(mine, "mean", prescale=0.5, postscale=2.0, out=room).wait()
            assert found is room
            assert torch.equal(room, sum(everyone, torch.zeros(2 * size).to(dtype)))

        gathered = mine.new_empty(2 * size * size)
        assert workers.allgather(mine, "all", out=gathered).wait() is gathered
        assert torch.equal(gathered, torch.cat(everyone))
        assert torch.equal(workers.allgather(mine, "all").wait(), gathered)

        assert workers.alltoall(mine, "swap", out=room).wait() is room
        assert torch.equal(room, torch.cat([e[2 * rank : 2 * rank + 2] for e in everyone]))
        assert torch.equal(workers.alltoall(mine, "swap").wait(), room)
        assert torch.equal(mine, kept)

        assert workers.allreduce(mine, "in place", out=mine).wait() is mine

    # Several under way at a time, finished in another order.
    first = workers.allreduce(torch.ones(2), "first")
    second = workers.allgather(torch.full((1,), float(rank)), "second")
    assert second.wait().tolist() == [0.0, 1.0, 2.0]
    assert first.wait().tolist() == [3.0, 3.0]


def test_operations(cluster):
    cluster.run(operations)


def rows() -> None:
    from ddp_job import start

    from adacons_hvd.collectives.distributed import TorchDistributed

    start()
    workers = TorchDistributed()
    rank = workers.rank
    # Heights 0, 2 and 4.
    mine = torch.full((2 * rank, 3), float(rank))
    assert torch.equal(
        workers.allgather_rows(mine, "rows").wait(),
        torch.cat([torch.full((2 * r, 3), float(r)) for r in range(3)]),
    )
    assert workers.allgather_rows(torch.empty(0, 3), "nothing").wait().shape == (0, 3)
    assert workers.allgather_rows(torch.empty(rank, 0), "flat").wait().shape == (3, 0)
    texts = workers.allgather_bytes(b"x" * (rank + 1), "texts")
    assert texts == [b"x", b"xx", b"xxx"]


def test_rows_of_unequal_number(cluster):
    cluster.run(rows)
