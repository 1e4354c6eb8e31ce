"""What was measured, as tables and a picture: ``python -m benchmarks.tables results.json``.

Tables are Markdown, for people to read as they are and for ``docs/measurements.md`` to hold.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from adacons_hvd.engine.replicas import CHECK_REPLICAS

from .jobs import Cluster

EXACT = ["two-pass", "one-pass", "gather"]
APPROXIMATE = ["half", "sketch"]

# The most it should be, by what is measured, where, and of which contender: in times the average's
# seconds, milliseconds for weights, and gradients beyond what averaging needs for memory.
TARGETS = {
    ("4,000,000 elements", "4 hosts x 1, 1 Gbit/s, mpi", "auto"): 1.05,
    ("4,000,000 elements", "8 hosts x 1, 1 Gbit/s, mpi", "auto"): 1.05,
    ("4,000,000 elements", "2 hosts x 4, 1 Gbit/s, mpi", "auto"): 2.0,
    ("4,000,000 elements", "2 hosts x 4, 1 Gbit/s, mpi", "fast"): 1.15,
    ("step in fsdp, wide", "2 hosts x 1, 1 Gbit/s, mpi", "one-pass"): 1.05,
    ("step in fsdp, wide", "4 hosts x 1, 1 Gbit/s, mpi", "one-pass"): 1.05,
    ("step in fsdp, wide", "8 hosts x 1, 1 Gbit/s, mpi", "one-pass"): 1.05,
    ("25,000,000 elements", "1 host x 4, mpi", "auto"): 1.3,
    ("step in torch, resnet-50", "1 host x 2, mpi", "auto"): 1.02,
    ("10,000 elements", "1 host x 4, mpi", "auto"): 1.1,
    ("4,000,000 elements", "4 hosts x 1, 1 Gbit/s, mpi", "auto+fp16"): 0.6,
    ("weights, ms", "1,024 workers", ""): 1.0,
    ("memory in torch, resnet-50", "1 host x 2, mpi", "one-pass"): 2.0,
    ("memory in torch, resnet-50", "1 host x 2, mpi", "two-pass"): 2.0,
}

# One case: its kind, its cluster, what its program was told, and what that found.
Entry = dict[str, Any]


def show(measured: Sequence[Entry], console: Console) -> None:
    tables = {
        "What was aimed at": targets(measured),
        "Beside averaging": ratios(measured),
        "What the cost model expected / what was measured, ms": choices(measured),
        "Where a step's time goes": phases(measured),
        "Comparing replicas": comparisons(measured),
    }
    for title, table in tables.items():
        if table.row_count:
            console.print(f"## {title}\n")
            console.print(table)
    for entry in measured:
        result = entry["result"]
        if entry["kind"] == "weights":
            weights = ", ".join(f"{n}: {x * 1e3:.2f} ms" for n, x in result["weights"].items())
            console.print(f"Weights from statistics, by workers: {weights}.\n")
            speeds = ", ".join(f"{name} {x / 1e9:.1f}" for name, x in result["bandwidth"].items())
            console.print(f"Local arithmetic, GB/s: {speeds}.\n")
        for name in _alone(entry):
            one = f"one gradient is {4 * result['parameters'] / 2**20:.0f} MiB"
            console.print(f"{entry['case']['model']}, {name} alone: peak {result['peak'] / 2**20:.0f} MiB; {one}.\n")


def targets(measured: Sequence[Entry]) -> Table:
    """The targets of what was measured. Of one measured twice, as in other company, the first."""
    table = _table("what", "where", "which", "at most", "measured", "")
    found: dict[tuple[str, str, str], float] = {}
    for what, where, times in _times(measured):
        for name in times.keys() - {"average"} if "average" in times else ():
            found.setdefault((what, where, name), statistics.median(_turns(times[name], times["average"])))
    alone = {name: entry for entry in measured for name in _alone(entry)}
    for name, entry in alone.items():
        if "average" in alone:
            more = entry["result"]["peak"] - alone["average"]["result"]["peak"]
            what = f"memory in {entry['case']['framework']}, {entry['case']['model']}"
            found[what, str(Cluster(**entry["cluster"])), name] = more / (4 * entry["result"]["parameters"])
    for entry in measured:
        if entry["kind"] == "weights":
            for workers, seconds in entry["result"]["weights"].items():
                found["weights, ms", f"{int(workers):,} workers", ""] = seconds * 1e3
    for key, most in TARGETS.items():
        if key in found:
            table.add_row(*key, f"{most:.2f}", f"{found[key]:.2f}", "" if found[key] <= most else "missed")
    return table


def ratios(measured: Sequence[Entry]) -> Table:
    """The peer's time, and what others took beside it."""
    found = [(what, where, times) for what, where, times in _times(measured) if len(times) > 1]
    names = list(dict.fromkeys(name for _, _, times in found for name in times if name != "average"))
    table = _table("what", "where", "average, ms", *names)
    for what, where, times in found:
        peer = times["average"]
        cells = [_ratio(times[name], peer) if name in times else "" for name in names]
        table.add_row(what, where, f"{statistics.median(peer) * 1e3:.2f}", *cells)
    return table


