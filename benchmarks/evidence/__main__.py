"""Run the studies, or those whose title holds ``--only``, and print the tables of ``docs/evidence.md``.

Every finished run is remembered in ``--out``, so that an interrupted study goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from . import linear, report, spread
from .search import CHOOSING, REPORTED, Record, Result, measure
from .studies import grids

DOCS = Path(__file__).parents[2] / "docs"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="only studies whose title holds this")
    parser.add_argument("--quick", action="store_true", help="a few steps and seeds: that it runs, not what it finds")
    parser.add_argument("--out", type=Path, default=Path("out/evidence"), help="where runs are remembered")
    parser.add_argument("--pictures", type=Path, help="where pictures go; docs unless --quick")
    args = parser.parse_args(arguments)
    # One thread, for figures that do not depend on how many there are.
    torch.set_num_threads(1)
    console = Console(soft_wrap=True)
    pictures = args.pictures or (args.out if args.quick else DOCS)
    args.out.mkdir(parents=True, exist_ok=True)
    pictures.mkdir(parents=True, exist_ok=True)
    record = Record(args.out / ("quick.json" if args.quick else "results.json"))
    if args.only in "regression":
        batches, seeds = ((128,), (0, 1)) if args.quick else (linear.BATCHES, linear.SEEDS)
        with console.status("regression"):
            losses = linear.measured(record, batches, seeds)
        console.print(f"regression\n\n{report.regression(losses)}\n{report.ends(losses)}", markup=False)
        report.draw_regression(losses, pictures / "evidence-regression.png")
    if args.only in "spread":
        with console.status("spread of the weights"):
            found = spread.measured(record, *(((1, 4), (8,)) if args.quick else ()))
        console.print(f"spread of the weights\n\n{report.spreads(found)}", markup=False)
        if not args.quick:
            report.draw_spreads(found, pictures / "evidence-spread.png")
    choosing, reported = ((100,), (0, 1)) if args.quick else (CHOOSING, REPORTED)
    for grid in grids(args.quick):
        if args.only not in grid.title:
            continue
        results: dict[tuple[str, str], Result] = {}
        with Progress(
            TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console, transient=True
        ) as bar:
            work = bar.add_task(grid.title, total=len(grid.cells))
            for key, setting in grid.cells.items():
                bar.update(work, description=str(setting))
                results[key] = measure(record, setting, choosing, reported)
                bar.advance(work)
        console.print(f"{grid.title}\n\n{report.scores(grid, results)}", markup=False)
        console.print(report.differences(grid, results), markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
