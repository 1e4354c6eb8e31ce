"""What a schedule costs on a given cluster, and which one ``schedule="auto"`` takes.

A collective is modelled as a number of latencies plus the bytes that the busiest network card has
to send, over its bandwidth. For N workers on hosts with L workers each, with b bytes of gradient
per worker, a card sends, in units of b (all for large N; the code has the exact terms):

* allreduce: 2. However many workers share the host, a ring crosses each card once per direction.
* alltoall: L. Each of the host's L workers sends nearly all it has elsewhere.
* allgather: 1 for the result, which crosses each card once; N for everything.

Then there is the arithmetic, which reads what has arrived from memory: about two gradients' worth
per worker, but N with ``gather``, where every worker does the work of all. The constants are those
of a modest machine; what matters is their ratio.
"""

from __future__ import annotations

from dataclasses import dataclass

from .schedules import SCHEDULES

__all__ = ["Topology", "choose", "predict"]


@dataclass(frozen=True)
class Topology:
    """The cluster as the cost model sees it."""

    workers: int
    #: The most workers on any one host.
    per_host: int = 1
    #: Seconds one collective takes at least. Horovod wakes up once a millisecond by default.
    latency: float = 1e-3
    #: Bytes a second through one host's card: 10 Gbit/s.
    bandwidth: float = 1.25e9
    #: Bytes a second that the workers of one host together move through its memory.
    memory_bandwidth: float = 4e9

    @property
    def one_host(self) -> bool:
        return self.per_host >= self.workers

    def __str__(self) -> str:
        hosts = -(-self.workers // self.per_host)
        return f"{self.workers} workers on {hosts} host{'s' if hosts > 1 else ''}"


def predict(schedule: str, topology: Topology, size: float) -> float:
    """Seconds one step's collectives take to move ``size`` bytes of gradient per worker.

    >>> slow = Topology(workers=8, per_host=1, bandwidth=1.25e8)
    >>> predict("two-pass", slow, 16e6) / predict("one-pass", slow, 16e6) > 1.9
    True
    """
    n, local = topology.workers, min(topology.per_host, topology.workers)
    # The share of what a worker sends to all others that leaves the host.
    outside = (n - local) / max(n - 1, 1)
    ring = (n - 1) / n
    allreduce, alltoall, result, everything = 2 * ring, local * ring * outside, ring, n - 1.0
    bandwidth = topology.bandwidth
    if topology.one_host:
        # Nothing leaves the host, and all its workers share the memory.
        bandwidth = topology.memory_bandwidth
        allreduce, alltoall, result, everything = (n * volume for volume in (2 * ring, ring, ring, n - 1.0))
    rounds, volume, read = {
        "two-pass": (3, 2 * allreduce, 2.0),
        "one-pass": (3, alltoall + result, 1.5),
        "gather": (1, everything, float(n)),
    }[schedule]
    moving = volume * size / bandwidth
    computing = local * read * size / topology.memory_bandwidth
    return rounds * topology.latency + moving + computing


def choose(topology: Topology, size: float, gramian: bool = False) -> tuple[str, str]:
    """The cheapest exact schedule, and the reason in words.

    >>> choose(Topology(workers=8, per_host=1), 100e6)[0]
    'one-pass'
    >>> choose(Topology(workers=64, per_host=8), 100e6)[0]
    'two-pass'
    >>> choose(Topology(workers=4, per_host=4), 40e3)[0]
    'gather'
    """
    names = [name for name, cls in SCHEDULES.items() if cls.gives_gramian or not gramian]
    costs = {name: predict(name, topology, size) for name in names}
    best = min(costs, key=lambda name: costs[name])
    others = ", ".join(f"{name} {costs[name] * 1e3:.3g} ms" for name in costs if name != best)
    reason = f"auto: for {size / 1e6:.3g} MB and {topology}, {best} should take {costs[best] * 1e3:.3g} ms ({others})"
    return best, reason
