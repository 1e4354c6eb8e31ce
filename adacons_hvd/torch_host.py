"""Numbers of PyTorch's on their way to the host, while their device goes on working."""

from __future__ import annotations

import torch

__all__ = ["OnItsWay"]


class OnItsWay:
    """A small tensor that is copied to the host; read it a step later, when it has long arrived."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if tensor.is_cuda:
            # Only a copy to pinned memory does not wait.
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            tensor = host.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        self._tensor = tensor

    def read(self) -> torch.Tensor:
        """The tensor on the host; waits for it if need be."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensor
