"""Measure what ``schedule="auto"`` decides by: how long collectives and arithmetic take here.

A few messages of growing size, and one look at a matrix, once per cluster and process: a second or
two, ten on a slow network. Measured are the very collectives and operations that schedules are made
of, by all workers at once, so whatever the cluster is like, shared cards, shared memory or both, it
shows.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from .aggregators import AdaCons
from .collectives import Collectives, Pending
from .costs import Curve, Network, Rates
from .ops import Tensor, ops_for
from .schedules import SCHEDULES, DenseBucket, Segment, Step
from .schedules.base import Done

__all__ = ["assumed_rates", "measured_rates", "python_seconds", "slowest"]

#: Bytes of the messages: the first two, and more up to one as large as the gradient. What is larger
#: takes longer in proportion; the largest does not fit into a processor's cache beside what it
#: becomes, so that this holds.
_SIZES = (1 << 12, 1 << 18, 1 << 22, 1 << 25)
#: The largest is not tried after one that takes this many seconds.
_ENOUGH = 0.3
#: A message is sent this many times more after its first, because packets are lost and the first also
#: sets things up; but only once more if that took so many seconds.
_REPEATS = 3
_LONG = 1.0
#: Bytes that are read between two measurements of arithmetic and memory: a step finds little of what it reads in the
#: processor's cache, because backward has been there.
_FLUSHED = 1 << 22
#: A binding's own Python takes about as long as the step that it calls.
_BINDING = 2.0
#: What is assumed where nothing is measured: the seconds that Python takes for a step, and those of a message through
#: memory, with a processor for each worker.
_ASSUMED_STEP = 6e-4
_ASSUMED_MESSAGE = 5e-5
#: Bytes of the gradients that arithmetic is timed on, all workers' together, or as many as the
#: largest message has.
_LOOKED_AT = 1 << 23

# Rates are the same on all workers, and known for as long as the cluster stays as it is.
_known: dict[tuple[str, ...], Rates] = {}


def measured_rates(collectives: Collectives, hosts: Sequence[str], size: float, reference: Tensor, name: str) -> Rates:
    """The rates of this cluster, the same on every worker, measured unless all know them already.

    ``hosts`` names every worker's host; ``size`` is that of the gradient in bytes; ``reference`` is
    some tensor where gradients are; ``name`` is a prefix for the names of collectives.
    """
    sizes = _SIZES[: max(2, 1 + sum(smaller < size for smaller in _SIZES))]
    calibration = _Calibration(collectives, sizes, reference, name)
    direct = collectives.direct
    way = "" if direct is None else "by memory" if direct.in_memory else "by messages"
    place = (collectives.kind, way, str(reference.device), *hosts, str(len(sizes)))
    # In an elastic job a new worker may stand where another was, and know nothing.
    (unknown,) = slowest(collectives, [float(place not in _known)], reference, f"{name}.known")
    if unknown:
        _known[place] = calibration.rates(len(set(hosts)))
    return _known[place]


def assumed_rates(collectives: Collectives, per_host: int, reference: Tensor) -> Rates:
    """Rates for gradients so small that measuring would take longer than it could save, on a single host.

    They depend on nothing that differs from run to run, so neither does the choice.
    """
    rates = Rates.of(Network(), collectives.size, per_host)
    share = max(1.0, per_host / (os.cpu_count() or 1))
    if ops_for(reference).on_host(reference):
        rates = replace(rates, step=_ASSUMED_STEP * share)
    if collectives.direct is not None and collectives.direct.in_memory:
        message = _ASSUMED_MESSAGE * share
        line = Curve(((0.0, message), (1e15, message + 1e15 * rates.look)))
        rates = replace(rates, step=rates.step + 2 * message, direct=line, in_memory=True)
    return rates


class _Calibration:
    def __init__(self, collectives: Collectives, sizes: Sequence[int], reference: Tensor, name: str) -> None:
        self.collectives = collectives
        self.sizes = sizes
        self.elements = max(_LOOKED_AT, sizes[-1]) // 4
        self.reference = reference
        self.name = name
        self.ops = ops_for(reference)

    def rates(self, hosts: int) -> Rates:
        n = self.collectives.size
        where = f"{n} workers on {hosts} host{'s' if hosts > 1 else ''}, measured"
        seconds = [self._looking(), self._combining(), self._own(), self._step()]
        look, combine, own, step = slowest(self.collectives, seconds, self.reference, f"{self.name}.arithmetic")
        curve, direct = self._curve, self._direct()
        if direct is not None:
            step += 2 * direct(0.0)  # flags, and their confirmation
        return Rates(
            n,
            curve("allreduce"),
            curve("half"),
            curve("alltoall"),
            curve("allgather"),
            look,
            combine,
            own,
            where,
            n // hosts,
            step,
            direct,
            self.collectives.direct is not None and self.collectives.direct.in_memory,
        )

    # --- collectives ----------------------------------------------------------------------------

    def _curve(self, kind: str) -> Curve:
        """Seconds by bytes; of one worker's message, or of the whole result of an allgather."""
        ops, n = self.ops, self.collectives.size
        points: list[tuple[float, float]] = []
        for size in self.sizes:
            label = f"{kind}.{size}"
            half = kind == "half"
            arriving = size // (2 if half else 4) // n * n
            sent = arriving // n if kind == "allgather" else arriving
            message = ops.gradient(ops.zeros((sent,), self.reference), half=half)
            # Where schedules keep memory for what arrives: fresh memory takes longer than sending does.
            room = ops.room(message, arriving, half=half)
            operation = {
                "allreduce": self.collectives.allreduce,
                "half": self.collectives.allreduce,
                "alltoall": self.collectives.alltoall,
                "allgather": self.collectives.allgather,
            }[kind]
            once = _done(functools.partial(self._first, operation, label, room), message)
            seconds = self._slowest(_time(once, 1), f"{label}.seconds")
            again = _REPEATS if seconds < _LONG else 1
            seconds = min(seconds, self._slowest(_time(once, again), f"{label}.seconds"))
            points.append((float(size), seconds))
            if seconds > _ENOUGH and size == _SIZES[-2]:
                break
        return Curve(tuple(points))

    def _direct(self) -> Curve | None:
        """Seconds by bytes of one worker's message to all, the direct way."""
        direct, points = self.collectives.direct, []
        if direct is None:
            return None
        for size in self.sizes if direct.in_memory else self.sizes[:1]:
            name = f"{self.name}.direct.{size}"
            message = self.ops.gradient(self.ops.zeros((size // 4,), self.reference))
            if not direct.prepare(message, name):
                break
            once = _done(functools.partial(self._gathered, name), message)
            once()
            points.append((float(size), self._slowest(self._cold(once), f"direct.{size}.seconds")))
            direct.forget(name)
        return Curve(tuple(points)) if points else None

    def _gathered(self, name: str, message: Tensor) -> Tensor:
        assert self.collectives.direct is not None
        return self.collectives.direct.gather(message, name).wait()[:1]

    def _slowest(self, seconds: float, what: str) -> float:
        return slowest(self.collectives, [seconds], self.reference, f"{self.name}.{what}")[0]

    def _first(self, operation: Callable[..., Pending], label: str, room: Tensor | None, message: Tensor) -> Tensor:
        return operation(message, f"{self.name}.{label}", out=room).wait()[:1]

    # --- arithmetic -----------------------------------------------------------------------------

    def _step(self) -> float:
        """Seconds that Python takes for a step; nothing where it goes ahead of a device, or has only made a graph."""
        if not self.ops.on_host(self.reference):
            return 0.0
        return _BINDING * python_seconds(self.collectives.size, self.reference, between=self._flush)

    def _matrix(self) -> Tensor:
        n = self.collectives.size
        return self.ops.gradient(self.ops.zeros((n, self.elements // n), self.reference) + 1)

    def _looking(self) -> float:
        return self._cold(_done(self.ops.consensus, self._matrix())) / (4 * self.elements)

    def _combining(self) -> float:
        n, ops = self.collectives.size, self.ops
        weights = ops.like([1.0] * n, self.reference)
        return self._cold(_done(lambda rows: ops.combine(weights, rows)[:1], self._matrix())) / (4 * self.elements)

    def _own(self) -> float:
        ops = self.ops
        one = ops.like([1.0], self.reference)[0]

        mean = ops.gradient(ops.zeros((self.elements,), self.reference))

        def look_and_scale(flat: Tensor) -> Tensor:
            moments = ops.moments(flat, mean)
            return moments[:1] + ops.wide(ops.scale_segments(flat, [(0, self.elements, one)])[:1])

        return self._cold(_done(look_and_scale, ops.zeros_like(mean))) / (4 * self.elements)

    def _cold(self, once: Callable[[], object]) -> float:
        """The shortest of some, each after the processor's cache has seen other things."""
        return _time(once, between=self._flush)

    @functools.cached_property
    def _flush(self) -> Callable[[], object]:
        ops = self.ops
        other = ops.gradient(ops.zeros((_FLUSHED // 4,), self.reference))
        return _done(lambda x: ops.reshape(ops.square(x), (1,)), other)


def _nothing() -> None:
    pass


def slowest(collectives: Collectives, values: Sequence[float], reference: Tensor, name: str) -> list[float]:
    """The largest of every worker's values, for each of them: the slowest decides how long a step takes."""

    def gather(own: Tensor) -> Tensor:
        return collectives.allgather(own, name).wait()

    everyones = _done(gather, ops_for(reference).like(values, reference))()
    return [max(everyones[place :: len(values)]) for place in range(len(values))]


def python_seconds(workers: int, reference: Tensor, between: Callable[[], object] = _nothing) -> float:
    """Seconds that Python takes for a step of next to nothing on the host, without its messages."""
    ops = ops_for(reference)
    silent: Any = _Silent(workers)
    flat = ops.gradient(ops.zeros((workers,), reference) + 1)
    bucket = DenseBucket("silent", flat, [Segment(0, workers, 0)], SCHEDULES["gather"](silent))
    step = Step(silent, AdaCons(), 1, "silent")
    memory = step.run([bucket], {})[0].memory
    return _time(lambda: step.run([bucket], memory), between=between)


class _Silent:
    """Workers who all bring what this one brings, at once."""

    rank, kind, direct, may_begin_with_sums = 0, "silent", None, False

    def __init__(self, size: int) -> None:
        self.size = size

    def allgather(self, tensor: Tensor, name: str, *, out: Tensor | None = None) -> Pending:
        return Done(ops_for(tensor).concat([tensor] * self.size))


def _done(operation: Callable[[Tensor], Tensor], tensor: Tensor) -> Callable[[], list[float]]:
    """A function that does it, and has done it when it returns."""
    ops = ops_for(tensor)
    bound = ops.bound(operation, tensor)
    return lambda: ops.to_list(bound())


def _time(once: Callable[[], object], repeats: int = _REPEATS, between: Callable[[], object] = _nothing) -> float:
    """The shortest of some; something else is done before each."""
    best = float("inf")
    for _ in range(repeats):
        between()
        start = time.perf_counter()
        once()
        best = min(best, time.perf_counter() - start)
    return best
