"""This module has the helpers for functions that run on a rank.

Imported by the ranks before every function, so it imports nothing heavy itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from types import ModuleType

Value = TypeVar("Value")


@dataclass(frozen=True)
class Place:
    """Where this process stands in its job."""

    rank: int
    size: int
    launcher: str
    exchange: Callable[[Any], list[Any]]


_place: Place | None = None


def enter(place: Place) -> None:
    """Say where this process stands; the worker does, once."""
    global _place
    _place = place


def _here() -> Place:
    if _place is None:
        raise RuntimeError("this only works inside a function that cluster.run() runs on a rank")
    return _place


def rank() -> int:
    """This process's rank, as the launcher numbers it."""
    return _here().rank


def size() -> int:
    """How many ranks the job has."""
    return _here().size


def launcher() -> str:
    """The name of the launcher that started this rank."""
    return _here().launcher


def gather(value: Value) -> list[Value]:
    """Every rank's value, in rank order, on every rank, without Horovod.

    All ranks must call it, equally often. This is how an oracle sees everyone's data through a channel that is not
    the one under test: mpi4py under "mpi", elsewhere the connection to the test process.
    """
    return _here().exchange(value)


def horovod_torch() -> ModuleType:
    """`horovod.torch`, initialised."""
    import horovod.torch as hvd

    hvd.init()
    return hvd


def horovod_tensorflow() -> ModuleType:
    """`horovod.tensorflow`, initialised."""
    import horovod.tensorflow as hvd

    hvd.init()
    return hvd


def horovod_keras() -> ModuleType:
    """`horovod.tensorflow.keras`, initialised."""
    import horovod.tensorflow.keras as hvd

    hvd.init()
    return hvd
