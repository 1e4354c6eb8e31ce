"""Collectives over ``horovod.torch``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from horovod.torch import mpi_ops as hvd

from . import Pending, ready
from .direct import Link

# Horovod has no function for these element types. Moving data needs none: the bytes travel as
# integers of the same width. Adding does, so a sum is made in float32.
_CARRIER = {torch.bfloat16: torch.int16}

# Seconds. Horovod's background thread wakes up once a millisecond: the shortest is a twentieth of
# that, and longer than that would keep others waiting for a rank that has what it needs.
_SHORTEST_SLEEP = 5e-5
_LONGEST_SLEEP = 1e-3


class HorovodTorch:
    """The workers of one Horovod process set."""

    may_begin_with_sums = True
    in_order = False
    #: Set by whoever knows that all workers are here and have it.
    direct: Link | None = None
    kind = "horovod.torch"

    def __init__(self, process_set: hvd.ProcessSet = hvd.global_process_set) -> None:
        self.process_set = process_set
        self.size: int = process_set.size()
        self.rank: int = process_set.rank()

    # The public functions allocate their result anew in every call, at the price of touching
    # fresh memory each step. The functions below them take the result as an argument. Horovod
    # 0.28.1 is its last release, so these will not change.

    def allreduce(
        self,
        tensor: torch.Tensor,
        name: str,
        *,
        prescale: float = 1.0,
        postscale: float = 1.0,
        out: torch.Tensor | None = None,
    ) -> Pending:
        result = torch.empty_like(tensor) if out is None else out
        carried = tensor.float() if tensor.dtype in _CARRIER else tensor
        into = carried if tensor.dtype in _CARRIER else result
        handle = hvd._allreduce_async(carried, into, name, hvd.Sum, prescale, postscale, self.process_set)

        def finish() -> torch.Tensor:
            # Horovod itself forgets which tensors these were if a script calls hvd.init() again.
            _wait(handle)
            return result if into is result else result.copy_(into)

        return ready(finish, lambda: hvd.poll(handle))

    def allgather(self, tensor: torch.Tensor, name: str, *, out: torch.Tensor | None = None) -> Pending:
        carrier = _CARRIER.get(tensor.dtype, tensor.dtype)
        result = tensor.new_empty(self.size * tensor.numel()) if out is None else out
        handle = hvd._allgather_async(tensor.view(carrier), result.view(carrier), name, self.process_set)
        return ready(lambda: _then(_wait(handle), result))

    def alltoall(self, tensor: torch.Tensor, name: str, *, out: torch.Tensor | None = None) -> Pending:
        carrier = _CARRIER.get(tensor.dtype, tensor.dtype)
        result = torch.empty_like(tensor) if out is None else out
        received = torch.empty(self.size, dtype=torch.int32)
        handle = hvd._alltoall_async(tensor.view(carrier), None, result.view(carrier), received, name, self.process_set)
        return ready(lambda: _then(_wait(handle), result))

    def exchange(
        self, tensor: torch.Tensor, name: str, sent: Sequence[int], received: Sequence[int], *, out: torch.Tensor
    ) -> Pending:
        """As an alltoall, with as many elements to each rank as ``sent`` says. What comes must fill ``out``."""
        carrier = _CARRIER.get(tensor.dtype, tensor.dtype)
        counts = torch.empty(self.size, dtype=torch.int32)
        splits = torch.tensor(sent, dtype=torch.int32)
        handle = hvd._alltoall_async(tensor.view(carrier), splits, out.view(carrier), counts, name, self.process_set)
        return ready(lambda: _then(_wait(handle), out), lambda: hvd.poll(handle))

    def allgather_rows(self, tensor: torch.Tensor, name: str) -> Pending:
        carrier = _CARRIER.get(tensor.dtype, tensor.dtype)
        handle = hvd.allgather_async(tensor.view(carrier), name, self.process_set)
        return ready(lambda: _wait(handle).view(tensor.dtype))

    def allgather_bytes(self, data: bytes, name: str) -> list[bytes]:
        lengths = torch.tensor([len(data)], dtype=torch.int64)
        sizes = self.allgather_rows(lengths, f"{name}.length").wait().tolist()
        payload = torch.tensor(list(data), dtype=torch.uint8)
        everything = self.allgather_rows(payload, f"{name}.bytes").wait()
        return [bytes(part.tolist()) for part in torch.split(everything, sizes)]


def _then(_: object, result: torch.Tensor) -> torch.Tensor:
    """The result, once the operation that fills it (through a view) is done."""
    return result


def _wait(handle: int) -> Any:
    """Wait for an operation, and return its result.

    Horovod's own waiting is asking again and again. Where there are more ranks than processors
    that takes the processor from the very threads which would finish the operation. Here a rank
    sleeps between looks for an eighth of the time it has waited, but a millisecond at most.
    """
    start = time.perf_counter()
    while not hvd.poll(handle):
        waited = time.perf_counter() - start
        time.sleep(min(max(waited / 8, _SHORTEST_SLEEP), _LONGEST_SLEEP))
    return hvd.synchronize(handle)
