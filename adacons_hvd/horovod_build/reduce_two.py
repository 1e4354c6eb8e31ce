"""One rank of the proof: reduces a tensor with the framework and over the controller named on the command line.

A script, not a module of the package: it runs in processes that a launcher starts, beside whichever Horovod is under
proof.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any


def main(framework: str, controller: str) -> None:
    """Sums one tensor over all ranks and prints that it agrees, or fails."""
    hvd: Any = importlib.import_module(f"horovod.{framework}")
    like: Any = importlib.import_module(framework)
    hvd.init()
    enabled = {"mpi": hvd.mpi_enabled, "gloo": hvd.gloo_enabled}[controller]
    if not enabled():
        raise SystemExit(f"rank {hvd.rank()}: started, but not over {controller}")
    reduced = hvd.allreduce(like.ones([1000]) * (hvd.rank() + 1), op=hvd.Sum, name="proof").numpy()
    expected = hvd.size() * (hvd.size() + 1) / 2
    if hvd.size() < 2 or set(reduced.tolist()) != {expected}:
        raise SystemExit(f"rank {hvd.rank()} of {hvd.size()}: expected {expected}, got {reduced[:4]}")
    print(f"rank {hvd.rank()} of {hvd.size()}: agreed", flush=True)
    hvd.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
