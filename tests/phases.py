"""The phases of a step, for tests in which something happens in one of them. Used in the processes of jobs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: How the names of a step's collectives end, with schedule="one-pass".
COLLECTIVES = {"shards": "first collective", "table": "scalars", "result": "last collective"}
PHASES = ["backward", *COLLECTIVES.values(), "optimizer step"]


def watch(reached: Callable[[str], None]) -> None:
    """Have `reached(phase)` called when this process has begun a collective of that phase; or is about to, directly."""
    from adacons_hvd.collectives.direct import Link
    from adacons_hvd.collectives.horovod_torch import HorovodTorch

    def watched(operation: Any) -> Any:
        def call(self: Any, tensor: Any, name: str, **options: Any) -> Any:
            pending = operation(self, tensor, name, **options)
            phase = COLLECTIVES.get(name.rpartition(".")[2])
            if phase:
                reached(phase)
            return pending

        return call

    for name in ("allreduce", "alltoall", "allgather"):
        setattr(HorovodTorch, name, watched(getattr(HorovodTorch, name)))

    Link.gather = watched(Link.gather)  # type: ignore[method-assign]
    whole_sum = Link.sum

    def call(self: Any, tensor: Any, name: str) -> Any:
        phase = COLLECTIVES.get(name.rpartition(".")[2])
        if phase:
            reached(phase)
        return whole_sum(self, tensor, name)

    Link.sum = call  # type: ignore[method-assign]
