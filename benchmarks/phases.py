"""Where a step's time goes: what a rank computes, and what it waits for."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import horovod.torch as hvd

from adacons_hvd.collectives import horovod_torch
from adacons_hvd.collectives.direct import Link
from adacons_hvd.schedules import DenseBucket, Step
from adacons_hvd.torch.packing import DensePacking
from adacons_hvd.torch.reducer import Reducer

# What is timed, by the name of the phase. Waiting counts for the phase it happens in.
_WAITING = "waiting"
_PARTS: list[tuple[str, Any, str]] = [
    ("other Python", Reducer, "synchronize"),
    ("flags", Reducer, "_exchange"),
    ("copy in", DensePacking, "load"),
    ("send", DenseBucket, "begin"),
    ("inner products", DenseBucket, "shares"),
    ("table", Step, "_table"),
    ("weights", Step, "_decided"),
    ("apply", DenseBucket, "combine"),
    ("result", DenseBucket, "finish"),
    ("copy out", DensePacking, "deliver"),
    (_WAITING, horovod_torch, "_wait"),
    (_WAITING, Link, "wait_until"),
]


class _Clock:
    """Seconds by phase, without those of phases within."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._within: list[float] = [0.0]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if name == _WAITING:
            within = self._open[-1] if self._open else "others"
            name = within if within.startswith("wait for") else f"wait for {within}"
        self._open.append(name)
        self._within.append(0.0)
        start = time.perf_counter()
        try:
            yield
        finally:
            taken = time.perf_counter() - start
            self._open.pop()
            self.seconds[name] = self.seconds.get(name, 0.0) + taken - self._within.pop()
            self._within[-1] += taken

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return timed


def take_apart(step: Callable[[], object], turns: int) -> dict[str, float]:
    """The median seconds of each phase of a step, the mean of all ranks."""
    found = []
    for _ in range(turns):
        clock = _Clock()
        hvd.barrier()
        with ExitStack() as stack:
            for name, owner, attribute in _PARTS:
                timed = clock.around(name, getattr(owner, attribute))
                stack.enter_context(mock.patch.object(owner, attribute, timed))
            step()
        found.append(clock.seconds)
    # What went one way in a turn may have gone another in the next: flags, for instance.
    names = dict.fromkeys(name for seconds in found for name in seconds)
    mine = {name: statistics.median(seconds.get(name, 0.0) for seconds in found) for name in names}
    everyone = hvd.allgather_object(mine, name="benchmark.phases")
    names = dict.fromkeys(name for phases in everyone for name in phases)
    return {name: statistics.mean(phases.get(name, 0.0) for phases in everyone) for name in names}
