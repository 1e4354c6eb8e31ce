"""Hosts as workers: which ranks are on one host, and whether hosts can be workers.

A machine's name is not enough: two launchers' hosts can be one machine, as with ``horovodrun -np 4 -H
localhost:2,127.0.0.1:2`` or two ``torchrun --nnodes 2``. So the launcher's word counts, too, which gives each process a
number among those of its host.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence

from ..agreement import by_ranks
from ..costs import Choice
from ..schedules import HostPass
from .session import Arrival

__all__ = ["choose_hosts", "names_of", "ranks_by_host"]


def ranks_by_host(arrivals: Sequence[Arrival]) -> tuple[tuple[int, ...], ...]:
    """The ranks of every host; hosts are in the order of their first ranks.

    >>> ranks_by_host([Arrival(0, "node", place=place) for place in [(0, 2), (1, 2), (0, 2), (1, 2)]])
    ((0, 1), (2, 3))
    >>> ranks_by_host([Arrival(0, name) for name in ("a", "b", "a")])
    ((0, 2), (1,))
    """
    seen: Counter[object] = Counter()
    hosts: dict[object, list[int]] = {}
    for rank, arrival in enumerate(arrivals):
        number, count = arrival.place
        # A number that comes again under the same name is on another host.
        before = seen[arrival.host, count, number] if count else 0
        seen[arrival.host, count, number] += 1
        hosts.setdefault((arrival.host, count, before), []).append(rank)
    return tuple(map(tuple, hosts.values()))


def names_of(hosts: Sequence[Sequence[int]]) -> list[str]:
    """What the error for a gradient that is not finite calls a host, of which no rank knows whose it was.

    >>> names_of([[0, 1], [2, 3]])
    ['0 or 1', '2 or 3']
    """
    return [" or ".join(map(str, ranks)) for ranks in hosts]


def choose_hosts(arrivals: Sequence[Arrival], ranks: Sequence[int]) -> Choice | None:
    """The choice for ``workers="host"``, or the same error on all ranks if their hosts cannot be workers.

    None where every rank has a host of its own: hosts and ranks are then the same workers, and any schedule will do.
    ``ranks`` are the ranks' numbers in messages.

    >>> choose_hosts([Arrival(0, "a"), Arrival(0, "a"), Arrival(0, "b")], [0, 1, 2])
    Traceback (most recent call last):
    ValueError: workers="host" needs equally many ranks on every host, but host 0 has ranks 0-1, host 1 has rank 2...
    """
    hosts = ranks_by_host(arrivals)
    places = ", ".join(f"host {i} has {by_ranks([ranks[r] for r in members])}" for i, members in enumerate(hosts))
    if len({len(members) for members in hosts}) > 1:
        raise ValueError(
            f'workers="host" needs equally many ranks on every host, but {places}: at equal weights each rank of a '
            "smaller host would count for more. Start as many on each, or leave workers out"
        )
    if any(list(peers) != sorted(peers) for peers in zip(*hosts, strict=True)):
        raise ValueError(
            f'workers="host" needs ranks that are dealt to all hosts in the same order, but {places}. Let the launcher '
            "fill one host after the other, or leave workers out"
        )
    if len(hosts) == len(arrivals) > 1:
        return None
    if len(hosts) == 1:
        warnings.warn(
            'workers="host", but all ranks are on one host: its average is the only gradient, with no other to weigh '
            "it against",
            stacklevel=2,
        )
    return Choice(HostPass.name, f'workers="host": {places}', hosts=hosts)
