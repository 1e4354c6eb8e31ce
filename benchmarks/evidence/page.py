"""The data of ``docs/evidence.md``, ``benchmarks/results/evidence.json``, and the page that is made of them.

The prose is in ``page.md`` beside this file, where ``$name`` stands for a table or a figure.
"""

from __future__ import annotations

import datetime
import itertools
import json
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template

from .. import record
from . import report
from .contenders import ADACONS, AVERAGE, CURVATURE, NORMALIZED, PAST_ONLY
from .report import Study
from .search import CHOOSING, Record, UnfinishedError, measure
from .studies import CLIPPED, Grid, grids
from .tasks import task

RESULTS = Path(__file__).parents[1] / "results" / "evidence.json"
_TEXT = Path(__file__).with_name("page.md")
_ABOUT = "Scores of aggregators, each at its own best learning rate, by python -m benchmarks.evidence."
#: By title, in the order of the plan.
Studies = dict[str, Study]


def study(grid: Grid, record: Record, choosing: Sequence[int], reported: Sequence[int]) -> Study:
    """The data of a study: a score for every seed, and what was chosen.

    Of a column in which some method has none yet, because the study is not finished, there is nothing.
    """
    cells = []
    for column in grid.columns:
        found = []
        for (row, place), settings in grid.cells.items():
            if place == column:
                try:
                    result = measure(record, settings, choosing, reported)
                except UnfinishedError:
                    break
                chosen = [result.setting.choice] if len(settings) > 1 else []
                head = {"row": row, "column": column, "setting": str(result.setting), "chosen": chosen}
                scores = [round(score, 4) for score in result.scores]
                found.append(head | {"power": round(math.log2(result.rate)), "scores": scores})
        else:
            cells += found if all(cell["scores"] for cell in found) else []
    work = task(next(iter(grid.cells.values()))[0].task)
    return {
        "title": grid.title,
        "date": datetime.date.today().isoformat(),
        "metric": work.metric,
        "better": "more" if work.best is max else "less",
        "seeds": len(reported),
        "pairs": [list(pair) for pair in grid.pairs],
        "cells": cells,
    }


def collected(wanted: Iterable[Grid], record: Record) -> Studies:
    """What a record holds of some studies."""
    found = [study(grid, record, CHOOSING, grid.seeds) for grid in wanted]
    return {study["title"]: study for study in found if study["cells"]}


def merged(new: Mapping[str, Study], path: Path) -> Studies:
    """New studies, and what the file has of others. New cells take the place of a study's old ones."""
    old: Studies = {}
    if path.exists():
        old = {study["title"]: study for study in json.loads(path.read_text(encoding="utf-8"))["studies"]}
    for title, study in new.items():
        fresh = {(cell["row"], cell["column"]) for cell in study["cells"]}
        kept = [cell for cell in old.get(title, study)["cells"] if (cell["row"], cell["column"]) not in fresh]
        old[title] = {**study, "cells": [*study["cells"], *kept]}
    return {grid.title: _in_order(old[grid.title], grid) for grid in grids() if grid.title in old}


def _in_order(study: Study, grid: Grid) -> Study:
    """The study with its cells as the grid has them."""
    cells = {(cell["row"], cell["column"]): cell for cell in study["cells"]}
    return {**study, "cells": [cells[key] for key in grid.cells if key in cells]}


def write(studies: Studies, results: Path, page: Path) -> None:
    """Write the data, with a line for every cell, and the page with its picture."""
    blocks = []
    for study in studies.values():
        head = [f"   {json.dumps(name)}: {json.dumps(value)}," for name, value in study.items() if name != "cells"]
        lines = ",\n".join(f"    {json.dumps(cell)}" for cell in study["cells"])
        blocks.append("\n".join(["  {", *head, '   "cells": [', lines, "   ]", "  }"]))
    text = f'{{\n "about": {json.dumps(_ABOUT)},\n "studies": [\n' + ",\n".join(blocks) + "\n ]\n}\n"
    results.write_text(text, encoding="utf-8")
    page.write_text(text_of(studies), encoding="utf-8")
    points = by_size(studies, "images", "Adam")
    if points:
        report.draw_sizes(points, "points", page.with_name("evidence-size.png"))


def tables(study: Study) -> str:
    return f"{study['title']}, {study['metric']}\n\n{report.scores(study)}\n{report.leads(study)}"


def text_of(studies: Studies) -> str:
    """The page."""
    found = {"comparisons": comparisons(studies), "left_out": left_out(studies)}
    for optimizer in ("Adam", "SGD"):
        found[f"summary_{optimizer.lower()}"] = summary(studies, optimizer)
    for grid in grids():
        name = re.sub(r"\W+", "_", grid.title).lower()
        study = studies.get(grid.title)
        missing = f"(Not run yet: `{grid.title}`.)\n"
        found[name] = f"{report.scores(study)}\n{report.leads(study)}" if study else missing
    return Template(_TEXT.read_text(encoding="utf-8")).substitute(found)


