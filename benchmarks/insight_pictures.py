"""Draws the pictures of ``docs/noise-scale.md``, ``adascale.md`` and ``sick-workers.md``.

``python -m benchmarks.insight_pictures`` trains eight simulated workers as :mod:`.sick_workers` does, once healthy and
once with wrong labels on the last one from step 300 on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

import torch

from adacons_hvd import Mean
from adacons_hvd.aggregators import Memory
from adacons_hvd.costs import Choice
from adacons_hvd.insight import SickWorkers
from adacons_hvd.report import Report

from .charts import _line, _picture, _text
from .sick_workers import Training

DOCS = Path(__file__).parent.parent / "docs"
WORKERS, BEGIN, STEPS = 8, 300, 600
#: A point of a picture is the mean of so many steps.
EVERY = 10
_LEFT, _PANEL, _GAP, _TOP, _HEIGHT = 50, 345, 57, 62, 180
"""The width of the left margin, of a panel, and so on, in pixels."""

#: A line, by step.
Line = list[tuple[float, float]]


def reports(fault: str) -> list[Report]:
    """The report of every step of a run."""
    training = Training(WORKERS, 0)
    aggregator = SickWorkers(Mean(), callback=lambda worker: None)
    memory: Memory = {}
    found = []
    for step in range(STEPS):
        if step == BEGIN and fault:
            training.resume(training.state(), fault)
        statistics = training.step()
        decision = aggregator.decide(statistics, memory)
        memory = decision.memory
        found.append(Report(decision, statistics, Choice("one-pass", "simulated")))
    return found


def line(found: Sequence[Report], number: Callable[[Report], float], first: int = 0) -> Line:
    """Means of a number of the reports."""
    starts = range(first, STEPS, EVERY)
    return [(start + EVERY / 2, fmean(map(number, found[start : start + EVERY]))) for start in starts]


def ticks(low: float, high: float) -> list[float]:
    """Round numbers, a few of which lie between low and high; the first and the last may be outside."""
    rough = (high - low) / 4
    power = 10 ** math.floor(math.log10(rough))
    step = min(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [step * n for n in range(math.floor(low / step), math.ceil(high / step) + 1)]


def picture(title: str, runs: Sequence[tuple[str, list[Line]]]) -> str:
    """Two panels with one scale; in each a line for every series, the last of several in red."""
    values = [value for _, lines in runs for points in lines for _, value in points]
    heights = ticks(min(0.0, *values), max(values))
    low, high = heights[0], heights[-1]
    shapes = []
    for panel, (name, lines) in enumerate(runs):
        left = _LEFT + panel * (_PANEL + _GAP)

        def x(step: float, left: float = left) -> float:
            return left + _PANEL * step / STEPS

        def y(value: float) -> float:
            return _TOP + _HEIGHT * (high - value) / (high - low)

        shapes.append(_text(left + _PANEL / 2, _TOP - 12, name, "middle"))
        for tick in heights:
            shapes.append(_line(left, y(tick), left + _PANEL, y(tick), "#dddddd"))
            shapes.append(_text(left - 6, y(tick) + 4, f"{tick:.3g}", "end"))
        if panel:
            shapes.append(_line(x(BEGIN), _TOP, x(BEGIN), _TOP + _HEIGHT, "#888888"))
        for number, points in enumerate(lines):
            last = number == len(lines) - 1 and len(lines) > 1
            stroke = 'stroke="#d62728" stroke-width="2"' if last else 'stroke="#1f77b4" stroke-width="1.2"'
            places = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
            shapes.append(f'<polyline points="{places}" fill="none" {stroke}/>')
        below = {0: "step 0", BEGIN: f"{BEGIN}", STEPS: f"{STEPS}"}
        shapes += [_text(x(step), _TOP + _HEIGHT + 18, words, "middle") for step, words in below.items()]
    return _picture(title, shapes, _TOP + _HEIGHT + 30)


def main() -> None:
    torch.set_num_threads(1)
    runs = {"healthy": reports(""), f"the last worker has wrong labels from step {BEGIN} on": reports("labels")}

    def draw(name: str, title: str, lines: Callable[[list[Report]], list[Line]]) -> None:
        series = [(words, lines(found)) for words, found in runs.items()]
        (DOCS / f"insight-{name}.svg").write_text(picture(title, series), encoding="utf-8")

    # The moving averages need some steps before they say anything.
    late = 5 * EVERY
    draw("noise-scale", "Noise scale, in batches of one worker", lambda f: [line(f, lambda r: r.noise_scale[0], late)])
    draw("adascale", "AdaScale's gain", lambda f: [line(f, lambda r: r.adascale_gain[0], late)])
    draw(
        "agreement",
        f"Each worker's agreement with the others, means of {EVERY} steps; the last worker in red",
        lambda f: [line(f, lambda r, rank=rank: r.agreement[0][rank]) for rank in range(WORKERS)],  # type: ignore[misc]
    )


if __name__ == "__main__":
    main()
