"""``hosts``: ``one-pass`` between hosts, whose gradients are the averages over their ranks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

from ..collectives import Pending
from ..ops import Tensor
from .base import DenseBucket, Transfer, passes
from .one_pass import OnePass, OnePassTransfer

if TYPE_CHECKING:
    from ..collectives.hosts import Hosts
    from ..costs import Rates

__all__ = ["HostPass"]


class HostPass(OnePass):
    """The workers are hosts, and each rank of a host moves its part of the host's gradient. The traffic of one average.

    The ranks of a host average their gradients, of which each keeps one part. Between the ranks with the same part on
    all hosts follows ``one-pass``, and then the ranks of a host give each other their parts of the result. It is not
    among the schedules that a user names, because its result is another than theirs: ``workers="host"`` asks for it.
    """

    name = "hosts"

    def __init__(self, hosts: Hosts, predivide: float = 1.0, history: int = 0) -> None:
        # Sums are all of the collectives that is used, beside the two ways of moving gradients that are only theirs.
        super().__init__(cast(Any, hosts), predivide, history)
        self.hosts = hosts

    def transfer(self, bucket: DenseBucket) -> Transfer:
        return _HostTransfer(self)

    @property
    def multiple(self) -> int:
        return self.hosts.size * self.hosts.per_host

    def kept(self, length: int) -> tuple[int, int]:
        shard = length // self.multiple
        start = (self.hosts.place * self.hosts.size + self.hosts.rank) * shard
        return start, start + shard

    @classmethod
    def cost(cls, rates: Rates, size: float, bucket: float, gramian: bool = False, history: int = 0) -> float:
        workers, local = rates.workers, min(rates.per_host, rates.workers)
        hosts = workers // local
        # Through a host's card goes what an allreduce among as many workers as there are hosts would send.
        between = (1 - 1 / hosts) / (1 - 1 / workers) if workers > 1 else 0.0
        moved = rates.allreduce.sent(size, bucket, between)
        # What a rank brings from others of its host, and what it takes from them in the end, it reads from memory.
        moved += 2 * rates.look * size * (1 - 1 / local)
        # Each bucket is four alltoalls among all ranks, and libraries may send what is empty, too.
        started = max(1, math.ceil(size / bucket)) * (4 * rates.alltoall(0.0) - rates.allreduce(0.0))
        table = rates.allreduce(8.0 * hosts * ((hosts if gramian else 2) + history))
        arithmetic = rates.look * size + (rates.look + rates.combine) * size / local * passes(hosts, history)
        return moved + started + table + arithmetic


class _HostTransfer(OnePassTransfer):
    def __init__(self, schedule: HostPass) -> None:
        super().__init__(schedule)
        self.hosts = schedule.hosts

    def begin(self, bucket: DenseBucket) -> Pending:
        return self.hosts.scatter(
            bucket.buffer, f"{bucket.name}.shards", out=self._room(bucket, "shards"), **self._rooms(bucket)
        )

    def send(self, bucket: DenseBucket, combined: Tensor) -> Pending:
        return self.hosts.gather(combined, f"{bucket.name}.result", out=bucket.buffer, **self._rooms(bucket))

    def _rooms(self, bucket: DenseBucket) -> dict[str, Tensor]:
        return {"whole": self.scratch(bucket, "whole", bucket.length), "part": self._room(bucket, "part")}

    def _room(self, bucket: DenseBucket, purpose: str) -> Tensor:
        return self.scratch(bucket, purpose, bucket.length // self.hosts.per_host)
