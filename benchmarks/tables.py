"""Results as Markdown tables: ``python -m benchmarks.tables`` prints every figure of ``benchmarks/results``.

With a folder as its argument, it prints those of that folder: ``out/bench`` has what ``make bench`` measured last.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from .record import APPROXIMATE, EXACT, RESULTS, Row, Studies, every, read, where

# The most it should be, by what is measured, where, and of which contender: in times the average's
# seconds, milliseconds for weights, and gradients beyond what averaging needs for memory.
TARGETS = {
    ("4,000,000 elements", "4 hosts x 1, 1 Gbit/s, mpi", "auto"): 1.0,
    ("4,000,000 elements", "8 hosts x 1, 1 Gbit/s, mpi", "auto"): 1.0,
    ("4,000,000 elements", "2 hosts x 4, 1 Gbit/s, mpi", "auto"): 2.0,
    ("4,000,000 elements", "2 hosts x 4, 1 Gbit/s, mpi", "fast"): 1.05,
    ("4,000,000 elements", "2 hosts x 4, 1 Gbit/s, mpi", "hosts"): 1.05,
    ("step in fsdp, wide", "2 hosts x 1, 1 Gbit/s, mpi", "one-pass"): 1.05,
    ("step in fsdp, wide", "4 hosts x 1, 1 Gbit/s, mpi", "one-pass"): 1.05,
    ("step in fsdp, wide", "8 hosts x 1, 1 Gbit/s, mpi", "one-pass"): 1.05,
    ("25,000,000 elements", "1 host x 4, mpi", "auto"): 1.3,
    ("10,000 elements", "1 host x 2, mpi", "auto"): 1.3,
    ("100,000 elements", "1 host x 2, mpi", "auto"): 1.3,
    ("1,000,000 elements", "1 host x 2, mpi", "auto"): 1.3,
    ("10,000 elements", "1 host x 4, mpi", "auto"): 1.6,
    ("step in torch, cnn", "1 host x 2, mpi", "auto"): 1.03,
    ("step in ddp, cnn", "1 host x 2, mpi", "auto"): 1.03,
    ("step in keras, cnn", "1 host x 2, mpi", "auto"): 1.05,
    ("step in torch, recommender", "1 host x 2, mpi", "auto"): 1.15,
    ("step in ddp, recommender", "1 host x 2, mpi", "auto"): 1.15,
    ("step in keras, recommender", "1 host x 2, mpi", "auto"): 1.15,
    ("step in torch, resnet-50", "1 host x 2, mpi", "auto"): 1.0,
    ("step in ddp, resnet-50", "1 host x 2, mpi", "auto"): 1.02,
    ("step in keras, resnet-50", "1 host x 2, mpi", "auto"): 1.0,
    ("4,000,000 elements", "4 hosts x 1, 1 Gbit/s, mpi", "auto+fp16"): 0.6,
    ("weights, ms", "1,024 workers", ""): 0.5,
    ("4,000,000 elements, to AdaCons", "4 hosts x 1, 1 Gbit/s, mpi", "Curvature"): 1.05,
    ("25,000,000 elements, to AdaCons", "4 hosts x 1, 1 Gbit/s, mpi", "Curvature"): 1.05,
    ("weights of Curvature, ms", "1,024 workers", ""): 20.0,
    ("memory in torch, resnet-50", "1 host x 2, mpi", "one-pass"): 2.0,
    ("memory in torch, resnet-50", "1 host x 2, mpi", "two-pass"): 2.0,
}


#: What is decided on from statistics, by the operation's name.
_DECISIONS = {"weights": "weights", "curvature": "weights of Curvature"}


def show(studies: Studies) -> str:
    """All tables, each under its title."""
    tables = {
        "What was aimed at": targets(studies),
        "Comparing replicas": comparisons(every(studies, "replicas")),
        "Beside averaging": ratios([*every(studies, "collectives"), *every(studies, "steps")]),
        "Aggregators": aggregators(every(studies, "aggregators")),
        "Round trips": round_trips(every(studies, "round_trips")),
        "Memory": memory(every(studies, "memory")),
        "Weights and local arithmetic": local(every(studies, "local")),
        "What the cost model expected / what was measured, ms": choices(every(studies, "choices")),
        "Where a step's time goes": phases(every(studies, "phases")),
    }
    return "\n\n".join(f"## {title}\n\n{table}" for title, table in tables.items() if table)


def what(row: Row) -> str:
    """The name of what was timed in a row of collectives or of training steps."""
    return f"{row['elements']:,} elements" if "elements" in row else f"step in {row['framework']}, {row['model']}"


def targets(studies: Studies) -> str:
    """The targets of what was measured. Of one measured twice, as in other company, the first counts."""
    found: dict[tuple[str, str, str], float] = {}
    for row in [*every(studies, "collectives"), *every(studies, "steps")]:
        for name, (ratio, _) in row["ratios"].items():
            found.setdefault((what(row), where(row), name), ratio)
    for row in every(studies, "memory"):
        if "beyond" in row:
            key = (f"memory in {row['framework']}, {row['model']}", where(row), row["schedule"])
            found.setdefault(key, row["beyond"])
    for row in every(studies, "local"):
        if row["operation"] in _DECISIONS:
            found.setdefault((f"{_DECISIONS[row['operation']]}, ms", f"{row['workers']:,} workers", ""), row["ms"])
    for row in every(studies, "aggregators"):
        for name, (ratio, _) in row["to AdaCons"].items():
            found.setdefault((f"{what(row)}, to AdaCons", where(row), name), ratio)
    return _table(
        ["what", "where", "which", "at most", "measured", ""],
        (
            [*key, f"{most:.2f}", f"{found[key]:.2f}", "" if found[key] <= most else "missed"]
            for key, most in TARGETS.items()
            if key in found
        ),
    )


def ratios(rows: Sequence[Row]) -> str:
    """The average's time and each contender's median ratio to it, with the deciles' distance in brackets."""
    names = list(dict.fromkeys(name for row in rows for name in row["ratios"]))
    cells = (["{:.2f} ({:.2f})".format(*row["ratios"][n]) if n in row["ratios"] else "" for n in names] for row in rows)
    return _table(
        ["what", "where", "average, ms", *names],
        ([what(row), where(row), f"{row['average']:.2f}", *own] for row, own in zip(rows, cells, strict=True)),
    )


