"""The numbers of optimizers, which are part of the names of their collectives.

A name must be the same on every rank. So optimizers are numbered, on each process set, in the order of their first
step since Horovod was initialised. An elastic job initialises it anew whenever workers come or go; then optimizers
that have been in use and those of a worker that has just started are numbered together.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import horovod.torch as hvd
from horovod.torch.mpi_ops import ProcessSet

__all__ = ["generation", "init", "restart", "take_number"]

_generation = 0
_taken: Counter[int] = Counter()


def generation() -> int:
    """Changes when numbers, and all that ranks have agreed on, are void. Differs between ranks."""
    return _generation


def restart() -> None:
    """Number optimizers afresh."""
    global _generation
    _generation += 1
    _taken.clear()


def init(*args: Any, **kwargs: Any) -> None:
    """Horovod's ``init``, after which optimizers are numbered afresh."""
    again = hvd.is_initialized()
    hvd.init(*args, **kwargs)
    if not again:
        restart()


def take_number(process_set: ProcessSet) -> int:
    """The number of the optimizer whose first step on this process set it is."""
    number = _taken[process_set.process_set_id]
    _taken[process_set.process_set_id] += 1
    return number
