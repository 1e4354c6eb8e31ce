"""Hosts as workers: what their ranks send to each other. For PyTorch's tensors.

Every host has equally many ranks. A bucket consists of as many *parts*, one for each rank of a host, and a part of as
many *shards* as there are hosts. All it takes is an alltoall of unequal pieces among all ranks, in which most pieces
are empty. So no further groups of ranks have to be made, which with Horovod would have to be known before
``hvd.init()``, would cost every step a round of messages each, and would be gone when an elastic job goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from ..ops.torch import combine
from . import Collectives, Direct, Pending, ready

__all__ = ["Hosts"]


class _Everyone(Collectives, Protocol):
    #: Whether operations are matched by the order in which they start, and not by name.
    in_order: bool

    def exchange(
        self, tensor: torch.Tensor, name: str, sent: Sequence[int], received: Sequence[int], *, out: torch.Tensor
    ) -> Pending:
        """As an alltoall, with as many elements to each rank and from each as the two lists say."""
        ...


class Hosts:
    """The hosts of some ranks as workers. Each rank knows a share of what its host knows, and sums are over all ranks.

    Args:
        everyone: the collectives of all ranks.
        hosts: the ranks of each host, equally many.
    """

    may_begin_with_sums = False

    def __init__(self, everyone: _Everyone, hosts: Sequence[Sequence[int]]) -> None:
        self._everyone = everyone
        self.kind = everyone.kind
        #: How many hosts there are, and which of them this rank's is.
        self.size = len(hosts)
        self.rank = next(number for number, ranks in enumerate(hosts) if everyone.rank in ranks)
        #: How many ranks a host has, and which of them this one is.
        self.per_host = len(hosts[0])
        self.place = list(hosts[self.rank]).index(everyone.rank)
        self._inside = hosts[self.rank]
        self._across = [ranks[self.place] for ranks in hosts]
        #: What is under way by the first of two operations, in the order of beginning.
        self._first_halves: list[_Chain] = []

    @property
    def direct(self) -> Direct | None:
        """The short way of all ranks, for what is summed over all of them."""
        return self._everyone.direct

    # --- what moves gradients -------------------------------------------------------------------

    def scatter(
        self, tensor: torch.Tensor, name: str, *, whole: torch.Tensor, part: torch.Tensor, out: torch.Tensor
    ) -> Pending:
        """Bring this rank its shard of every host's average.

        From the ranks of the same host come everyone's elements of this rank's part; their average is the host's, and
        the ranks with this place on all hosts exchange its shards. ``whole`` and ``part`` are memory to work in.
        """

        def across(rows: torch.Tensor) -> Pending:
            # In float32 at least, and in one pass, for which torch.mean takes thirty times as long.
            equally = part.new_full((self.per_host,), 1 / self.per_host, dtype=torch.float64)
            combine(equally, rows.view(self.per_host, -1), out=part)
            return self._exchange(part, f"{name}.across", self._across, out)

        started = self._started(_Chain(self._exchange(tensor, f"{name}.inside", self._inside, whole), across))
        # The network between hosts is to be in use while later buckets are filled. Where order matters, ranks cannot go
        # by what has arrived, because that differs between them.
        for earlier in self._first_halves[:-1]:
            if self._everyone.in_order or earlier.may_advance():
                earlier.advance()
        return started

    def gather(
        self, shard: torch.Tensor, name: str, *, whole: torch.Tensor, part: torch.Tensor, out: torch.Tensor
    ) -> Pending:
        """Make one tensor of everyone's shard: first the parts, of the shards of all hosts, and then all of it."""
        own = out.view(self.per_host, -1)[self.place]

        def inside(arrived: torch.Tensor) -> Pending:
            whole.view(self.per_host, -1).copy_(arrived)
            return self._exchange(whole, f"{name}.inside", self._inside, out)

        part.view(self.size, -1).copy_(shard)
        return self._started(_Chain(self._exchange(part, f"{name}.across", self._across, own), inside))

    def _started(self, chain: _Chain) -> Pending:
        self._first_halves = [earlier for earlier in self._first_halves if not earlier.advanced]
        self._first_halves.append(chain)

        def finish() -> torch.Tensor:
            # Those of all buckets, or the network would pause between two buckets.
            for each in self._first_halves:
                each.advance()
            self._first_halves.clear()
            return chain.wait()

        return ready(finish)

    def _exchange(self, tensor: torch.Tensor, name: str, ranks: Sequence[int], out: torch.Tensor) -> Pending:
        """An alltoall among some of the ranks."""
        counts = [0] * self._everyone.size
        for rank in ranks:
            counts[rank] = tensor.numel() // len(ranks)
        return self._everyone.exchange(tensor, name, counts, counts, out=out)

    # --- what else a step needs -----------------------------------------------------------------

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


class _Chain:
    """Two operations, of which the second sends on what the first has brought."""

    def __init__(self, first: Pending, then: Callable[[torch.Tensor], Pending]) -> None:
        self._first, self._then = first, then
        self._second: Pending | None = None

    @property
    def advanced(self) -> bool:
        """Whether the second has started."""
        return self._second is not None

    def may_advance(self) -> bool:
        """Whether :meth:`advance` would return at once."""
        return self.advanced or self._first.done()

    def advance(self) -> Pending:
        """Start the second as soon as the first is done."""
        if self._second is None:
            self._second = self._then(self._first.wait())
        return self._second

    def wait(self) -> torch.Tensor:
        result: torch.Tensor = self.advance().wait()
        return result
