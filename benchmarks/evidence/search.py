"""Each method at its own best learning rate, and a file that remembers every run."""

from __future__ import annotations

import itertools
import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .contenders import CONTENDERS
from .tasks import task
from .training import Setting, train

#: Rates are chosen with these seeds on validation data, and measured with others on test data.
CHOOSING = (100, 101)
REPORTED = (0, 1, 2, 3, 4)
#: How far the search for a rate may go from where it starts, in factors of two.
FARTHEST = 12


class UnfinishedError(LookupError):
    """A run that is not in a record which only reads, or for which there is no time left."""


class Record:
    """Finished runs by what they were, in a file that grows with each of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs = _load(path)

    def get(self, key: str, run: Callable[[], Any]) -> Any:
        if key not in self.runs:
            self._add(key, run())
        return self.runs[key]

    def _add(self, key: str, found: Any) -> None:
        self.runs[key] = found
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.runs, indent=0), encoding="utf-8")
        partial.replace(self.path)

    def train(self, setting: Setting, rate: float, seed: int, final: bool) -> float | None:
        return train(setting, rate, seed, final)

    def expect(self, setting: Setting, rates: Iterable[float], seeds: Iterable[int], final: bool) -> None:
        """Be told of runs that will be asked for next."""

    def score(self, setting: Setting, rate: float, seed: int, final: bool) -> float:
        """The score of a run; one that diverged has the worst there is."""
        found = self.get(_key(setting, rate, seed, final), lambda: self.train(setting, rate, seed, final))
        worst = float("-inf") if task(setting.task).best is max else float("inf")
        return found if isinstance(found, float) else worst


def _key(setting: Setting, rate: float, seed: int, final: bool) -> str:
    return f"{setting}, rate {rate:g}, seed {seed}, {'test' if final else 'validation'}"


class Shared(Record):
    """A record for several threads, whose runs are made by other processes, and none is begun after some time."""

    def __init__(self, path: Path, processes: Executor, device: str, seconds: float) -> None:
        super().__init__(path)
        self._processes = processes
        self._device = device
        self._end = time.monotonic() + seconds
        self._lock = threading.Lock()
        self._begun: dict[str, Future[float | None]] = {}

    def train(self, setting: Setting, rate: float, seed: int, final: bool) -> float | None:
        return self._begin(setting, rate, seed, final).result()

    def expect(self, setting: Setting, rates: Iterable[float], seeds: Iterable[int], final: bool) -> None:
        for rate, seed in itertools.product(rates, seeds):
            self._begin(setting, rate, seed, final)

    def _begin(self, setting: Setting, rate: float, seed: int, final: bool) -> Future[float | None]:
        key = _key(setting, rate, seed, final)
        with self._lock:
            if key not in self._begun:
                if key in self.runs:
                    self._begun[key] = Future()
                    self._begun[key].set_result(self.runs[key])
                elif time.monotonic() > self._end:
                    raise UnfinishedError(key)
                else:
                    device = self._device if setting.large else "cpu"
                    self._begun[key] = self._processes.submit(train, setting, rate, seed, final, device)
            return self._begun[key]

    def _add(self, key: str, found: Any) -> None:
        with self._lock:
            super()._add(key, found)


class Finished(Record):
    """The runs that several records hold; none is added."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.runs = {key: value for path in paths for key, value in _load(path).items()}

    def get(self, key: str, run: Callable[[], Any]) -> Any:
        if key not in self.runs:
            raise UnfinishedError(key)
        return self.runs[key]


def _load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


@dataclass(frozen=True)
class Result:
    """A method at its best rate."""

    setting: Setting
    rate: float
    #: One per reported seed.
    scores: list[float]


def first_guess(setting: Setting) -> int:
    """Where to look for the best rate first, as a power of two. A larger model wants a lower one."""
    larger = {"": 0, "100k": 1, "1M": 2, "10M": 3}[setting.task.partition(" ")[2]]
    if setting.optimizer != "SGD":
        return -6 - larger
    return {"average": -2, "unit": -1, "sum": -2 - (setting.workers - 1).bit_length()}[
        CONTENDERS[setting.contender].length
    ]


def best_rate(record: Record, setting: Setting, choosing: Sequence[int] = CHOOSING) -> float:
    """Climb a grid of powers of two until both neighbours of a rate are worse than it."""
    best = task(setting.task).best
    start = at = first_guess(setting)
    while True:
        record.expect(setting, (2.0**power for power in (at, at - 1, at + 1)), choosing, final=False)
        found = best((at, at - 1, at + 1), key=lambda power: validation(record, setting, 2.0**power, choosing))
        if found == at:
            return 2.0**at
        at = int(found)
        if abs(at - start) > FARTHEST:
            raise ValueError(f"{setting}: still better at a rate of {2.0**at:g}; guess again")


def validation(record: Record, setting: Setting, rate: float, choosing: Sequence[int]) -> float:
    return math.fsum(record.score(setting, rate, seed, final=False) for seed in choosing) / len(choosing)


def choose(record: Record, settings: Sequence[Setting], choosing: Sequence[int] = CHOOSING) -> tuple[Setting, float]:
    """The best of a method's settings, each at its own best rate."""
    rates = {setting: best_rate(record, setting, choosing) for setting in settings}
    best = task(settings[0].task).best
    scores = [validation(record, setting, rate, choosing) for setting, rate in rates.items()]
    return list(rates.items())[scores.index(best(scores))]


def measure(
    record: Record,
    settings: Sequence[Setting],
    choosing: Sequence[int] = CHOOSING,
    reported: Sequence[int] = REPORTED,
) -> Result:
    """The method's result; of a record that only reads, with the seeds that are finished."""
    setting, rate = choose(record, settings, choosing)
    scores: list[float] = []
    for seed in reported:
        try:
            scores.append(record.score(setting, rate, seed, final=True))
        except UnfinishedError:
            break
    return Result(setting, rate, scores)