def aggregators(rows: Sequence[Row]) -> str:
    """What each aggregator costs beside an average and AdaCons, and what the cost model expected."""
    table = []
    for row in rows:
        table.append([what(row), where(row), "average", "", f"{row['measured']['average']:.0f}", "", "", "", ""])
        for name, (ratio, spread) in row["ratios"].items():
            beside = "{:.2f} ({:.2f})".format(*row["to AdaCons"][name]) if name in row["to AdaCons"] else ""
            expected = f"{row['expected'][name] / row['expected']['AdaCons']:.2f}" if beside else ""
            times = [f"{row[kind][name]:.0f}" for kind in ("measured", "expected")]
            table.append(["", "", name, row["took"][name], *times, f"{ratio:.2f} ({spread:.2f})", beside, expected])
    heads = ["what", "where", "aggregator", "schedule", "ms", "expected, ms"]
    return _table([*heads, "to the average", "to AdaCons", "expected"], table)


def choices(rows: Sequence[Row]) -> str:
    """Expected and measured milliseconds, and the time of what was taken over that of the best possible."""
    names = [*EXACT, *APPROXIMATE]
    table = []
    for row in rows:
        cells = [f"{_short(row['expected'].get(name))} / {_short(row['measured'].get(name))}" for name in names]
        for mode in ("auto", "fast"):
            taken, beside = row["took"].get(mode, ("", None))
            cells += [taken, "" if beside is None else f"{beside:.2f}"]
        table.append([what(row), where(row), *cells])
    return _table(["what", "where", *names, "auto took", "/ best", "fast took", "/ best"], table)


def _short(milliseconds: float | None) -> str:
    return "-" if milliseconds is None else f"{milliseconds:.3g}"


def phases(rows: Sequence[Row]) -> str:
    """The parts of a step that take at least five microseconds."""
    text = (", ".join(f"{name} {ms:.2f}" for name, ms in row["parts"].items() if ms >= 5e-3) for row in rows)
    return _table(
        ["what", "where", "schedule", "ms of a step, mean of the ranks"],
        ([what(row), where(row), row["schedule"], parts] for row, parts in zip(rows, text, strict=True)),
    )


def round_trips(rows: Sequence[Row]) -> str:
    """Milliseconds that a sum of a few numbers takes by each way, with the deciles' distance in brackets."""
    names = list(dict.fromkeys(name for row in rows for name in row["ways"]))
    cells = (["{:.3f} ({:.2f})".format(*row["ways"][name]) for name in names] for row in rows)
    return _table(["where", *names], ([where(row), *own] for row, own in zip(rows, cells, strict=True)))


def comparisons(rows: Sequence[Row]) -> str:
    """The time of one comparison of replicas, and its share of training when every hundredth step has one."""
    return _table(
        ["what", "parameters", "comparison, ms", "step, ms", "share of a step, %"],
        (
            [
                row["what"],
                f"{row['parameters']:,}",
                f"{row['comparison']:.2f}",
                f"{row['step']:.0f}" if "step" in row else "",
                _share(row),
            ]
            for row in rows
        ),
    )


def _share(row: Row) -> str:
    if "step" not in row:
        return ""
    return f"{row['share']:.3f}" if row.get("share", 0) >= 0.001 else "less than 0.001"


def memory(rows: Sequence[Row]) -> str:
    """The peaks of jobs that each had one schedule, beside averaging's."""
    return _table(
        ["what", "one gradient, MiB", "peak of a rank, MiB", "beyond averaging, gradients"],
        (
            [
                f"{row['framework']}, {row['model']}, {row['schedule']}",
                f"{row['gradient']:.0f}",
                f"{row['peak']:.0f}",
                f"{row['beyond']:.2f}" if "beyond" in row else "",
            ]
            for row in rows
        ),
    )


def local(rows: Sequence[Row]) -> str:
    """Milliseconds to decide on weights, and the speed of operations on gradients."""
    names = {
        "look": "inner products of all rows with their sum",
        "combine": "weighted sum of the rows",
        "own": "inner products of one gradient with the sum",
        "copy": "copy, for comparison",
    }
    return _table(
        ["what", "of", "takes"],
        (
            [f"{_DECISIONS[row['operation']]}, from statistics", f"{row['workers']:,} workers", f"{row['ms']:.2f} ms"]
            if row["operation"] in _DECISIONS
            else [names[row["operation"]], f"{row['MiB']:.0f} MiB", f"{row['GB/s']:.1f} GB/s"]
            for row in rows
        ),
    )


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; nothing if it has no rows."""
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([f"| {' | '.join(headers)} |", "|---" * len(headers) + "|", *lines]) if lines else ""


if __name__ == "__main__":
    print(show(read(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)))
