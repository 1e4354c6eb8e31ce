"""Each method at its own best learning rate, and a file that remembers every run."""

from __future__ import annotations

import json
from collections.abc import Callable
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


class Record:
    """Finished runs by what they were, in a file that grows with each of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def get(self, key: str, run: Callable[[], Any]) -> Any:
        if key not in self.runs:
            self.runs[key] = run()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self.runs, indent=0), encoding="utf-8")
            partial.replace(self.path)
        return self.runs[key]

    def score(self, setting: Setting, rate: float, seed: int, final: bool) -> float:
        """The score of a run; one that diverged has the worst there is."""
        key = f"{setting}, rate {rate:g}, seed {seed}, {'test' if final else 'validation'}"
        found = self.get(key, lambda: train(setting, rate, seed, final))
        worst = float("-inf") if task(setting.task).best is max else float("inf")
        return found if isinstance(found, float) else worst


@dataclass(frozen=True)
class Result:
    """A method at its best rate."""

    setting: Setting
    rate: float
    #: One per reported seed.
    scores: list[float]


def first_guess(setting: Setting) -> int:
    """Where to look for the best rate first, as a power of two."""
    if setting.optimizer == "Adam":
        return -6
    return {"average": -2, "unit": -1, "sum": -2 - (setting.workers - 1).bit_length()}[
        CONTENDERS[setting.contender].length
    ]


def best_rate(record: Record, setting: Setting, choosing: tuple[int, ...] = CHOOSING) -> float:
    """Climb a grid of powers of two until both neighbours of a rate are worse than it."""
    best = task(setting.task).best

    def mean(power: int) -> float:
        return sum(record.score(setting, 2.0**power, seed, final=False) for seed in choosing) / len(choosing)

    start = at = first_guess(setting)
    while True:
        found = best((at, at - 1, at + 1), key=mean)
        if found == at:
            return 2.0**at
        at = int(found)
        if abs(at - start) > FARTHEST:
            raise ValueError(f"{setting}: still better at a rate of {2.0**at:g}; guess again")


def measure(
    record: Record,
    setting: Setting,
    choosing: tuple[int, ...] = CHOOSING,
    reported: tuple[int, ...] = REPORTED,
) -> Result:
    rate = best_rate(record, setting, choosing)
    return Result(setting, rate, [record.score(setting, rate, seed, final=True) for seed in reported])
