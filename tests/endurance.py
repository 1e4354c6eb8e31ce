"""Many steps, and what a process has to show for them. Runs on the ranks."""

from __future__ import annotations

import os
import statistics
import threading
import time
from array import array
from pathlib import Path
from typing import Any


def run(steps: int, sparse: bool, warm_up: int = 50) -> dict[str, Any]:
    """Take that many steps, with a second optimizer for sparse gradients if asked for.

    Returns what there was after the warm-up, half-way and at the end.
    """
    import gc

    import torch

    import adacons_hvd.torch as hvd
    from adacons_hvd.collectives.horovod_torch import HorovodTorch

    hvd.init()
    torch.manual_seed(0)
    table = torch.nn.Embedding(20, 8, sparse=sparse)
    body = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    parts = [(body, {"schedule": "one-pass", "bucket_bytes": 256})]
    if sparse:
        parts.append((table, {"granularity": "layer"}))
    optimizers = [
        hvd.DistributedOptimizer(torch.optim.SGD(part.parameters(), lr=0.001), aggregator=hvd.AdaCons(), **options)
        for part, options in parts
    ]
    names: set[str] = set()
    original = {name: getattr(HorovodTorch, name) for name in ("allreduce", "alltoall", "allgather", "allgather_rows")}

    def noting(operation: Any) -> Any:
        def call(self: Any, tensor: Any, name: str, **options: Any) -> Any:
            names.add(name)
            return operation(self, tensor, name, **options)

        return call

    for name, operation in original.items():
        setattr(HorovodTorch, name, noting(operation))
    draw = torch.Generator().manual_seed(hvd.rank())
    # All of it now, so that writing times down is no growth.
    times = array("d", bytes(8 * (warm_up + steps)))
    seen: list[dict[str, int]] = []
    try:
        for step in range(warm_up + steps):
            if step in (warm_up, warm_up + steps // 2):
                gc.collect()
                seen.append(possessions(len(names)))
            start = time.perf_counter()
            for optimizer in optimizers:
                optimizer.zero_grad()
            x = table(torch.randint(0, 20, (8,), generator=draw))
            (body(x) - 3 - 0.1 * hvd.rank()).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
            times[step] = time.perf_counter() - start
    finally:
        for name, operation in original.items():
            setattr(HorovodTorch, name, operation)
    gc.collect()
    seen.append(possessions(len(names)))
    times = times[warm_up:]
    part = max(len(times) // 5, 1)
    return {
        "seen": seen,
        "first": statistics.median(times[:part]),
        "last": statistics.median(times[-part:]),
        "finite": all(bool(torch.isfinite(p).all()) for p in body.parameters()),
    }


def possessions(names: int) -> dict[str, int]:
    """What a process could have more and more of."""
    import gc

    import torch
    from horovod.torch import mpi_ops

    # Of the memory that is the process's own. What is read from libraries comes in pieces of megabytes, at any time.
    status = Path("/proc/self/status").read_text()
    (resident,) = (line.split()[1] for line in status.splitlines() if line.startswith("RssAnon"))
    return {
        "KiB": int(resident),
        "handles": len(mpi_ops._handle_map),
        "threads": threading.active_count() + len(os.listdir("/proc/self/task")),  # noqa: PTH208
        "files": len(os.listdir("/proc/self/fd")),  # noqa: PTH208
        "names": names,
        "tensors": sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()),
    }


def check(results: list[dict[str, Any]]) -> None:
    """Nothing may have grown since the warm-up, memory not since half-time."""
    for result in results:
        start, middle, end = result["seen"]
        for what in ("handles", "threads", "files", "names", "tensors"):
            assert end[what] == middle[what] == start[what], f"{what}: {result}"
        # Over 10,000 steps a hundred bytes per step; a tensor kept each step would be hundreds.
        assert end["KiB"] - middle["KiB"] < 1024, result
        assert result["finite"]
