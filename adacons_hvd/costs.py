"""The cost of each schedule on a given cluster, by which ``schedule="auto"`` takes the cheapest.

The time of a step's collectives is put together from the *rates* of a cluster: how long one
collective of each kind takes, by the size of its message, and how fast what arrives is read. Rates
are measured by :mod:`adacons_hvd.calibration`, or computed by :meth:`Rates.of` from the figures of
a cluster that is not at hand. ``docs/schedules.md`` derives the formulas and compares what they
predict with what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from .aggregators import Aggregator
from .schedules import SCHEDULES, HostPass

__all__ = ["Choice", "Curve", "Network", "Rates", "choose", "predict"]


@dataclass(frozen=True)
class Network:
    """The figures of a cluster. Pass one as ``schedule=`` to choose by it instead of measuring.

    >>> Network(bandwidth=50e9, latency=20e-6).bandwidth  # a 400 Gbit/s card in every host
    50000000000.0
    """

    #: Bytes a second through one host's card, in each direction: 10 Gbit/s.
    bandwidth: float = 1.25e9
    #: Seconds one collective takes at least. Horovod wakes up once a millisecond by default.
    latency: float = 1e-3
    #: Seconds that each message between two workers costs its sender, beside its bytes.
    message: float = 2e-6
    #: Bytes a second that one worker reads from memory while all others of its host do.
    memory_bandwidth: float = 4e9
    #: Whether schedules whose statistics are not exact may be chosen, as by ``schedule="fast"``.
    approximate: bool = False


@dataclass(frozen=True)
class Curve:
    """Seconds by bytes, known at a few sizes; straight lines between them, in proportion beyond.

    >>> curve = Curve(((100, 1.0), (1000, 2.0)))
    >>> curve(10), curve(550), curve(2000)
    (1.0, 1.5, 4.0)
    """

    points: tuple[tuple[float, float], ...]

    def __call__(self, size: float) -> float:
        # More takes no less, whatever a noisy machine made of it.
        longest, known = 0.0, []
        for x, y in self.points:
            longest = max(longest, y)
            known.append((x, longest))
        if size <= known[0][0]:
            return known[0][1]
        for (x0, y0), (x1, y1) in pairwise(known):
            if size <= x1:
                return y0 + (size - x0) * (y1 - y0) / (x1 - x0)
        x, y = known[-1]
        return y * size / x

    def sent(self, size: float, bucket: float, factor: float = 1.0) -> float:
        """Seconds for ``size`` bytes of gradient in buckets of ``bucket`` bytes, of which ``factor`` times as many
        bytes are sent.

        >>> Curve(((100, 1.0), (1000, 2.0))).sent(2500, 1000)
        5.44...
        """
        if size <= bucket:
            return self(size * factor)
        whole, rest = divmod(size, bucket)
        return whole * self(bucket * factor) + (self(rest * factor) if rest else 0.0)


@dataclass(frozen=True)
class Rates:
    """How long things take on one cluster."""

    workers: int
    #: By the bytes of one worker's message.
    allreduce: Curve
    #: The same in half precision.
    half: Curve
    alltoall: Curve
    #: By the bytes of the result, all workers' parts together.
    allgather: Curve
    #: Seconds a byte: all workers look at or combine the rows of what arrived, or look at and scale
    #: their own gradient, at the same time.
    look: float
    combine: float
    own: float
    #: Where the figures are from.
    source: str
    #: How many workers share a host, where all hosts have as many.
    per_host: int = 1
    #: What a step takes whatever is sent: flags, weights, and Python around all of it.
    step: float = 0.0
    #: By the bytes of one worker's message to all, the direct way; None where there is none.
    direct: Curve | None = None
    #: Whether that way is memory that all workers share, so that messages of any size take it.
    in_memory: bool = False

    def table(self, width: int = 2) -> float:
        """Seconds that the small sum of statistics takes, so many numbers for each worker."""
        return (self.allreduce if self.direct is None else self.direct)(8.0 * width * self.workers)

    @classmethod
    def of(cls, network: Network, workers: int, per_host: int) -> Rates:
        """The rates of ``workers`` on hosts with ``per_host`` each, by the figures of the network.

        A card sends, in units of the message: for an allreduce 2, because a ring crosses each card
        once per direction and round, however many workers share it; for an alltoall L, because each
        of the host's L workers sends nearly all it has elsewhere; for an allgather 1. (All for
        large N; below are the exact terms.) On a single host everything goes through memory. An
        alltoall and an allgather are N - 1 messages per worker; an allreduce is taken to be as
        clever as a tree about small ones.
        """
        n, local = workers, min(per_host, workers)
        outside = (n - local) / max(n - 1, 1)
        ring = (n - 1) / n
        bandwidth = network.bandwidth
        allreduce, alltoall, allgather = 2 * ring, local * ring * outside, ring
        if local == n:
            bandwidth = network.memory_bandwidth
            allreduce, alltoall, allgather = 2 * ring, ring, ring

        def line(volume: float, messages: float) -> Curve:
            start = network.latency + messages * network.message
            return Curve(((0.0, start), (1e15, start + volume * 1e15 / bandwidth)))

        reduced = line(allreduce, 2 * math.log2(max(n, 1)))
        byte = 1 / network.memory_bandwidth
        hosts = -(-workers // per_host)
        source = f"{workers} workers on {hosts} host{'s' if hosts > 1 else ''}"
        exchanged, gathered = line(alltoall, n - 1), line(allgather, n - 1)
        return cls(n, reduced, reduced, exchanged, gathered, byte, byte, 2 * byte, source, local)


@dataclass(frozen=True)
class Choice:
    """A schedule, and how it came to be the one."""

    schedule: str
    #: In words.
    reason: str
    #: Seconds that a step of each schedule was expected to take; empty where nothing was compared.
    expected: Mapping[str, float] = field(default_factory=dict)
    #: The ranks of each host, where hosts are the workers.
    hosts: Sequence[Sequence[int]] = ()
    #: What schedules were compared for, with which the reason begins.
    compared_for: str = ""

    def after_trial(self, seconds: Mapping[str, float], may_change: bool = True) -> Choice:
        """The choice once schedules have been tried out: another one only if that took half the time.

        So that noise does not choose.

        >>> choice = Choice("gather", "", {"gather": 0.001, "one-pass": 0.002}, compared_for="auto: for 0.04 MB")
        >>> choice.after_trial({"gather": 0.003, "one-pass": 0.002}).schedule
        'gather'
        >>> choice.after_trial({"gather": 0.005, "one-pass": 0.002}).reason
        'auto: for 0.04 MB, one-pass takes 2 ms by a trial (gather 5 ms)'
        >>> choice.after_trial({"gather": 0.005, "one-pass": 0.002}, may_change=False).schedule
        'gather'
        """
        best = min(seconds, key=lambda name: seconds[name])
        changes = may_change and seconds[best] < seconds[self.schedule] / 2
        return _compared(self.compared_for, seconds, best if changes else self.schedule, "takes", " by a trial")


def predict(
    schedule: str, rates: Rates, size: float, bucket: float = float("inf"), *, gramian: bool = False, history: int = 0
) -> float:
    """Seconds one step takes, beside copies between gradients and buckets, for ``size`` bytes of float32 gradient per
    worker, sent in messages of ``bucket`` bytes, for an aggregator that needs the Gramian or a history of mean
    gradients. ``"hosts"`` is what ``workers="host"`` does, which is never chosen.

    >>> slow = Rates.of(Network(bandwidth=1.25e8), workers=8, per_host=1)
    >>> predict("two-pass", slow, 64e6) / predict("one-pass", slow, 64e6) > 1.9
    True
    >>> shared = Rates.of(Network(bandwidth=1.25e8), workers=64, per_host=8)
    >>> predict("hosts", shared, 64e6) < shared.allreduce(64e6) < choose(shared, 64e6).expected["two-pass"] / 2
    True
    >>> "hosts" in choose(shared, 64e6).expected
    False
    """

    kind = HostPass if schedule == HostPass.name else SCHEDULES[schedule]
    return rates.step + kind.cost(rates, size, bucket, gramian, history)


def choose(
    rates: Rates,
    size: float,
    bucket: float = float("inf"),
    *,
    aggregator: Aggregator | None = None,
    approximate: bool = False,
) -> Choice:
    """The cheapest schedule that can serve the aggregator; one of dots and squares, if none is given.

    >>> from adacons_hvd import Curvature
    >>> choose(Rates.of(Network(), workers=8, per_host=1), 100e6).schedule
    'one-pass'
    >>> choose(Rates.of(Network(), workers=64, per_host=8), 100e6).schedule
    'two-pass'
    >>> choose(Rates.of(Network(), workers=64, per_host=8), 100e6, approximate=True).schedule
    'sketch'
    >>> choose(Rates.of(Network(), workers=4, per_host=4), 40e3).schedule
    'gather'
    >>> choose(Rates.of(Network(), workers=64, per_host=8), 100e6, aggregator=Curvature(memory=8)).schedule
    'one-pass'
    """
    needs = bool(aggregator and aggregator.needs)
    gramian, history = (aggregator.needs_gramian, aggregator.history) if aggregator else (False, 0)
    names = [name for name, cls in SCHEDULES.items() if (cls.exact or approximate) and (cls.sees_all or not needs)]
    costs = {name: predict(name, rates, size, bucket, gramian=gramian, history=history) for name in names}
    best = min(costs, key=lambda name: costs[name])
    what = f"{'fast' if approximate else 'auto'}: for {size / 1e6:.3g} MB and {rates.source}"
    return _compared(what, costs, best, "should take")


def _compared(what: str, seconds: Mapping[str, float], chosen: str, takes: str, how: str = "") -> Choice:
    """The choice of one schedule among others, which says how long each takes."""
    others = ", ".join(f"{name} {seconds[name] * 1e3:.3g} ms" for name in seconds if name != chosen)
    reason = f"{what}, {chosen} {takes} {seconds[chosen] * 1e3:.3g} ms{how} ({others})"
    return Choice(chosen, reason, seconds, compared_for=what)
