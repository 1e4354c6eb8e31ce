"""Replicas of shards (HSDP): each replica is one worker, and its ranks hold a shard of its gradient each.

Within a replica gradients are averaged, by a reduce-scatter as without an aggregator. Then replicas agree: an alltoall
among the ranks that hold the same shard gives each of them a part of it, from all replicas. FSDP goes on by summing the
shard over replicas; each leaves zeros where another has the result, so the sum brings every replica the whole shard,
with equal bits.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from ..collectives import Pending
from ..collectives.distributed import TorchDistributed

__all__ = ["Replicated"]

# Renamed in PyTorch 2.13.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Replicated(TorchDistributed):
    """The replicas as workers.

    What is large travels among the ranks that hold the same shard; the statistics, of which every rank of every replica
    has a share, are summed over all ranks.
    """

    def __init__(self, replicas: dist.ProcessGroup, everyone: TorchDistributed) -> None:
        super().__init__(replicas, everyone.device)
        self._everyone = everyone

    def allreduce(
        self,
        tensor: torch.Tensor,
        name: str,
        *,
        prescale: float = 1.0,
        postscale: float = 1.0,
        out: torch.Tensor | None = None,
    ) -> Pending:
        return self._everyone.allreduce(tensor, name, prescale=prescale, postscale=postscale, out=out)

    def mean(self, gradient: torch.Tensor, shard: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        """This rank's shard of its replica's mean gradient, with zeros up to a multiple of the number of replicas."""
        ranks = dist.get_world_size(group)
        # Half precision could overflow in the sum.
        narrow = shard.dtype == torch.float16
        if narrow:
            gradient.div_(ranks)
        _reduce_scatter(shard, gradient, group=group)
        whole = shard.new_zeros(-(-shard.numel() // self.size) * self.size)
        whole[: shard.numel()].copy_(shard if narrow else shard.div_(ranks))
        return whole

    def place(self, part: torch.Tensor, shard: torch.Tensor) -> None:
        """Fill a shard, of which this replica has computed one part; the others' are left zero."""
        start = self.rank * part.numel()
        shard.zero_()
        own = shard[start : start + part.numel()]
        own.copy_(part[: own.numel()])
