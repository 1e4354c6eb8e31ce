"""Results as data: rows made of what jobs found, kept in a folder with one JSON file per study.

A file is a sentence about its rows and a list of runs. A run is a machine, a day, what else a reader has to know, and
rows. ``benchmarks/results`` holds the runs that ``docs/measurements.md`` shows.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adacons_hvd.engine.replicas import CHECK_REPLICAS

from .jobs import Cluster

RESULTS = Path(__file__).parent / "results"

_PLACE = (
    "Ranks are on `hosts` x `per_host`, by `launcher`. Links have `megabits` a second, 0 for one host and its shared "
    "memory, and delay each packet by `milliseconds` in each direction. "
)
#: Each study's name, which is also that of its file, and the sentences that explain its rows.
STUDIES = {
    "collectives": _PLACE + "A gradient of `elements` through Horovod's average, `average` ms, and through each "
    "contender: the median ratio to the average of the same turn, and the ninth decile's distance from the first.",
    "steps": _PLACE + "A training step with averaging, `average` ms, and with each schedule, as in `collectives`.",
    "choices": _PLACE + "Milliseconds that the cost model `expected` of each schedule and that were `measured`; the "
    "schedule that `auto` and `fast` `took`, and its time over that of the best measured one that they may take.",
    "phases": _PLACE + "Milliseconds of each part of a step with the schedule that `auto` or `fast` took, mean of the "
    "ranks.",
    "replicas": "Milliseconds of one comparison of replicas and of a training `step`, and the `share` in % that "
    f"comparisons have of training when every {CHECK_REPLICAS}th step has one.",
    "memory": _PLACE + "MiB at a rank's peak and of one gradient; `beyond` averaging's peak, in gradients.",
    "aggregators": _PLACE
    + "A gradient of `elements` through each aggregator, with the schedule that `auto` `took` for "
    "it: `measured` and `expected` ms, and the ratios to Horovod's average, as in `collectives`, and to AdaCons.",
    "round_trips": _PLACE + "Milliseconds that a sum of a few numbers, or an allgather of them, takes by each of the "
    "`ways` there are: the median, and the ninth decile's distance from the first.",
    "local": "One process: `ms` of deciding on AdaCons' `weights` or on those of `Curvature(memory=8)`, by `workers`, "
    "and the GB/s of operations on `MiB` of gradients.",
}

EXACT = ["two-pass", "one-pass", "gather"]
APPROXIMATE = ["half", "sketch"]

# One case: its kind, its cluster, what its program was told, and what that found.
Entry = dict[str, Any]
Row = dict[str, Any]
Run = dict[str, Any]
#: Runs by study.
Studies = dict[str, list[Run]]


def machine() -> str:
    return f"{os.cpu_count()} cores, {platform.machine()}"


def rows(measured: Sequence[Entry]) -> Iterator[tuple[str, Row]]:
    """The study and the row of every result."""
    for entry in measured:
        if entry["kind"] == "collectives":
            for answer in entry["result"]:
                yield from _collectives(entry["cluster"], answer)
        elif entry["kind"] == "round_trips":
            ways = {name: _spread([1e3 * x for x in times]) for name, times in entry["result"].items()}
            yield "round_trips", {**entry["cluster"], "ways": ways}
        elif entry["kind"] == "weights":
            for operation in ("weights", "curvature"):
                for workers, seconds in entry["result"][operation].items():
                    yield "local", {"operation": operation, "workers": int(workers), "ms": _ms(seconds)}
            for name, speed in entry["result"]["bandwidth"].items():
                mebibytes = 4 * entry["case"]["length"] / 2**20
                yield "local", {"operation": name, "MiB": _short(mebibytes), "GB/s": _short(speed / 1e9)}
        elif len(entry["result"]["times"]) > 1:
            yield from _steps(entry)
    yield from _memory([e for e in measured if e["kind"] == "steps" and len(e["result"]["times"]) == 1])


def _collectives(cluster: Row, answer: Row) -> Iterator[tuple[str, Row]]:
    case = {**cluster, "elements": answer["length"]}
    if "AdaCons" in answer["times"]:
        yield "aggregators", {**case, **_aggregators(answer["times"], answer["choices"])}
        return
    yield "collectives", {**case, **_beside(answer["times"])}
    measured = {name: statistics.median(times) for name, times in answer["times"].items()}
    expected = {name: x for choice in answer["choices"].values() for name, x in choice["expected"].items()}
    took = {}
    # Of the schedules that the cost model speaks of, `auto` may take the exact ones and `fast` all.
    for mode, allowed in (("auto", EXACT), ("fast", [*EXACT, *APPROXIMATE])):
        if mode in answer["choices"]:
            name = answer["choices"][mode]["schedule"]
            possible = [measured[other] for other in allowed if other in measured]
            took[mode] = [name, _short(measured[name] / min(possible)) if name in measured else None]
    if expected:
        times = {name: _ms(measured[name]) for name in [*EXACT, *APPROXIMATE] if name in measured}
        expected = {name: _ms(seconds) for name, seconds in expected.items()}
        yield "choices", {**case, "expected": expected, "measured": times, "took": took}
    # Where `auto` and `fast` took the same, once.
    for name, parts in {took[mode][0]: parts for mode, parts in answer["phases"].items()}.items():
        longest = sorted(parts.items(), key=lambda part: -part[1])
        yield "phases", {**case, "schedule": name, "parts": {part: _ms(seconds) for part, seconds in longest}}


def _aggregators(times: dict[str, list[float]], choices: dict[str, Row]) -> Row:
    return {
        "took": {name: choice["schedule"] for name, choice in choices.items()},
        "measured": {name: _ms(statistics.median(own)) for name, own in times.items()},
        "expected": {name: _ms(choice["expected"][choice["schedule"]]) for name, choice in choices.items()},
        "ratios": {name: _ratio(times[name], times["average"]) for name in choices},
        "to AdaCons": {name: _ratio(times[name], times["AdaCons"]) for name in choices if name != "AdaCons"},
    }


def _steps(entry: Entry) -> Iterator[tuple[str, Row]]:
    case, result = entry["case"], entry["result"]
    model = {"framework": case["framework"], "model": case["model"]}
    yield "steps", {**entry["cluster"], **model, **_beside(result["times"])}
    if "auto" in result["times"]:
        step = statistics.median(result["times"]["auto"])
        yield (
            "replicas",
            {
                "what": f"{case['framework']}, {case['model']}",
                "parameters": result["parameters"],
                "comparison": _ms(result["comparison"]),
                "step": _ms(step),
                "share": _short(100 * result["comparison"] / (CHECK_REPLICAS * step)),
            },
        )


def _memory(alone: Sequence[Entry]) -> Iterator[tuple[str, Row]]:
    """The rows of jobs with one contender each, which had the process for itself."""
    peaks = {_place(entry): entry["result"]["peak"] for entry in alone}
    for entry in alone:
        (name,) = entry["result"]["times"]
        peak, average = peaks[_place(entry)], peaks.get(_place(entry, "average"))
        gradient = 4 * entry["result"]["parameters"]
        model = {"framework": entry["case"]["framework"], "model": entry["case"]["model"], "schedule": name}
        row = {**entry["cluster"], **model, "gradient": _short(gradient / 2**20), "peak": _short(peak / 2**20)}
        if name != "average" and average is not None:
            row["beyond"] = _short((peak - average) / gradient)
        yield "memory", row


def _place(entry: Entry, contender: str = "") -> tuple[object, ...]:
    """The cluster, model and contender of a job with one contender; another contender in its place, if given."""
    (own,) = entry["result"]["times"]
    return (*entry["cluster"].values(), entry["case"]["framework"], entry["case"]["model"], contender or own)


def _beside(times: dict[str, list[float]]) -> Row:
    """The average's milliseconds, and each contender's ratio to it: the turns' median, and the deciles' distance."""
    ratios = {name: _ratio(times[name], times["average"]) for name in times.keys() - {"average"}}
    return {"average": _ms(statistics.median(times["average"])), "ratios": {n: ratios[n] for n in times if n in ratios}}


def _ratio(times: Sequence[float], peers: Sequence[float]) -> list[float]:
    return _spread([own / peer for own, peer in zip(times, peers, strict=True)])


def _spread(values: Sequence[float]) -> list[float]:
    """The median, and the deciles' distance."""
    turns = sorted(values)
    return [_short(statistics.median(turns)), _short(turns[-1 - len(turns) // 10] - turns[len(turns) // 10])]


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _ms(seconds: float) -> float:
    return _short(seconds * 1e3)


def read(folder: Path) -> Studies:
    """The runs of every study that has a file in the folder."""
    paths = {name: folder / f"{name}.json" for name in STUDIES}
    return {name: json.loads(path.read_text(encoding="utf-8"))["runs"] for name, path in paths.items() if path.exists()}


def every(studies: Studies, study: str) -> list[Row]:
    """The rows of all runs of one study."""
    return [row for run in studies.get(study, []) for row in run["rows"]]


def add(folder: Path, measured: Sequence[Entry]) -> None:
    """Put a run before those in the folder's files. A row of an earlier run goes when the same was measured again."""
    studies = read(folder)
    found: dict[str, list[Row]] = {}
    for study, row in rows(measured):
        found.setdefault(study, []).append(row)
    for study, new in found.items():
        again = [_identity(row) for row in new]
        earlier = [
            {**run, "rows": [row for row in run["rows"] if _identity(row) not in again]}
            for run in studies.get(study, [])
        ]
        today = {"machine": machine(), "date": datetime.date.today().isoformat(), "note": "", "rows": new}
        write(folder, study, [today, *(run for run in earlier if run["rows"])])


def _identity(row: Row) -> Row:
    """The fields of a row that say what was measured, without the figures."""
    names = [*Cluster.__dataclass_fields__, "elements", "framework", "model", "schedule", "what", "operation"]
    names += ["workers", "MiB"]
    # The same gradient may have been measured in other company.
    company = {name: set(row[name]) for name in ("ratios", "measured") if name in row}
    return {name: row[name] for name in names if name in row} | company


def write(folder: Path, study: str, runs: Sequence[Run]) -> None:
    """Write a study's file, with a line for every row."""
    blocks = []
    for run in runs:
        head = [f"   {json.dumps(name)}: {json.dumps(run[name])}," for name in ("machine", "date", "note")]
        lines = ",\n".join(f"    {json.dumps(row)}" for row in run["rows"])
        blocks.append("\n".join(["  {", *head, '   "rows": [', lines, "   ]", "  }"]))
    text = f'{{\n "about": {json.dumps(STUDIES[study])},\n "runs": [\n' + ",\n".join(blocks) + "\n ]\n}\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{study}.json").write_text(text, encoding="utf-8")


def where(row: Row) -> str:
    """The cluster of a row, in words."""
    return str(Cluster(**{name: row[name] for name in asdict(Cluster(1, 1))}))
