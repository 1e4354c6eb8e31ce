"""Results as the tables and pictures of ``docs/evidence.md``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from . import linear
from .spread import BATCHES, MOMENTS, WORKERS, Looks

#: A study's data, as in ``benchmarks/results/evidence.json``; see :func:`page.study`.
Study = dict[str, Any]

#: Student's t for a two-sided interval of 95%, by the number of seeds.
STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}

#: The published sample's final losses, by batch and method, and the iteration they are of.
PUBLISHED = {
    (128, linear.AVERAGE): (33.4, 1000),
    (128, "AdaCons, 32 workers"): (1.98e-8, 1000),
    (128, "AdaCons, 8 workers"): (1.27e-5, 1000),
    (2048, linear.AVERAGE): (49.3, 1000),
    (2048, "AdaCons, 32 workers"): (1.48e-8, 300),
    (2048, "AdaCons, 8 workers"): (52.4, 1000),
}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(head), ["---"] * len(head), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """The mean of paired differences, and half the width of its 95% confidence interval."""
    half = STUDENT[len(differences)] * statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.fmean(differences), half


def scores(study: Study) -> str:
    """Mean and standard deviation over seeds, and the learning rate, of every method."""
    found = {(cell["row"], cell["column"]): cell for cell in study["cells"]}
    digits = _digits(study)

    def cell(row: str, column: str) -> str:
        if (row, column) not in found:
            return ""
        values, at = found[row, column]["scores"], found[row, column]
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.{digits}f}{spread} ({', '.join([_power(at['power']), *at['chosen']])})"

    rows, columns = (list(dict.fromkeys(key[axis] for key in found)) for axis in (0, 1))
    return table(["", *columns], [[row, *(cell(row, column) for column in columns)] for row in rows])


def leads(study: Study) -> str:
    """Each method's lead over another, seed by seed: positive where the former is better."""
    columns = list(dict.fromkeys(cell["column"] for cell in study["cells"]))
    lines = [
        [f"{ours} − {control}", *(lead(study, ours, control, column) for column in columns)]
        for ours, control in study["pairs"]
    ]
    return table(["", *columns], [line for line in lines if any(line[1:])])


def lead(study: Study, ours: str, control: str, column: str) -> str:
    """One of them, bold where zero is outside the interval; nothing where runs are missing."""
    found = compared(study, ours, control, column)
    if found is None:
        return ""
    (mean, half), digits = interval(found), _digits(study)
    text = f"{mean:+.{digits}f} ± {half:.{digits}f}".replace("-", "−")
    text = f"**{text}**" if abs(mean) > half else text
    return text if len(found) == study["seeds"] else f"{text} ({len(found)} seeds)"


def compared(study: Study, ours: str, control: str, column: str) -> list[float] | None:
    """The lead with each seed that both have, if these are enough for an interval."""
    found = {cell["row"]: cell["scores"] for cell in study["cells"] if cell["column"] == column}
    if not {ours, control} <= found.keys():
        return None
    sign = 1 if study["better"] == "more" else -1
    differences = [sign * (x - y) for x, y in zip(found[ours], found[control], strict=False)]
    return differences if len(differences) >= min(3, study["seeds"]) else None


def _digits(study: Study) -> int:
    """Percentages are told to a hundredth, losses to a thousandth."""
    return 2 if study["better"] == "more" else 3


def _power(exponent: int) -> str:
    return "2" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def regression(losses: linear.Losses) -> str:
    """The published figures and ours: the median over seeds, and the least and greatest."""
    rows = []
    for (batch, name), (published, iteration) in PUBLISHED.items():
        if batch in losses:
            moment = iteration // 2 // linear.EVERY
            sample = name.replace("AdaCons", "as the sample sorts")
            ours = [_extent(losses[batch][which][:, moment]) for which in dict.fromkeys((name, sample))]
            rows.append([str(batch), name, str(iteration), f"{published:.3g}", *ours, *[""] * (2 - len(ours))])
    return table(["batch", "method", "iteration", "published", "ours", "ours, sorted as in the sample"], rows)


def _extent(values: torch.Tensor) -> str:
    return f"{values.quantile(0.5):.2g} ({values.min():.2g} to {values.max():.2g})"


def ends(losses: linear.Losses) -> str:
    """The median after the last update, of everything in the picture."""
    names = list(next(iter(losses.values())))
    rows = [[name, *(f"{losses[batch][name][:, -1].quantile(0.5):.2g}" for batch in losses)] for name in names]
    return table(["", *(f"batch {batch}" for batch in losses)], rows)


def spreads(found: Looks) -> str:
    """The angle to the average, and the own share, by local batch."""
    rows = [
        [
            when,
            f"{workers}",
            *(f"{x['angle']:.2g}°, {100 * x['own share']:.0f}%" for x in line),
        ]
        for when in MOMENTS
        for workers in WORKERS
        if (line := [found[when, workers, batch] for batch in BATCHES if (when, workers, batch) in found])
    ]
    return table(["", "workers", *map(str, BATCHES[: len(rows[0]) - 2])], rows)


def _axes(columns: int, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, columns, figsize=(3.2 * columns, height), sharey=True, layout="constrained", squeeze=False
    )
    return figure, axes[0]


def draw_regression(losses: linear.Losses, path: Path) -> None:
    figure, axes = _axes(len(losses), 3.2)
    names = [linear.AVERAGE, *(f"AdaCons, {workers} workers" for workers in linear.WORKERS)]
    for axis, (batch, lines) in zip(axes, losses.items(), strict=True):
        for name in names:
            values = lines[name].clamp(min=1e-30)
            at = range(0, linear.EVERY * values.shape[1], linear.EVERY)
            axis.plot(at, values.quantile(0.5, dim=0), label=name, linewidth=1.2)
            axis.fill_between(at, values.min(0).values, values.max(0).values, alpha=0.15)
        axis.set(yscale="log", xlabel="updates", title=f"batch {batch}")
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("expected loss")
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=100)


def draw_spreads(found: Looks, path: Path) -> None:
    figure, axes = _axes(2, 3.0)
    for axis, when in zip(axes, MOMENTS, strict=True):
        for workers in WORKERS:
            values = [found[when, workers, batch]["spread"] for batch in BATCHES]
            axis.plot(BATCHES, values, marker="o", markersize=4, label=f"{workers} workers")
        axis.set(xscale="log", yscale="log", xlabel="local batch", title=f"{when}, after {MOMENTS[when]} steps")
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("weights: deviation / mean")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=100)


def draw_sizes(points: Mapping[str, Sequence[tuple[float, float, float]]], unit: str, path: Path) -> None:
    """Lines of leads with their intervals, by the number of parameters."""
    figure, (axis,) = _axes(1, 3.2)
    figure.set_figwidth(6.4)
    for place, (name, line) in enumerate(points.items()):
        sizes, means, halves = zip(*line, strict=True)
        # Side by side, so that their intervals can be told apart.
        axis.errorbar(
            [size * 1.06**place for size in sizes],
            means,
            halves,
            marker="o",
            markersize=4,
            capsize=3,
            linewidth=1.2,
            label=name,
        )
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(xscale="log", xlabel="parameters", ylabel=f"lead over the average, {unit}")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=100)
