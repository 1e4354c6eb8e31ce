"""The studies are grids of settings, each a table of ``docs/evidence.md``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from .contenders import (
    ADACONS,
    AGREEING,
    AGREEING_CURVATURE,
    AVERAGE,
    CURVATURE,
    DAMPINGS,
    EQUAL,
    LONG,
    MEMORIES,
    NORMALIZED,
    OTHERS,
    PAST_ONLY,
    WORKERS_ONLY,
)
from .search import REPORTED
from .training import Setting

OPTIMIZERS = ("SGD", "Adam")
ABLATION = (AVERAGE, NORMALIZED, EQUAL, "basic", "momentum", "normalization", ADACONS, LONG, WORKERS_ONLY)
CLIPPED, QUICK_ADAM = "average, clipped", "average, beta2 tuned"
#: The local batch of 32 workers.
TASKS = {"images": 64, "language": 2, "recommender": 64}
#: Lengths of an average gradient from which a tuned clipping starts, about those in mid-training.
USUAL = {"images": 0.5, "language": 0.5, "recommender": 0.0625}


Cells = dict[tuple[str, str], tuple[Setting, ...]]


@dataclass(frozen=True)
class Grid:
    """One table: a row for every row's name, a column for every column's."""

    title: str
    #: The settings of a method among which validation data decide; most have one.
    cells: Cells
    #: Pairs of rows: the former's lead over the latter is told.
    pairs: tuple[tuple[str, str], ...]
    #: The study's budget: no further run is started when the process has computed for so long.
    minutes: int
    seeds: tuple[int, ...] = REPORTED

    def of(self, column: str) -> Grid:
        """The same with this column alone."""
        return replace(self, cells={key: cell for key, cell in self.cells.items() if key[1] == column})

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(column for _, column in self.cells))

    @property
    def rows(self) -> list[str]:
        return list(dict.fromkeys(row for row, _ in self.cells))


def over(*controls: str, rows: Iterable[str]) -> tuple[tuple[str, str], ...]:
    return tuple((row, control) for row in rows for control in controls if row != control)


def cells(rows: Iterable[str], columns: Iterable[str], setting: Callable[[str, str], Setting]) -> Cells:
    return {(row, column): (setting(row, column),) for column, row in itertools.product(columns, rows)}


CONSENSUS = (
    (NORMALIZED, AVERAGE),
    *over(AVERAGE, NORMALIZED, EQUAL, rows=(ADACONS,)),
    (LONG, AVERAGE),
    (WORKERS_ONLY, NORMALIZED),
    (WORKERS_ONLY, ADACONS),
)
LEADS = (
    (NORMALIZED, AVERAGE),
    (CURVATURE, AVERAGE),
    (CURVATURE, CLIPPED),
    (CURVATURE, QUICK_ADAM),
    (CURVATURE, NORMALIZED),
    (CURVATURE, PAST_ONLY),
    (PAST_ONLY, NORMALIZED),
    (WORKERS_ONLY, NORMALIZED),
    (ADACONS, AVERAGE),
)


def clipped(plain: Setting) -> tuple[Setting, ...]:
    """The average, clipped at one of four thresholds."""
    usual = USUAL[plain.task.split()[0]]
    return tuple(replace(plain, clip="after", threshold=usual / 2**power) for power in range(4))


def aggregators(task: str) -> Grid:
    """Every aggregator, and what an average can be tuned to be, on healthy workers; ten seeds."""
    rows = (AVERAGE, NORMALIZED, ADACONS, WORKERS_ONLY, PAST_ONLY, CURVATURE)
    found = cells(rows, OPTIMIZERS, lambda name, optimizer: Setting(task, name, optimizer, batch=TASKS[task]))
    for optimizer in OPTIMIZERS:
        plain = Setting(task, AVERAGE, optimizer, batch=TASKS[task])
        found[CLIPPED, optimizer] = clipped(plain)
        if optimizer == "Adam":
            found[QUICK_ADAM, optimizer] = tuple(replace(plain, beta2=beta2) for beta2 in (0.9, 0.99, 0.999))
    return Grid(f"aggregators, {task}", found, LEADS, 10, seeds=tuple(range(10)))


def longer(task: str) -> Grid:
    """Four times the steps."""
    rows = (AVERAGE, NORMALIZED, PAST_ONLY, CURVATURE)
    found: Cells = {}
    for optimizer in reversed(OPTIMIZERS):
        plain = Setting(task, AVERAGE, optimizer, batch=TASKS[task], steps=800)
        found |= {(name, optimizer): (replace(plain, contender=name),) for name in rows}
        found[CLIPPED, optimizer] = clipped(plain)
    return Grid(f"longer, {task}", found, LEADS, 20)


def sizes(task: str, optimizer: str, minutes: int) -> Grid:
    """The same data, and models of more parameters; 8 workers, so that memory holds their gradients."""
    batch = {"images": 64, "language": 4}[task]
    rows = (AVERAGE, NORMALIZED, PAST_ONLY, CURVATURE)

    smallest = {"images": "17k", "language": "19k"}[task]

    def setting(name: str, size: str) -> Setting:
        return Setting(task if size == smallest else f"{task} {size}", name, optimizer, 8, batch)

    return Grid(f"size, {task}, {optimizer}", cells(rows, (smallest, "100k", "1M"), setting), LEADS, minutes)


def sizes_of_many() -> Grid:
    """Again with as many workers as the other studies have."""
    rows = (AVERAGE, NORMALIZED, CURVATURE)
    found = cells(rows, ("100k", "1M"), lambda name, size: Setting(f"images {size}", name, "Adam"))
    return Grid("size with 32 workers, images, Adam", found, LEADS, 60)


def largest(task: str) -> Grid:
    """Ten million parameters, for as many steps as elsewhere and for five times as many; wants a GPU."""
    rows, batch = (AVERAGE, NORMALIZED, PAST_ONLY, CURVATURE), {"images": 64, "language": 4}[task]

    def setting(name: str, steps: str) -> Setting:
        return Setting(f"{task} 10M", name, "Adam", 8, batch, int(steps.split()[0].replace(",", "")))

    return Grid(f"largest, {task}, Adam", cells(rows, ("200 steps", "1,000 steps"), setting), LEADS, 75)


def sweep(task: str) -> Grid:
    """Damping at a memory of 8, and memory at a damping of 1."""
    rows = [AVERAGE, NORMALIZED, CURVATURE, *(f"{CURVATURE}, damping {damping:g}" for damping in DAMPINGS)]
    rows += [WORKERS_ONLY, *(f"{CURVATURE}, memory {memory}" for memory in MEMORIES)]
    return Grid(
        f"damping and memory, {task}",
        cells(rows, ("Adam",), lambda name, optimizer: Setting(task, name, optimizer, batch=TASKS[task])),
        over(NORMALIZED, CURVATURE, rows=[row for row in rows if row.startswith(CURVATURE)]),
        6,
    )


def schedules(task: str, optimizer: str) -> Grid:
    rows = (AVERAGE, NORMALIZED, AGREEING, PAST_ONLY, CURVATURE, AGREEING_CURVATURE, ADACONS)

    def setting(name: str, schedule: str) -> Setting:
        return Setting(task, name, optimizer, batch=TASKS[task], schedule=schedule)

    pairs = (*LEADS, (AGREEING, AVERAGE), (AGREEING_CURVATURE, AVERAGE), (AGREEING_CURVATURE, AGREEING))
    return Grid(f"schedule, {task}, {optimizer}", cells(rows, ("linear", "cosine", "constant"), setting), pairs, 8)


def workers(optimizer: str) -> Grid:
    rows = (AVERAGE, NORMALIZED, PAST_ONLY, CURVATURE)
    return Grid(
        f"workers, {optimizer}",
        cells(rows, ("4", "8", "32", "128"), lambda name, count: Setting("images", name, optimizer, int(count))),
        LEADS,
        8,
    )


def optimizers(task: str) -> Grid:
    """Optimizers that a user would rather change to: weight decay tuned, and what Curvature adds to each of them."""
    rows = (AVERAGE, NORMALIZED, CURVATURE)
    decays = {"Adam": (0.0,), "AdamW": (0.01, 0.1, 1.0), "Muon": (0.0, 0.1, 1.0)}
    found = {
        (name, optimizer): tuple(Setting(task, name, optimizer, batch=TASKS[task], decay=decay) for decay in tried)
        for optimizer, tried in decays.items()
        for name in rows
    }
    return Grid(f"optimizers, {task}", found, LEADS, 12)


def ablation(task: str, *sizes: tuple[int, int], optimizers: tuple[str, ...] = OPTIMIZERS) -> list[Grid]:
    def grid(workers: int, batch: int) -> Grid:
        found = cells(ABLATION, optimizers, lambda name, optimizer: Setting(task, name, optimizer, workers, batch))
        return Grid(f"ablation, {task}, {workers} x {batch}", found, CONSENSUS, 15)

    return [grid(*size) for size in sizes]


def troubles() -> list[Grid]:
    rows = (AVERAGE, NORMALIZED, PAST_ONLY, CURVATURE, EQUAL, ADACONS, WORKERS_ONLY)
    columns = ("none", "noisy", "half noisy", "skewed", "corrupted", "badly corrupted")
    pairs = (*LEADS, (CURVATURE, EQUAL), *CONSENSUS[2:4])

    def grid(optimizer: str) -> Grid:
        def setting(name: str, trouble: str) -> Setting:
            return Setting("images", name, optimizer, trouble="" if trouble == "none" else trouble)

        return Grid(f"trouble, {optimizer}", cells(rows, columns, setting), pairs, 15)

    return [grid(optimizer) for optimizer in OPTIMIZERS]


def batches() -> list[Grid]:
    def grid(optimizer: str) -> Grid:
        rows, columns = (AVERAGE, NORMALIZED, ADACONS), ("1", "4", "16", "64")
        found = cells(rows, columns, lambda name, batch: Setting("images", name, optimizer, batch=int(batch)))
        return Grid(f"batch, {optimizer}", found, CONSENSUS, 8)

    return [grid(optimizer) for optimizer in OPTIMIZERS]


def clipping() -> list[Grid]:
    """Thresholds are about half the length of a worker's gradient, and of the average, in mid-training."""
    grids = []
    for optimizer in OPTIMIZERS:
        found: Cells = {}
        for name in (AVERAGE, LONG):
            plain = Setting("images", name, optimizer)
            found[name, "none"] = (plain,)
            found[name, "before"] = (replace(plain, clip="before", threshold=0.5),)
            found[name, "after"] = (replace(plain, clip="after", threshold=0.125),)
        grids.append(Grid(f"clipping, {optimizer}", found, CONSENSUS, 5))
    return grids


