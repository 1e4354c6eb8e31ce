"""Messages through memory that all ranks of one host share.

A rank writes its message where all others see it, and then says so by a number beside it; others read it where it is.
Nothing is sent, so a message that was written can be forgotten at any time.
"""

from __future__ import annotations

import mmap
import os
import platform
import threading
import weakref
from pathlib import Path

import torch

__all__ = ["SharedChannel", "can_spare", "memory_device"]

_FOLDER = Path("/dev/shm")

# Bytes between two ranks' numbers, so that a processor that writes one does not take the others from its neighbours.
_LINE = 128

# Bytes that must be free for flags and statistics.
_ENOUGH = 16 << 20

# Processors of this kind show a rank's writes to others in the order in which they were made.
_ORDERLY = ("x86_64", "AMD64")

# Taking a lock finishes what was written past the processor's cache, which else need not be in order.
_fence = threading.Lock()


def memory_device() -> int:
    """A number that processes of one machine share exactly if they can share memory; -1 if this one cannot."""
    try:
        folder = os.statvfs(_FOLDER)
        enough = folder.f_bavail * folder.f_frsize >= _ENOUGH
        usable = enough and platform.machine() in _ORDERLY and os.access(_FOLDER, os.W_OK)
        return _FOLDER.stat().st_dev if usable else -1
    except OSError:
        return -1


def can_spare(size: int, like: torch.Tensor, buffers: int) -> bool:
    """Whether a channel for such messages leaves half of the folder to others, such as processes that load data.

    Where another rank has made it already, it counts twice.
    """
    folder = os.statvfs(_FOLDER)
    left = folder.f_bavail * folder.f_frsize - _length(size, like, buffers)
    return left >= folder.f_blocks * folder.f_frsize // 2


def _length(size: int, like: torch.Tensor, buffers: int) -> int:
    return size * _LINE + buffers * _buffer(size, like)


def _buffer(size: int, like: torch.Tensor) -> int:
    """The bytes of a buffer, with as many as it takes for the next one to begin where a line does.

    In what order numbers are added depends on where they lie, and in every step it must be the same.
    """
    return -(-size * like.numel() * like.element_size() // _LINE) * _LINE


class SharedChannel:
    """One message from every rank to every other, again and again; see :class:`.direct.Channel`.

    All ranks make it by the same ``token``. With two ``buffers``, messages take turns: a rank sends its second next
    message only when all have sent the next one, and so have read this. It raises :class:`OSError` if there is not
    enough memory.
    """

    def __init__(self, token: str, size: int, rank: int, like: torch.Tensor, buffers: int) -> None:
        path = _FOLDER / f"adacons-{token}"
        #: Removes the file, once: when all have opened it, when the channel is dropped, or at the process's end.
        self._remove = weakref.finalize(self, _removed, path, os.getpid())
        self._rank, self._buffers = rank, buffers
        head, length = size * _LINE, _length(size, like, buffers)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            # Whoever is first makes it so long; it holds zeros. Memory that is not there shows here, not when it is
            # written to.
            os.posix_fallocate(file, 0, length)
            memory = mmap.mmap(file, length)
        except OSError:
            self._remove()
            raise
        finally:
            os.close(file)
        #: How many messages each rank has sent.
        self._counts = memoryview(memory)[:head].cast("q")[:: _LINE // 8]
        whole = torch.frombuffer(memory, dtype=torch.uint8)[head:].view(buffers, _buffer(size, like))
        rows = whole[:, : size * like.numel() * like.element_size()].view(like.dtype)
        self._memory = rows.view(buffers, size, like.numel())
        self._sent = 0

    @property
    def rows(self) -> torch.Tensor:
        return self._memory[self._sent % self._buffers]

    @property
    def own(self) -> torch.Tensor:
        return self._memory[(self._sent + 1) % self._buffers, self._rank]

    def start(self) -> None:
        self._sent += 1
        with _fence:
            pass
        self._counts[self._rank] = self._sent

    def arrived(self) -> bool:
        if min(self._counts.tolist()) < self._sent:
            return False
        if self._sent:
            self._remove()  # all have opened it
        return True

    def drop(self) -> None:
        self._remove()


def _removed(path: Path, process: int) -> None:
    if os.getpid() == process:  # what a process has forked may end before others have opened the file
        path.unlink(missing_ok=True)
