"""A logged run as pictures: coefficients, weights, spread, fallbacks, noise scale and agreement over time."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from .display import show_json
from .errors import CommandError, require

__all__ = ["add_arguments", "read_log", "run"]

Record = dict[str, Any]

#: AdaCons' stages, and what the paper's Figure 7 calls them.
_STAGES = {
    "first-order": "(a) first-order coefficients",
    "momentum": "(b) after momentum",
    "normalized": "(c) after normalization",
}
#: More workers than this are told apart by color only.
_FEW = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("log", type=Path, help="a file written by adacons_hvd.logging, such as run.jsonl")
    parser.add_argument(
        "--output", type=Path, help="the picture, .png, .pdf or .svg (default: the log's name with .png)"
    )
    parser.add_argument("--group", type=int, default=0, help="which group of parameters (default: 0, the first)")


def run(options: argparse.Namespace) -> int:
    records = read_log(options.log)
    groups = min(len(record["weights"]) for record in records)
    if not 0 <= options.group < groups:
        raise CommandError(f"--group must be from 0 to {groups - 1} for this log, not {options.group}")
    output = options.output or options.log.with_suffix(".png")
    _draw(records, options.group, f"{options.log.name}" + (f", group {options.group}" if groups > 1 else ""), output)
    summary = _summary(records, options.group) | {"picture": str(output)}
    if options.json:
        show_json(summary)
    else:
        print(
            f"steps {summary['first_step']} to {summary['last_step']}, {summary['workers']} workers, "
            f"by {', '.join(summary['schedules'])}: spread {summary['spread']:.3g} on average, "
            f"{summary['fallbacks']} fallbacks to the average"
        )
        print(f"Picture: {output}")
    return 0


# --- reading --------------------------------------------------------------------------------------


def read_log(path: Path) -> list[Record]:
    """The records of the run, by step.

    A job that started again from a checkpoint has written some steps twice, and a file that was
    used before begins with another run: wherever steps go back, what is later replaces what it
    repeats.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CommandError(f"{path} is not a log written by adacons_hvd.logging") from error
    records: list[Record] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            step = record["steps"]
            record["weights"], record["norms"], record["spread"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) and records:
                break  # the run is still writing this one
            raise CommandError(f"line {number} of {path} is not a report written by adacons_hvd.logging") from error
        while records and records[-1]["steps"] >= step:
            records.pop()
        records.append(record)
    if not records:
        raise CommandError(f"{path} is empty: the run has not logged a step yet")
    return records


def _summary(records: list[Record], group: int) -> Record:
    spreads = [record["spread"][group] for record in records if record["spread"][group] is not None]
    return {
        "records": len(records),
        "first_step": records[0]["steps"],
        "last_step": records[-1]["steps"],
        "workers": max(len(record["weights"][group]) for record in records),
        "schedules": list(dict.fromkeys(record["schedule"] for record in records)),
        "spread": fmean(spreads) if spreads else None,
        "last_spread": spreads[-1] if spreads else None,
        "fallbacks": records[-1]["fallbacks"],
        "nonfinite_steps": sum(None in record["norms"][group] for record in records),
    }


# --- drawing --------------------------------------------------------------------------------------


def _draw(records: list[Record], group: int, title: str, output: Path) -> None:
    require("matplotlib", "drawing")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [record["steps"] for record in records]
    stages = [stage for stage in _STAGES if any(stage in record["coefficients"] for record in records)]
    told = any(_has(record, "agreement", group) for record in records)
    rows = 2 + bool(stages) + told
    figure = plt.figure(figsize=(11, 3.2 * rows), layout="constrained")
    figure.suptitle(title)
    grid = figure.add_gridspec(rows, 6)
    for column, stage in enumerate(stages):
        width = 6 // len(stages)
        axes = figure.add_subplot(grid[0, column * width : (column + 1) * width])
        _stage(axes, steps, [record["coefficients"].get(stage, [None])[group] for record in records])
        axes.set(title=_STAGES[stage], xlabel="step", ylabel="coefficient" if column == 0 else None)
    bottom = rows - 1 - told
    axes = figure.add_subplot(grid[bottom - 1, :])
    _lines(axes, steps, [_relative(record["weights"][group]) for record in records])
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set(title="weight of each worker, 1 being that in an average", xlabel="step", ylabel="weight / mean weight")
    axes = figure.add_subplot(grid[bottom, :3])
    axes.plot(steps, [_number(record["spread"][group]) for record in records], color="tab:blue")
    axes.set(
        title="spread of what workers contribute, 0 if all count alike",
        xlabel="step",
        ylabel="standard deviation / mean",
        ylim=(0, None),
    )
    _mark_fallbacks(axes, records)
    axes = figure.add_subplot(grid[bottom, 3:])
    _lines(axes, steps, [record["norms"][group] for record in records])
    axes.set(title="length of each worker's gradient", xlabel="step", ylabel="norm")
    if told:
        _draw_insight(figure, grid, steps, records, group)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=120)
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot write {output}: {error}") from error
    finally:
        plt.close(figure)