def _turns(own: Sequence[float], peer: Sequence[float]) -> list[float]:
    return [x / y for x, y in zip(own, peer, strict=True)]


def _ratio(own: Sequence[float], peer: Sequence[float]) -> str:
    """The median of the turns' ratios, and how far apart the ninth decile and the first are."""
    turns = sorted(_turns(own, peer))
    spread = turns[-1 - len(turns) // 10] - turns[len(turns) // 10]
    return f"{statistics.median(turns):.2f} ({spread:.2f})"


def choices(measured: Sequence[Entry]) -> Table:
    """Expected and measured milliseconds, and what was taken beside the best that could have been."""
    names = [*EXACT, *APPROXIMATE]
    table = _table("what", "where", *names, "auto took", "/ best", "fast took", "/ best")
    for what, where, answer in _answers(measured):
        medians = {name: statistics.median(times) for name, times in answer["times"].items()}
        expected = {name: x for choice in answer["choices"].values() for name, x in choice["expected"].items()}
        if not expected:
            continue
        cells = [f"{_short(expected, name)} / {_short(medians, name)}" for name in names]
        for mode, allowed in (("auto", EXACT), ("fast", names)):
            taken = answer["choices"].get(mode, {}).get("schedule", "")
            beside = ""
            if taken in medians:
                beside = f"{medians[taken] / min(medians[name] for name in allowed if name in medians):.2f}"
            cells += [taken, beside]
        table.add_row(what, where, *cells)
    return table


def _short(seconds: dict[str, float], name: str) -> str:
    return f"{seconds[name] * 1e3:.3g}" if name in seconds else "-"


def phases(measured: Sequence[Entry]) -> Table:
    """Where the time of a step goes, mean of the ranks."""
    table = _table("what", "where", "schedule", "ms of a step, mean of the ranks")
    for what, where, answer in _answers(measured):
        # Where `auto` and `fast` took the same, once.
        by_schedule = {answer["choices"][mode]["schedule"]: parts for mode, parts in answer["phases"].items()}
        for schedule, parts in by_schedule.items():
            longest = sorted(parts.items(), key=lambda part: -part[1])
            text = ", ".join(f"{name} {seconds * 1e3:.2f}" for name, seconds in longest if seconds >= 5e-6)
            table.add_row(what, where, schedule, text)
    return table


def comparisons(measured: Sequence[Entry]) -> Table:
    """What one comparison of replicas takes, and its share of training when every hundredth step has one."""
    table = _table("what", "where", "parameters", "step, ms", "comparison, ms", "share of a step, %")
    for entry in measured:
        times = entry["result"].get("times", {}) if entry["kind"] == "steps" else {}
        if "auto" in times:
            step, comparison = statistics.median(times["auto"]), entry["result"]["comparison"]
            what = f"{entry['case']['framework']}, {entry['case']['model']}"
            share = 100 * comparison / (CHECK_REPLICAS * step)
            cells = (
                f"{entry['result']['parameters']:,}",
                f"{step * 1e3:.1f}",
                f"{comparison * 1e3:.2f}",
                f"{share:.3f}",
            )
            table.add_row(what, str(Cluster(**entry["cluster"])), *cells)
    return table


def draw(measured: Sequence[Entry], path: Path) -> None:
    """Expected against measured seconds, a point for every schedule in every case."""
    points: dict[str, list[tuple[float, float]]] = {}
    for _, _, answer in _answers(measured):
        # `fast` compares all schedules when it chooses.
        for name, seconds in answer["choices"].get("fast", {"expected": {}})["expected"].items():
            if name in answer["times"]:
                points.setdefault(name, []).append((seconds, statistics.median(answer["times"][name])))
    if not points:
        return
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    for name, pairs in points.items():
        axes.scatter(*zip(*pairs, strict=True), label=name)
    values = [value for pairs in points.values() for pair in pairs for value in pair]
    ends = [min(values), max(values)]
    axes.plot(ends, ends, color="grey", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="expected seconds", ylabel="measured seconds")
    axes.legend()
    figure.savefig(path, dpi=130)


def _table(*headers: str) -> Table:
    return Table(*headers, box=box.MARKDOWN)


def _alone(entry: Entry) -> list[str]:
    """The one contender of a case that is about memory."""
    return list(entry["result"]["times"]) if entry["kind"] == "steps" and len(entry["result"]["times"]) == 1 else []


def _answers(measured: Sequence[Entry]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """What, where and results of every length of every case of collectives alone."""
    for entry in measured:
        if entry["kind"] == "collectives":
            for answer in entry["result"]:
                yield f"{answer['length']:,}", str(Cluster(**entry["cluster"])), answer


def _times(measured: Sequence[Entry]) -> Iterator[tuple[str, str, dict[str, list[float]]]]:
    for what, where, answer in _answers(measured):
        yield f"{what} elements", where, answer["times"]
    for entry in measured:
        if entry["kind"] == "steps":
            what = f"step in {entry['case']['framework']}, {entry['case']['model']}"
            yield what, str(Cluster(**entry["cluster"])), entry["result"]["times"]


def main() -> None:
    measured = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    show(measured, Console(width=400))


if __name__ == "__main__":
    main()
