"""The collectives that schedules need of a communication library, and nothing more.

A :class:`Collectives` is a group of workers that can reduce, gather and exchange tensors. There is
one implementation per library and framework, each a single file here; the schedules are written
once, against this interface.

Every operation has a *name*. Horovod matches operations across ranks by it, so a name must be
equal on all ranks, unique among those in flight, and the same every step (each new name grows
Horovod's tables for good). Libraries that match by order instead may ignore it.
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ..ops import Tensor

__all__ = ["Collectives", "Direct", "Pending", "host_name", "ready"]


class Pending(Protocol):
    """An operation under way."""

    def wait(self) -> Tensor:
        """Finish it and return its result. May be called once."""
        ...

    def done(self) -> bool:
        """Whether ``wait`` would return at once; False if that cannot be told."""
        ...


class Direct(Protocol):
    """A way for messages on the host that takes a fraction of a collective's time."""

    #: Whether workers share the memory of messages: any size is worth it then, and what one worker has sent can be
    #: forgotten without the others.
    in_memory: bool

    def sum(self, tensor: Tensor, name: str) -> Tensor:
        """The sum of everyone's flat tensor."""
        ...

    def prepare(self, tensor: Tensor, name: str, buffers: int = 2) -> bool:
        """Whether tensors like this one can be gathered or summed; to be asked first, by all workers in the same order.

        One buffer is enough where all workers have read what they gathered before one of them gathers again.
        """
        ...

    def gather(self, tensor: Tensor, name: str, out: Tensor | None = None) -> Pending:
        """Everyone's flat tensor, concatenated in rank order; without ``out``, until this worker gathers anew."""
        ...

    def gather_rows(self, rows: Tensor, name: str, otherwise: Callable[[Tensor, str], Pending]) -> Pending:
        """Everyone's rows, concatenated in rank order; ``otherwise`` gathers them where this way cannot."""
        ...

    def forget(self, prefix: str) -> None:
        """Give back what gathering by names that begin so takes."""
        ...

    def own(self, name: str) -> Tensor:
        """Where what this worker gathers next by that name may be written, to save a copy."""
        ...


class Collectives(Protocol):
    """A group of workers. All of them call the same operations with the same names."""

    #: How many workers there are, and which one this is.
    size: int
    rank: int
    #: The library and transport that carry the messages, in words that tell one from another.
    kind: str
    #: Whether a bucket may begin before it is known that all workers are here, if it begins with a sum.
    may_begin_with_sums: bool

    @property
    def direct(self) -> Direct | None:
        """A shorter way for messages, while it is known that all workers are here; None where there is none."""
        ...

    # Where `out` is given, the result is put there if the library can. It may be `tensor` itself
    # in allreduce. Only what wait() returns is sure to be the result.

    def allreduce(
        self,
        tensor: Tensor,
        name: str,
        *,
        prescale: float = 1.0,
        postscale: float = 1.0,
        out: Tensor | None = None,
    ) -> Pending:
        """Sum over all workers, with a factor applied before and another after."""
        ...

    def allgather(self, tensor: Tensor, name: str, *, out: Tensor | None = None) -> Pending:
        """Concatenate flat tensors of equal length, in rank order."""
        ...

    def alltoall(self, tensor: Tensor, name: str, *, out: Tensor | None = None) -> Pending:
        """Cut a flat tensor into ``size`` equal parts, send part k to worker k, and concatenate
        the parts received, in rank order."""
        ...

    def allgather_rows(self, tensor: Tensor, name: str) -> Pending:
        """Concatenate along the first axis, which may differ in length between workers."""
        ...

    def allgather_bytes(self, data: bytes, name: str) -> list[bytes]:
        """Exchange short messages; returns every worker's, in rank order."""
        ...


class _Ready:
    def __init__(self, finish: Callable[[], Any], done: Callable[[], bool]) -> None:
        self._finish, self._done = finish, done

    def wait(self) -> Tensor:
        return self._finish()

    def done(self) -> bool:
        return self._done()


def ready(finish: Callable[[], Tensor], done: Callable[[], bool] = lambda: False) -> Pending:
    """A :class:`Pending` out of a function that finishes the operation."""
    return _Ready(finish, done)


def host_name() -> str:
    """A name that workers share exactly if they share a machine's memory.

    Two containers, or two network namespaces, can carry the same host name, and one machine's
    containers do not share shared memory, so the kernel's boot identity is not enough either; the
    name, the boot identity and the network namespace together tell them apart.
    """
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # not Linux: the host name alone must do
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(str(Path("/proc/self/ns/net").readlink()))
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]
