"""The memory that an aggregator carries from step to step, and the form in which checkpoints hold it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ..ops import Tensor

__all__ = ["MEANS", "STATE_VERSION", "Memory", "pack_memory", "unpack_memory"]

#: The memory that an aggregator carries from step to step: named float64 tensors, empty at first.
Memory = dict[str, Tensor]

#: The layout of :func:`pack_memory`, raised when a change would misread older states.
STATE_VERSION = 1

#: Where a state holds mean gradients of earlier steps, where in the whole gradient each of their elements lies, and
#: what stands for the parameters. They are no part of the memory.
MEANS = ("means", "means_at", "means_of")


def pack_memory(memory: Memory, workers: int) -> dict[str, Any]:
    """A memory as a checkpoint holds it: a flat dict of numbers and tensors."""
    return {"version": STATE_VERSION, "workers": workers, **memory}


def unpack_memory(state: Mapping[str, Any]) -> tuple[Memory, int]:
    """Undo :func:`pack_memory`, refusing what a later version wrote or something else."""
    if "version" not in state or "workers" not in state:
        raise ValueError(
            f"this is not the state of an aggregator: it has {sorted(state)}, but neither 'version' nor 'workers'"
        )
    if int(state["version"]) > STATE_VERSION:
        raise ValueError(
            f"this aggregator state is of version {int(state['version'])}, written by a later "
            f"adacons_hvd; this one reads up to version {STATE_VERSION}. Upgrade adacons_hvd"
        )
    memory = {name: value for name, value in state.items() if name not in ("version", "workers", *MEANS)}
    for name, value in memory.items():
        if not all(map(math.isfinite, _flat(value))):
            raise ValueError(
                f"this aggregator state is damaged: {name!r} holds NaN or infinity, which none is saved with"
            )
    return memory, int(state["workers"])


def _flat(value: Any) -> Iterator[float]:
    """The numbers in a tensor or an array, of whatever library, or in lists of lists."""
    if isinstance(value, list):
        for item in value:
            yield from _flat(item)
    elif isinstance(value, (int, float)):
        yield value
    else:
        yield from _flat(value.tolist() if hasattr(value, "tolist") else value.numpy().tolist())
