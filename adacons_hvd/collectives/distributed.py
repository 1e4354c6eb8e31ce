"""Collectives over ``torch.distributed``: gloo, NCCL or any other backend.

Operations are matched by the order in which they start, which is the same on all ranks because
the schedules make it so; names are ignored. Every backend need only offer allreduce,
an allgather into one tensor, and ``all_to_all_single``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from . import Pending, ready

__all__ = ["TorchDistributed"]

# Renamed in PyTorch 2.13.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class TorchDistributed:
    """The workers of one process group.

    Args:
        group: the process group; by default that of all processes.
        device: where tensors must be for the group's backend; only :meth:`allgather_bytes`, which
            is given none, has to know.

    Start this with ``torchrun --nproc-per-node 2 script.py``:

    >>> dist.init_process_group("gloo")
    >>> workers = TorchDistributed()
    >>> workers.allreduce(torch.ones(3), "sum").wait()[0].item() == workers.size
    True
    """

    #: Called, and called again, every so many seconds while this rank waits for a message on the host. It may raise an
    #: error, where other ranks are known not to come.
    interrupt: Callable[[], None] | None = None
    seconds_between_interrupts = 1.0
    may_begin_with_sums = False
    in_order = True
    direct = None

    def __init__(self, group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu") -> None:
        self.group = group
        self.device = torch.device(device)
        self.size: int = dist.get_world_size(group)
        self.rank: int = dist.get_rank(group)
        self.kind = f"torch.distributed over {dist.get_backend(group)}"

    # wait() of an operation on an accelerator does not wait: it makes the current stream do so.

    def allreduce(
        self,
        tensor: torch.Tensor,
        name: str,
        *,
        prescale: float = 1.0,
        postscale: float = 1.0,
        out: torch.Tensor | None = None,
    ) -> Pending:
        # The library sums in place, so what must not change is copied, and scaled on the way.
        if out is None:
            out = tensor * prescale
        elif out is not tensor:
            torch.mul(tensor, prescale, out=out)
        elif prescale != 1:
            out.mul_(prescale)
        work = dist.all_reduce(out, group=self.group, async_op=True)

        def finish() -> torch.Tensor:
            self._wait(work, out)
            return out if postscale == 1 else out.mul_(postscale)

        return ready(finish)

    def allgather(self, tensor: torch.Tensor, name: str, *, out: torch.Tensor | None = None) -> Pending:
        out = tensor.new_empty(self.size * tensor.numel()) if out is None else out
        work = _all_gather(out, tensor, group=self.group, async_op=True)
        return self._result(work, out)

    def alltoall(self, tensor: torch.Tensor, name: str, *, out: torch.Tensor | None = None) -> Pending:
        out = torch.empty_like(tensor) if out is None else out
        work = dist.all_to_all_single(out, tensor, group=self.group, async_op=True)
        return self._result(work, out)

    def exchange(
        self, tensor: torch.Tensor, name: str, sent: Sequence[int], received: Sequence[int], *, out: torch.Tensor
    ) -> Pending:
        """As an alltoall, with as many elements to each rank and from each as the two lists say."""
        work = dist.all_to_all_single(out, tensor, [*received], [*sent], group=self.group, async_op=True)
        return self._result(work, out)

    def allgather_rows(self, tensor: torch.Tensor, name: str) -> Pending:
        height = torch.tensor([len(tensor)], dtype=torch.int64, device=tensor.device)
        under_way = self.allgather(height, name)

        def finish() -> torch.Tensor:
            heights = under_way.wait().tolist()
            row = tensor.shape[1:]
            # Not every backend gathers tensors of unequal length.
            padded = tensor.new_zeros((max(heights), *row))
            if not padded.numel():
                return tensor.new_empty((sum(heights), *row))
            padded[: len(tensor)] = tensor
            everyone = self.allgather(padded.view(-1), name).wait().view(self.size, *padded.shape)
            return torch.cat([rows[:own] for rows, own in zip(everyone, heights, strict=True)])

        return ready(finish)

    def allgather_bytes(self, data: bytes, name: str) -> list[bytes]:
        payload = torch.tensor(list(data), dtype=torch.uint8, device=self.device)
        lengths = self.allgather(torch.tensor([len(data)], device=self.device), name).wait().tolist()
        everything = self.allgather_rows(payload, name).wait().cpu()
        return [bytes(part.tolist()) for part in torch.split(everything, lengths)]

    def _result(self, work: dist.Work, out: torch.Tensor) -> Pending:
        def finish() -> torch.Tensor:
            self._wait(work, out)
            return out

        return ready(finish)

    def _wait(self, work: dist.Work, out: torch.Tensor) -> None:
        while self.interrupt is not None and out.device.type == "cpu":
            try:
                work.wait(timedelta(seconds=self.seconds_between_interrupts))
                return
            except RuntimeError:
                self.interrupt()
                if work.is_completed():
                    break  # so it has failed, or has arrived just now
        work.wait()