#: Kinds of studies, what they are of, and the parameters of their models.
_KINDS = {"aggregators": "200 steps", "longer": "800 steps"}
_SMALL = {"images": "17k", "language": "19k", "recommender": "15k"}
_PARAMETERS = {"17k": 17_418, "19k": 18_816, "100k": 100_750, "1M": 997_210, "10M": 9_936_910}
_METHODS = (CLIPPED, NORMALIZED, ADACONS, PAST_ONLY, CURVATURE)


def summary(studies: Studies, optimizer: str) -> str:
    """Each method's lead over the average, by task, length and size."""
    rows = [
        (f"{kind}, {name}", optimizer, f"{name}, {small}, 32 workers, {steps}")
        for kind, steps in _KINDS.items()
        for name, small in _SMALL.items()
    ]
    rows += [
        (f"{kind}, {name}, {optimizer}", size, f"{name}, {size}, {count} workers, 200 steps")
        for name in ("images", "language")
        for kind, count in {"size with 32 workers": 32, "size": 8}.items()
        for size in _PARAMETERS
    ]
    rows += [
        (f"largest, {name}, {optimizer}", steps, f"{name}, 10M, 8 workers, {steps}")
        for name in ("images", "language")
        for steps in ("200 steps", "1,000 steps")
    ]
    pairs = [*((method, AVERAGE) for method in _METHODS), (CURVATURE, NORMALIZED)]
    lines = []
    for title, column, words in rows:
        if title in studies:
            found = [report.lead(studies[title], *pair, column) for pair in pairs]
            if any(found):
                lines.append([words, *found])
    return report.table(["", *_METHODS, f"{CURVATURE} − {NORMALIZED}"], [*lines, costs()])


def costs() -> list[str]:
    """The summary's last row: a step's time over that of Horovod's average, as ``benchmarks/results`` has it."""
    names = {
        NORMALIZED: "NormalizedMean",
        ADACONS: "AdaCons",
        PAST_ONLY: "Curvature, past only",
        CURVATURE: "Curvature",
    }
    found = record.every(record.read(RESULTS.parent), "aggregators")
    row = next(row for row in found if row["ratios"].keys() == set(names.values()))
    cells = [f"{row['ratios'][names[method]][0]:.2f}" if method in names else "" for method in _METHODS]
    return [f"what a step costs: times the average's, {row['elements'] // 10**6}M, {record.where(row)}", *cells, ""]


def left_out(studies: Studies) -> str:
    """The studies of Curvature that were not run, or of which columns are missing."""
    lines = []
    for grid in grids():
        done = {cell["column"] for cell in studies.get(grid.title, {"cells": []})["cells"]}
        missing = [column for column in grid.columns if column not in done]
        if missing and CURVATURE in grid.rows:
            lines.append(f"`{grid.title}`" + (f" ({', '.join(missing)})" if done else ""))
    return textwrap.fill(", ".join(lines) or "nothing", 118, subsequent_indent="  ", break_on_hyphens=False)


def comparisons(studies: Studies) -> str:
    """How many differences the page's tables have, and in how many zero is outside the interval."""
    found: dict[tuple[str, str], list[float]] = {}
    for study in studies.values():
        settings = {(cell["row"], cell["column"]): cell["setting"] for cell in study["cells"]}
        for (ours, control), (_, column) in itertools.product(study["pairs"], settings):
            differences = report.compared(study, ours, control, column)
            if differences is not None:
                # Some runs are in the tables of several studies.
                pair = settings[ours, column], settings[control, column]
                found[pair] = max(differences, found.get(pair, []), key=len)
    outside = sum(abs(mean) > half for mean, half in map(report.interval, found.values()))
    chance = f"{len(found) / 20:.0f}"
    return f"{len(found)} differences, of which {outside} have zero outside their interval; chance makes it {chance}"


def by_size(studies: Studies, name: str, optimizer: str) -> dict[str, list[tuple[float, float, float]]]:
    """Points of leads over the average: the number of parameters, the mean, half of the interval."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    places = [(f"size, {name}, {optimizer}", size, size) for size in _PARAMETERS]
    for title, column, size in [*places, (f"largest, {name}, {optimizer}", "200 steps", "10M")]:
        for method in (NORMALIZED, PAST_ONLY, CURVATURE):
            if title in studies:
                differences = report.compared(studies[title], method, AVERAGE, column)
                if differences:
                    parameters = _PARAMETERS[size]
                    found.setdefault(method, []).append((parameters, *report.interval(differences)))
    return found