def own_part(task: str) -> Grid:
    """AdaCons with and without a gradient's agreement with itself."""
    rows = (EQUAL, ADACONS, OTHERS)
    return Grid(
        f"own part, {task}",
        cells(rows, OPTIMIZERS, lambda name, optimizer: Setting(task, name, optimizer, batch=TASKS[task])),
        ((ADACONS, EQUAL), (OTHERS, ADACONS)),
        5,
    )


def demo() -> Grid:
    """What ``examples/demo.py`` shows on real ranks, and the rates that it has from here."""
    rows = (AVERAGE, ADACONS, CURVATURE)
    return Grid(
        "demo", cells(rows, ("SGD",), lambda name, optimizer: Setting("images", name, optimizer, 4, 128)), LEADS, 5
    )


def grids(quick: bool = False) -> list[Grid]:
    """All of them, those that decide most first; ``quick`` with runs that only show that everything works."""
    found = [
        *(aggregators(task) for task in TASKS),
        sizes("images", "Adam", 20),
        sizes("images", "SGD", 20),
        sizes("language", "Adam", 45),
        sizes_of_many(),
        *(longer(task) for task in TASKS),
        *(sweep(task) for task in TASKS),
        *(schedules(task, optimizer) for task in ("images", "language") for optimizer in OPTIMIZERS),
        *(workers(optimizer) for optimizer in OPTIMIZERS),
        *(optimizers(task) for task in TASKS),
        *troubles(),
        demo(),
        *(largest(task) for task in ("images", "language")),
        *ablation("images", (8, 64), (32, 64)),
        *ablation("images", (128, 16), optimizers=("SGD",)),
        *ablation("recommender", (32, 64)),
        *ablation("language", (32, 2)),
        *clipping(),
        *batches(),
        *(own_part(task) for task in TASKS),
    ]
    if not quick:
        return found
    return [replace(grid, cells={key: _quick(cell) for key, cell in grid.cells.items()}) for grid in found]


def _quick(settings: tuple[Setting, ...]) -> tuple[Setting, ...]:
    return tuple(replace(setting, workers=8, batch=2, steps=5) for setting in settings)
