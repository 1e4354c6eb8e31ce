"""Measure what AdaCons costs beside averaging: ``make bench``, or ``python -m benchmarks``.

Every case runs the peer, Horovod's own average, and the contenders in turns in one job, and shows
the median of each turn's ratio to the peer. All turns go to ``out/bench/results.json``. The results
go to a folder in the format of ``benchmarks/results``, beside those of earlier runs, and are printed
as tables.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from . import hosts
from .jobs import Cluster, JobError, run
from .record import APPROXIMATE, EXACT, Entry, add, read
from .tables import show

AGGREGATORS = ["AdaCons", "NormalizedMean", "Curvature, past only", "Curvature"]
EVERYTHING = ["paper", *EXACT, *APPROXIMATE, "auto", "fast"]

# A case: its kind (which is the program the ranks run), its cluster, and what the program is told.
Case = tuple[str, Cluster, dict[str, Any]]


def cases(full: bool) -> list[Case]:
    """The cases behind the targets; with ``full``, every configuration."""

    def collectives(cluster: Cluster, lengths: Sequence[int], contenders: Sequence[str] = EVERYTHING) -> Case:
        case = {"lengths": list(lengths), "contenders": list(contenders), "turns": 20, "seconds": 12}
        return "collectives", cluster, case

    def aggregators(length: int, contenders: Sequence[str], turns: int) -> Case:
        # They differ by a few hundredths, and turns by more.
        case = {"lengths": [length], "contenders": list(contenders), "turns": turns, "seconds": 240}
        return "collectives", Cluster(4, 1, 1000), case

    def steps(framework: str, model: str, contenders: Sequence[str], seconds: float) -> Case:
        case = {"framework": framework, "model": model, "contenders": list(contenders), "turns": 20, "seconds": seconds}
        return "steps", Cluster(1, 2), case

    def sharded(cluster: Cluster) -> Case:
        case = {"framework": "fsdp", "model": "wide", "contenders": ["average", "one-pass"], "turns": 20, "seconds": 60}
        return "steps", cluster, case

    # Between hosts nobody gathers millions of elements; it would take most of the time.
    sensible = [name for name in EVERYTHING if name != "gather"]
    small = [10_000, 100_000, 1_000_000]
    chosen = [
        collectives(Cluster(1, 2), small),
        collectives(Cluster(1, 4), [10_000, 1_000_000, 25_000_000]),
        collectives(Cluster(4, 1, 1000), [4_000_000], [*sensible, "auto+fp16"]),
        collectives(Cluster(8, 1, 1000), [4_000_000], sensible),
        collectives(Cluster(4, 2, 1000), [4_000_000], sensible),
        collectives(Cluster(2, 4, 1000), [4_000_000], sensible),
        # By itself, for more turns.
        collectives(Cluster(2, 4, 1000), [4_000_000], ["auto", "fast", "hosts"]),
        aggregators(4_000_000, AGGREGATORS, 90),
        aggregators(25_000_000, ["AdaCons", "Curvature"], 16),
        *(sharded(Cluster(hosts, 1, 1000)) for hosts in (2, 4, 8)),
    ]
    if full:
        chosen += [
            collectives(Cluster(1, 2), [10_000_000]),
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
        # Some of the default cases are among these again.
        chosen = [case for i, case in enumerate(chosen) if case not in chosen[:i]]
    models = ("cnn", "resnet-50", "transformer", "recommender")
    chosen += [steps(kind, model, ["average", "auto"], 30) for kind in ("torch", "ddp", "keras") for model in models]
    # Memory of each alone.
    chosen += [steps("torch", "resnet-50", [name], 1) for name in ("average", "two-pass", "one-pass")]
    chosen += [("round_trips", Cluster(1, n), {"turns": 200, "seconds": 5}) for n in (2, 4)]
    chosen.append(("weights", Cluster(1, 1), {"device": "cpu", "length": 1 << 24}))
    if not hosts.why_not():
        return chosen
    return [case for case in chosen if not case[1].megabits]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="every configuration; takes hours")
    parser.add_argument("--only", default="", help="only cases whose description holds this")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="where all turns are written")
    parser.add_argument("--results", type=Path, default=Path("out/bench"), help="where results are kept as data")
    args = parser.parse_args()
    # So that ending this ends the job it waits for, and takes the emulated hosts down.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    console = Console()
    args.out.mkdir(parents=True, exist_ok=True)
    if reason := hosts.why_not():
        console.print(f"No emulated hosts: {reason}.")
    elif not hosts.has_latency():
        console.print("No added latency: there is no /dev/net/tun.")
    chosen = [case for case in cases(args.full) if args.only in f"{case[0]} {case[1]} {case[2]}"]
    measured: list[Entry] = []
    failures = 0
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
    add(args.results, measured)
    print(show(read(args.results)))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
