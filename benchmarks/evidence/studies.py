"""The studies are grids of settings, each a table of ``docs/evidence.md``."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .contenders import ADACONS, AVERAGE, EQUAL, HEAVY, LIGHT, LONG, NEWTON, NORMALIZED, OTHERS
from .training import Setting

OPTIMIZERS = ("SGD", "Adam")
ABLATION = (AVERAGE, NORMALIZED, EQUAL, "basic", "momentum", "normalization", ADACONS, LONG, NEWTON)
VARIANTS = (NORMALIZED, EQUAL, ADACONS, OTHERS, LIGHT, NEWTON, HEAVY)


@dataclass(frozen=True)
class Grid:
    """One table: a row for every row's name, a column for every column's."""

    title: str
    cells: dict[tuple[str, str], Setting]
    #: The rows that the others are compared with, run by run.
    controls: tuple[str, ...] = (AVERAGE, NORMALIZED)


def ablation(task: str, *sizes: tuple[int, int], optimizers: tuple[str, ...] = OPTIMIZERS) -> list[Grid]:
    return [
        Grid(
            f"ablation, {task}, {workers} x {batch}",
            {
                (name, optimizer): Setting(task, name, optimizer, workers, batch)
                for name in ABLATION
                for optimizer in optimizers
            },
            (AVERAGE, NORMALIZED, EQUAL),
        )
        for workers, batch in sizes
    ]


def troubles() -> list[Grid]:
    return [
        Grid(
            f"trouble, {optimizer}",
            {
                (name, trouble or "none"): Setting("images", name, optimizer, trouble=trouble)
                for name in (AVERAGE, NORMALIZED, EQUAL, ADACONS, NEWTON)
                for trouble in ("", "noisy", "half noisy", "skewed", "corrupted", "badly corrupted")
            },
            (AVERAGE, NORMALIZED, EQUAL),
        )
        for optimizer in OPTIMIZERS
    ]


def batches() -> list[Grid]:
    return [
        Grid(
            f"batch, {optimizer}",
            {
                (name, str(batch)): Setting("images", name, optimizer, batch=batch)
                for name in (AVERAGE, NORMALIZED, ADACONS)
                for batch in (1, 4, 16, 64)
            },
        )
        for optimizer in OPTIMIZERS
    ]


def lengths() -> list[Grid]:
    """Show how the differences change when training goes on, or at a constant rate."""
    columns = {
        "200 steps": Setting("images", AVERAGE),
        "800 steps": Setting("images", AVERAGE, steps=800),
        "200 steps, constant rate": Setting("images", AVERAGE, falls=False),
    }
    rows = (AVERAGE, NORMALIZED, EQUAL, ADACONS, NEWTON)
    return [
        Grid(
            "training length, SGD",
            {(name, column): replace(plain, contender=name) for name in rows for column, plain in columns.items()},
            (AVERAGE, NORMALIZED, EQUAL),
        )
    ]


def clipping() -> list[Grid]:
    """Thresholds are about half the length of a worker's gradient, and of the average, in mid-training."""
    grids = []
    for optimizer in OPTIMIZERS:
        cells = {}
        for name in (AVERAGE, LONG):
            plain = Setting("images", name, optimizer)
            cells[name, "none"] = plain
            cells[name, "before"] = replace(plain, clip="before", threshold=0.5)
            cells[name, "after"] = replace(plain, clip="after", threshold=0.125)
        grids.append(Grid(f"clipping, {optimizer}", cells, (AVERAGE,)))
    return grids


def variants() -> list[Grid]:
    return [
        Grid(
            f"variants, {task}",
            {
                (name, optimizer): Setting(task, name, optimizer, batch=batch)
                for name in VARIANTS
                for optimizer in OPTIMIZERS
            },
            (NORMALIZED, EQUAL),
        )
        for task, batch in (("images", 64), ("recommender", 64), ("language", 2))
    ]


def grids(quick: bool = False) -> list[Grid]:
    """All of them; ``quick`` with runs so short that they show only that everything works."""
    found = [
        *ablation("images", (8, 64), (32, 64)),
        *ablation("images", (128, 16), optimizers=("SGD",)),
        *troubles(),
        *ablation("recommender", (32, 64)),
        *ablation("language", (32, 2)),
        *clipping(),
        *batches(),
        *lengths(),
        *variants(),
    ]
    if not quick:
        return found
    return [
        replace(grid, cells={key: replace(cell, workers=8, batch=2, steps=5) for key, cell in grid.cells.items()})
        for grid in found
    ]
