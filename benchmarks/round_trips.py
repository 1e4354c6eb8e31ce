"""One rank: how long the sum of a few numbers takes by each way there is.

Horovod and PyTorch's Gloo are the ways of Horovod's and DDP's ranks; memory and MPI are the direct ways beside
Horovod, of which :mod:`adacons_hvd.collectives.direct` has both.
"""

from __future__ import annotations

from collections.abc import Callable

import horovod.torch as hvd
import torch
import torch.distributed as dist

from adacons_hvd.collectives import ready
from adacons_hvd.collectives.direct import Link
from benchmarks.ranks import arguments, hand_over, take_turns
from benchmarks.steps import over_gloo


def main() -> None:
    case, results = arguments()
    hvd.init()
    over_gloo(results.parent)
    size, rank = hvd.size(), hvd.rank()
    numbers = torch.ones(2 * size, dtype=torch.float64)
    everyone = [torch.zeros_like(numbers) for _ in range(size)]
    unwatched = ready(lambda: numbers)
    token = hvd.broadcast_object(results.parent.name)
    memory = Link.by_memory(token, size, rank, lambda kind: unwatched)
    mpi = Link.by_mpi(range(size), rank, 1, lambda kind: unwatched)
    ways: dict[str, Callable[[], object]] = {
        "Horovod's allreduce": lambda: hvd.allreduce_(numbers, name="benchmark.sum", op=hvd.Average),
        "Gloo's allreduce": lambda: dist.all_reduce(numbers, dist.ReduceOp.MAX),
        "Gloo's allgather": lambda: dist.all_gather(everyone, numbers),
        "MPI, directly": lambda: mpi.sum(numbers, "sum"),
        "shared memory": lambda: memory.sum(numbers, "sum"),
    }
    hand_over(hvd, results, take_turns(hvd, ways, case["turns"], case["seconds"]))


if __name__ == "__main__":
    main()
