"""Make ``docs/measurements.md`` and its charts of the data in ``benchmarks/results``: ``python -m benchmarks.page``.

The prose is in ``benchmarks/page.md``, where ``$name`` stands for a table or a figure.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

from . import charts, tables
from .jobs import ROOT
from .record import APPROXIMATE, EXACT, RESULTS, Row, Studies, every, read, where

_TEXT = Path(__file__).with_name("page.md")
_SHOWN = ("paper", "auto", "fast")
#: The phases of a step, by what a chart shows together; the others are waiting.
_PARTS = {
    "arithmetic": ("inner products", "apply"),
    "copies": ("copy in", "copy out"),
    "weights": ("weights",),
    "messages and Python": ("flags", "table", "send", "result", "other Python"),
}


def pages(studies: Studies) -> dict[str, str]:
    """The text of every file, by its name in ``docs``."""
    collectives = every(studies, "collectives")
    return {
        "measurements.md": Template(_TEXT.read_text(encoding="utf-8")).substitute(_figures(studies)),
        "measurements-large.svg": charts.ratios(
            "Large gradients: time over the average's", _beside(collectives, 1_000_000)
        ),
        "measurements-small.svg": charts.ratios(
            "10,000 elements: time over the average's", _beside(collectives, 10_000, 10_000)
        ),
        "measurements-steps.svg": charts.ratios(
            "Training steps: time over averaging's",
            [
                (_label(row), {name: ratio for name, (ratio, _) in row["ratios"].items()})
                for row in sorted(every(studies, "steps"), key=lambda row: (row["model"], row["hosts"]))
            ],
        ),
        "measurements-expected.svg": expected(studies),
        "measurements-phases.svg": charts.shares(
            "Where a step's time goes", [(_label(row), _together(row["parts"])) for row in _aimed_at(studies, "phases")]
        ),
    }


def expected(studies: Studies) -> str:
    """The chart of what the cost model expected."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in every(studies, "choices"):
        for name in row["expected"].keys() & row["measured"].keys() if "fast" in row["took"] else ():
            points.setdefault(name, []).append((row["expected"][name], row["measured"][name]))
    ordered = {name: points[name] for name in charts.COLOURS if name in points}
    return charts.expected("What the cost model expected, and what was measured", ordered)


def _beside(rows: Sequence[Row], least: int, most: int = 1 << 62) -> list[tuple[str, Mapping[str, float]]]:
    """One case for every cluster, its largest gradient that all of the contenders shown were given."""
    found: dict[str, Row] = {}
    for row in rows:
        whole = all(name in row["ratios"] for name in _SHOWN) and least <= row["elements"] <= most
        if whole and row["elements"] > found.get(where(row), {"elements": 0})["elements"]:
            found[where(row)] = row
    chosen = sorted(found.values(), key=_order)
    return [(_label(row), {name: row["ratios"][name][0] for name in _SHOWN}) for row in chosen]


def _order(row: Row) -> tuple[object, ...]:
    """One host and MPI first, then the slower networks."""
    network = (row["megabits"], row["milliseconds"], row["launcher"] == "gloo")
    return (*network, row["per_host"] if row["megabits"] else 0, row["hosts"], row["per_host"], row["elements"])


def _label(row: Row) -> str:
    place = where(row).removesuffix(", mpi")
    if "model" in row:
        return f"{row['framework']}, {row['model']}, {place}"
    short = f"{row['elements'] // 1_000_000}M" if row["elements"] >= 1_000_000 else f"{row['elements']:,}"
    return f"{short}, {place}" + (f", {row['schedule']}" if "schedule" in row else "")


def _together(parts: Mapping[str, float]) -> dict[str, float]:
    shown = {name: sum(parts.get(phase, 0.0) for phase in phases) for name, phases in _PARTS.items()}
    return {**shown, "waiting": sum(ms for name, ms in parts.items() if name.startswith("wait for"))}


def _aimed_at(studies: Studies, study: str) -> list[Row]:
    """The rows of cases for which there is a target, each case once."""
    cases = {(what, place) for what, place, _ in tables.TARGETS}
    found: dict[str, Row] = {}
    for row in every(studies, study):
        if (tables.what(row), where(row)) in cases:
            found.setdefault(_label(row), row)
    return sorted(found.values(), key=_order)


def _figures(studies: Studies) -> dict[str, str]:
    figures = {
        "runs": _runs(studies),
        "targets": tables.targets(studies),
        "replicas": tables.comparisons(every(studies, "replicas")),
        "ratios": tables.ratios(_aimed_at(studies, "collectives")),
        "aggregators": tables.aggregators(every(studies, "aggregators")),
        "memory": tables.memory(every(studies, "memory")),
        "local": tables.local(every(studies, "local")),
    }
    for mode, allowed in (("auto", EXACT), ("fast", [*EXACT, *APPROXIMATE])):
        # A choice can be judged where another that was possible was measured too.
        judged = [row for row in every(studies, "choices") if len(row["measured"].keys() & set(allowed)) > 1]
        beside = [row["took"][mode][1] for row in judged if row["took"].get(mode, [None, None])[1] is not None]
        figures[f"{mode}_compared"] = str(len(beside))
        figures[f"{mode}_best"] = str(sum(ratio <= 1 for ratio in beside))
        figures[f"{mode}_worst"] = f"{max(beside):.2f}"
    first: dict[tuple[int, str], Row] = {}
    for row in every(studies, "collectives"):
        first.setdefault((row["elements"], where(row)), row)
    figures["one_worker"] = _ratio(first[4_000_000, "4 hosts x 1, 1 Gbit/s, mpi"], "auto")
    figures["behind_one_card"] = _ratio(first[4_000_000, "2 hosts x 4, 1 Gbit/s, mpi"], "fast")
    figures["small"] = _ratio(first[10_000, "1 host x 4, mpi"], "auto")
    return figures


def _ratio(row: Row, name: str) -> str:
    return f"{row['ratios'][name][0]:.2f}"


def _runs(studies: Studies) -> str:
    """A table of the files, and what there is to know of some of their rows."""
    lines = ["| file | machine | recorded | rows |", "|---|---|---|---|"]
    notes: dict[str, list[str]] = {}
    for study, runs in studies.items():
        machines = "; ".join(dict.fromkeys(run["machine"] for run in runs))
        dates = ", ".join(dict.fromkeys(run["date"] for run in runs))
        total = sum(len(run["rows"]) for run in runs)
        lines.append(f"| [{study}.json](../benchmarks/results/{study}.json) | {machines} | {dates} | {total} |")
        for run in runs:
            if run["note"]:
                notes.setdefault(run["note"], []).append(f"{len(run['rows'])} rows of {study}")
    return "\n".join([*lines, "", *(f"- {', '.join(files)}: {note}." for note, files in notes.items())])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder with the data")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="the folder for the page and its charts")
    args = parser.parse_args()
    for name, text in pages(read(args.results)).items():
        (args.out / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