def _draw_insight(figure: Any, grid: Any, steps: list[int], records: list[Record], group: int) -> None:
    """The noise scale, and each worker's agreement with a mark where it is sick, in the last row."""
    axes = figure.add_subplot(grid[-1, :3])
    axes.plot(steps, [_number(r["noise_scale"][group]) if _has(r, "noise_scale", group) else math.nan for r in records])
    axes.set(title="noise scale, in batches of one worker", xlabel="step", ylabel="noise / signal", ylim=(0, None))
    axes = figure.add_subplot(grid[-1, 3:])
    rows = [record["agreement"][group] if _has(record, "agreement", group) else [] for record in records]
    _lines(axes, steps, rows)
    for rank in sorted({rank for record in records for rank in record.get("sick", [])}):
        at = [n for n, (record, row) in enumerate(zip(records, rows, strict=True)) if rank in record.get("sick", [])]
        axes.plot([steps[n] for n in at], [_number(rows[n][rank]) for n in at], "x", color="tab:red", markersize=4)
    axes.set(title="agreement of each worker with the others; x: sick", xlabel="step", ylabel="cosine")


def _has(record: Record, name: str, group: int) -> bool:
    """Whether a record has this number; logs of earlier versions do not."""
    return len(record.get(name, [])) > group


def _stage(axes: Any, steps: list[int], coefficients: list[list[float] | None]) -> None:
    """Mean and standard deviation over the workers, as in the paper's Figure 7."""
    known = [[value for value in row or () if value is not None] for row in coefficients]
    means = [fmean(row) if row else math.nan for row in known]
    sigmas = [pstdev(row) if row else math.nan for row in known]
    axes.plot(steps, means, color="tab:blue")
    below = [mean - sigma for mean, sigma in zip(means, sigmas, strict=True)]
    above = [mean + sigma for mean, sigma in zip(means, sigmas, strict=True)]
    axes.fill_between(steps, below, above, alpha=0.3, color="tab:blue", linewidth=0)


def _lines(axes: Any, steps: list[int], rows: list[list[float | None]]) -> None:
    """One line for each worker, in order of rank from dark to light."""
    import matplotlib

    workers = max(len(row) for row in rows)
    colors = matplotlib.colormaps["viridis"]
    for worker in range(workers):
        values = [_number(row[worker]) if worker < len(row) else math.nan for row in rows]
        color = colors(worker / max(workers, 2))
        axes.plot(steps, values, color=color, linewidth=1.2 if workers <= _FEW else 0.6, label=f"worker {worker}")
    if workers <= _FEW:
        axes.legend(fontsize="small", ncols=2)


def _relative(weights: list[float | None]) -> list[float | None]:
    """Weights in units of what an average would give each worker."""
    whole = sum(weight for weight in weights if weight is not None)
    return [weight * len(weights) / whole if weight is not None and whole else None for weight in weights]


def _mark_fallbacks(axes: Any, records: list[Record]) -> None:
    """A line wherever the count has gone up, also between two logged steps."""
    before, label = 0, "fell back to the average"
    for record in records:
        if record["fallbacks"] > before:
            axes.axvline(record["steps"], color="tab:red", linewidth=0.8, label=label)
            label = "_"
        before = record["fallbacks"]
    if label == "_":
        axes.legend(fontsize="small")


def _number(value: float | None) -> float:
    return math.nan if value is None else value
