"""One rank of the proof: sums a tensor over the controller, and on the device, named on the command line.

A script, not a module of the package: it runs in processes that a launcher starts, beside whichever Horovod is under
proof. It needs nothing but the framework: PyTorch does without numpy, and so does this.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any


def main(framework: str, controller: str, device: str = "cpu") -> None:
    """Sums one tensor over all ranks and prints that it agrees, or fails."""
    hvd: Any = importlib.import_module(f"horovod.{framework}")
    like: Any = importlib.import_module(framework)
    hvd.init()
    enabled = {"mpi": hvd.mpi_enabled, "gloo": hvd.gloo_enabled}[controller]
    if not enabled():
        raise SystemExit(f"rank {hvd.rank()}: started, but not over {controller}")
    if device == "gpu":
        total = _sum_on_gpu(hvd, like, framework)
    else:
        total = hvd.allreduce(like.ones([1000]) * (hvd.rank() + 1), op=hvd.Sum, name="proof")
    reduced = total.tolist() if framework == "torch" else total.numpy().tolist()
    expected = hvd.size() * (hvd.size() + 1) / 2
    if set(reduced) != {expected}:
        raise SystemExit(f"rank {hvd.rank()} of {hvd.size()}: expected {expected}, got {reduced[:4]}")
    for library in sorted(_loaded("libnccl.so")):
        print(f"rank {hvd.rank()} loaded {library}", flush=True)
    print(f"rank {hvd.rank()} of {hvd.size()}: agreed", flush=True)
    hvd.shutdown()


def _sum_on_gpu(hvd: Any, like: Any, framework: str) -> Any:
    if framework == "torch":
        like.cuda.set_device(hvd.local_rank())
        return hvd.allreduce(like.ones(1000, device="cuda") * (hvd.rank() + 1), op=hvd.Sum, name="proof")
    gpus = like.config.list_physical_devices("GPU")
    like.config.set_visible_devices(gpus[hvd.local_rank()], "GPU")
    with like.device("/GPU:0"):
        return hvd.allreduce(like.ones([1000]) * (hvd.rank() + 1), op=hvd.Sum, name="proof")


def _loaded(name: str) -> set[str]:
    """The files of a library that this process has loaded."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split(maxsplit=5)[5] for line in lines if f"/{name}" in line}


if __name__ == "__main__":
    main(*sys.argv[1:])
