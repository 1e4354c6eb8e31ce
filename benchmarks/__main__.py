"""Measure what AdaCons costs beside averaging: ``make bench``, or ``python -m benchmarks``.

Every case runs the peer, Horovod's own average, and the contenders in turns in one job, and shows
the median of each turn's ratio to the peer. Results go to ``out/bench/``: a table, everything
measured as JSON, and a picture of expected against measured times.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import hosts
from .jobs import Cluster, JobError, run

EXACT = ["two-pass", "one-pass", "gather"]
APPROXIMATE = ["half", "sketch"]
EVERYTHING = ["paper", *EXACT, *APPROXIMATE, "auto", "fast"]

# A case: its kind (which is the program the ranks run), its cluster, and what the program is told.
Case = tuple[str, Cluster, dict[str, Any]]
# What, where, contender, seconds, ratio to the peer, and the spread of that.
Line = tuple[str, str, str, float, float, float]


def cases(full: bool) -> list[Case]:
    """The cases behind the targets; with ``full``, every configuration."""

    def collectives(cluster: Cluster, lengths: Sequence[int], contenders: Sequence[str] = EVERYTHING) -> Case:
        case = {"lengths": list(lengths), "contenders": list(contenders), "turns": 20, "seconds": 12}
        return "collectives", cluster, case

    def steps(framework: str, model: str, contenders: Sequence[str], seconds: float) -> Case:
        case = {"framework": framework, "model": model, "contenders": list(contenders), "turns": 20, "seconds": seconds}
        return "steps", Cluster(1, 2), case

    # Between hosts nobody gathers millions of elements; it would take most of the time.
    sensible = [name for name in EVERYTHING if name != "gather"]
    chosen = [
        collectives(Cluster(1, 4), [10_000, 1_000_000, 25_000_000]),
        collectives(Cluster(4, 1, 1000), [4_000_000], [*sensible, "auto+fp16"]),
        collectives(Cluster(8, 1, 1000), [4_000_000], sensible),
        collectives(Cluster(4, 2, 1000), [4_000_000], sensible),
        collectives(Cluster(2, 4, 1000), [4_000_000], sensible),
    ]
    if full:
        small = [10_000, 100_000, 1_000_000]
        chosen += [
            collectives(Cluster(1, 2), [*small, 10_000_000]),
            collectives(Cluster(1, 4), [100_000, 10_000_000]),
            collectives(Cluster(1, 8), [*small, 10_000_000], sensible),
            # Every contender has buffers of its own, so at this length few go into one job.
            collectives(Cluster(1, 2), [100_000_000], ["two-pass", "one-pass", "auto"]),
            collectives(Cluster(1, 4), [100_000_000], ["one-pass", "auto"]),
        ]
        chosen += [collectives(Cluster(1, n), small, ["adasum", "auto"]) for n in (2, 4, 8)]
        chosen += [collectives(Cluster(1, n, launcher="gloo"), small) for n in (2, 4, 8)]
        chosen += [collectives(Cluster(2, 2, 1000, launcher="gloo"), [10_000, 1_000_000])]
        delays = (0, 1) if hosts.has_latency() else (0,)
        for count, per_host in ((2, 1), (4, 1), (8, 1), (2, 2), (4, 2), (2, 4)):
            for megabits, length in ((100, 1_000_000), (1000, 4_000_000), (10_000, 4_000_000)):
                for delay in delays:
                    cluster = Cluster(count, per_host, megabits, delay)
                    chosen.append(collectives(cluster, [10_000]))
                    chosen.append(collectives(cluster, [length], sensible))
        # Those of both.
        chosen = [case for i, case in enumerate(chosen) if case not in chosen[:i]]
    models = ("cnn", "resnet-50", "transformer", "recommender")
    chosen += [steps(kind, model, ["average", "auto"], 30) for kind in ("torch", "ddp", "keras") for model in models]
    # Memory of each alone.
    chosen += [steps("torch", "resnet-50", [name], 1) for name in ("average", "two-pass", "one-pass")]
    chosen.append(("weights", Cluster(1, 1), {"device": "cpu", "length": 1 << 24}))
    if not hosts.why_not():
        return chosen
    return [case for case in chosen if not case[1].megabits]


def rows(
    kind: str, cluster: Cluster, case: dict[str, Any], result: Any
) -> list[tuple[str, str, str, float, float, float]]:
    """Lines of the table: what, where, contender, seconds, ratio to the peer, and the ratio's spread."""
    if kind == "collectives":
        found = [(f"d = {answer['length']:,}", answer["times"]) for answer in result]
    elif kind == "steps" and len(result["times"]) > 1:
        found = [(f"{case['framework']}: {case['model']} step", result["times"])]
    else:
        return []
    lines = []
    for what, times in found:
        peer = times["average"]
        for name, own in times.items():
            ratios = sorted(x / y for x, y in zip(own, peer, strict=True))
            spread = ratios[-1 - len(ratios) // 10] - ratios[len(ratios) // 10]
            lines.append((what, str(cluster), name, statistics.median(own), statistics.median(ratios), spread))
    return lines


def show(console: Console, measured: Sequence[dict[str, Any]]) -> None:
    table = Table("case", "cluster", "contender", "ms", "ratio", "spread")
    for entry in measured:
        lines = rows(entry["kind"], Cluster(**entry["cluster"]), entry["case"], entry["result"])
        for what, where, name, seconds, ratio, spread in lines:
            table.add_row(what, where, name, f"{seconds * 1e3:.2f}", f"{ratio:.2f}", f"{spread:.2f}")
        if lines:
            table.add_section()
        elif entry["kind"] == "steps":
            (name,) = entry["result"]["times"]
            peak, parameters = entry["result"]["peak"], entry["result"]["parameters"]
            gradients = f"of which one gradient is {4 * parameters / 2**20:.0f} MiB"
            console.print(f"{entry['case']['model']}, {name} alone: peak {peak / 2**20:.0f} MiB, {gradients}")
        else:
            weights = ", ".join(f"{n}: {x * 1e3:.2f} ms" for n, x in entry["result"]["weights"].items())
            console.print(f"weights from statistics, by workers: {weights}")
            speeds = ", ".join(f"{name} {x / 1e9:.1f}" for name, x in entry["result"]["bandwidth"].items())
            console.print(f"local arithmetic, GB/s: {speeds}")
    console.print(table)
    console.print(detours(measured))
    console.print(phases(measured))


def phases(measured: Sequence[dict[str, Any]]) -> Table:
    """Where the time of a step goes."""
    table = Table("case", "cluster", "schedule", "ms of", title="where a step's time goes, mean of the ranks")
    for entry in measured:
        for answer in entry["result"] if entry["kind"] == "collectives" else ():
            for mode, parts in answer["phases"].items():
                schedule = answer["choices"][mode]["schedule"]
                longest = sorted(parts.items(), key=lambda part: -part[1])
                text = ", ".join(f"{name} {seconds * 1e3:.2f}" for name, seconds in longest)
                table.add_row(f"d = {answer['length']:,}", str(Cluster(**entry["cluster"])), schedule, text)
    return table


def detours(measured: Sequence[dict[str, Any]]) -> Table:
    """What ``auto`` and ``fast`` chose beside the best they could have chosen."""
    table = Table("case", "cluster", "mode", "took", "best", "took / best")
    for entry in measured:
        for answer in entry["result"] if entry["kind"] == "collectives" else ():
            medians = {name: statistics.median(own) for name, own in answer["times"].items()}
            for mode, allowed in (("auto", EXACT), ("fast", [*EXACT, *APPROXIMATE])):
                if mode not in answer["choices"]:
                    continue
                took = answer["choices"][mode]["schedule"]
                best = min((name for name in allowed if name in medians), key=lambda name: medians[name])
                ratio = f"{medians[took] / medians[best]:.2f}"
                table.add_row(f"d = {answer['length']:,}", str(Cluster(**entry["cluster"])), mode, took, best, ratio)
    return table


def draw(measured: Sequence[dict[str, Any]], path: Path) -> None:
    """Expected against measured seconds, a point for every schedule in every case."""
    points: dict[str, list[tuple[float, float]]] = {}
    for entry in measured:
        for answer in entry["result"] if entry["kind"] == "collectives" else ():
            # `fast` compares all schedules when it chooses.
            for name, seconds in answer["choices"].get("fast", {"expected": {}})["expected"].items():
                if name not in answer["times"]:
                    continue
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


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="every configuration; takes hours")
    parser.add_argument("--only", default="", help="only cases whose description holds this")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    args = parser.parse_args()
    # So that ending this ends the job it waits for, and takes the emulated hosts down.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    console = Console()
    args.out.mkdir(parents=True, exist_ok=True)
    if reason := hosts.why_not():
        console.print(f"No emulated hosts: {reason}.")
    elif not hosts.has_latency():
        console.print("No added latency: this kernel has no netem.")
    chosen = [case for case in cases(args.full) if args.only in f"{case[0]} {case[1]} {case[2]}"]
    measured, failures = [], 0
    bar = Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console)
    with bar:
        task = bar.add_task("", total=len(chosen))
        for kind, cluster, case in chosen:
            bar.update(task, description=f"{kind}, {cluster}")
            try:
                result = run(
                    kind, cluster, case, timeout=300 + 4 * case.get("seconds", 60) * len(case.get("lengths", [1]))
                )
            except JobError as error:
                console.print(f"[red]{error}")
                failures += 1
            else:
                measured.append({"kind": kind, "cluster": asdict(cluster), "case": case, "result": result})
                (args.out / "results.json").write_text(json.dumps(measured, indent=1), encoding="utf-8")
            bar.advance(task)
    show(console, measured)
    draw(measured, args.out / "expected.png")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
