"""Draws the pictures of ``docs/noise-scale.md``, ``adascale.md`` and ``sick-workers.md``.

``python -m benchmarks.insight_pictures`` trains eight simulated workers as :mod:`.sick_workers` does, once healthy and
once with wrong labels on the last one from step 300 on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from adacons_hvd import Mean
from adacons_hvd.aggregators import Memory
from adacons_hvd.costs import Choice
from adacons_hvd.insight import SickWorkers
from adacons_hvd.report import Report

from .charts import _line, _picture, _text
from .sick_workers import Training

DOCS = Path(__file__).parent.parent / "docs"
WORKERS, BEGIN, STEPS, EVERY = 8, 300, 600, 10
_PANEL, _GAP, _TOP, _HEIGHT = 350, 70, 76, 180
"""The width of a panel, and so on, in pixels."""


def reports(fault: str) -> list[Report]:
    """One of every ten reports of a run."""
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
        if step % EVERY == 0:
            found.append(Report(decision, statistics, Choice("one-pass", "simulated")))
    return found


def picture(title: str, runs: Sequence[tuple[str, list[list[float]]]]) -> str:
    """Two panels with one scale; in each a line for every series, the last of which is red."""
    values = [value for _, lines in runs for line in lines for value in line]
    low, high = min(0.0, *values), max(values)
    shapes = []
    for panel, (name, lines) in enumerate(runs):
        left = 50 + panel * (_PANEL + _GAP)

        def y(value: float) -> float:
            return _TOP + _HEIGHT * (high - value) / (high - low)

        shapes.append(_text(left + _PANEL / 2, _TOP - 10, name, "middle"))
        for tick in (low, (low + high) / 2, high):
            shapes.append(_line(left, y(tick), left + _PANEL, y(tick), "#dddddd"))
            shapes.append(_text(left - 6, y(tick) + 4, f"{tick:.2g}", "end"))
        for number, line in enumerate(lines):
            colour = "#d62728" if number == len(lines) - 1 and len(lines) > 1 else "#1f77b4"
            points = " ".join(
                f"{left + _PANEL * n / (len(line) - 1):.1f},{y(value):.1f}" for n, value in enumerate(line)
            )
            shapes.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.2"/>')
        for step in (0, BEGIN, STEPS):
            x = left + _PANEL * step / STEPS
            shapes.append(_text(x, _TOP + _HEIGHT + 16, f"step {step}" if step == 0 else f"{step}", "middle"))
    return _picture(title, shapes, _TOP + _HEIGHT + 30)


def main() -> None:
    torch.set_num_threads(1)
    runs = [("healthy", reports("")), (f"the last worker has wrong labels from step {BEGIN} on", reports("labels"))]

    def draw(name: str, title: str, series: list[list[list[float]]]) -> None:
        named = [(words, lines) for (words, _), lines in zip(runs, series, strict=True)]
        (DOCS / f"insight-{name}.svg").write_text(picture(title, named), encoding="utf-8")

    # The moving averages need some steps before they say anything.
    late = [found[5:] for _, found in runs]
    draw("noise-scale", "Noise scale, in batches of one worker", [[[r.noise_scale[0] for r in f]] for f in late])
    draw("adascale", "AdaScale's gain", [[[r.adascale_gain[0] for r in f]] for f in late])
    agreements = [[[r.agreement[0][rank] for r in found] for rank in range(WORKERS)] for _, found in runs]
    draw("agreement", "Each worker's agreement with the others; the last worker in red", agreements)


if __name__ == "__main__":
    main()
