"""Run the studies, or those whose title holds an ``--only``, and print the tables of ``docs/evidence.md``.

Every finished run is remembered in ``--out``, so that an interrupted study goes on where it was. ``--report`` runs
nothing: it puts what the records there hold into ``benchmarks/results/evidence.json``, of which it makes the page.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import torch
from rich.console import Console

from . import linear, page, report, spread
from .search import CHOOSING, Finished, Record, Shared, UnfinishedError, choose
from .studies import Grid, grids
from .training import Setting

DOCS = Path(__file__).parents[2] / "docs"


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    # One thread, for figures that do not depend on how many there are.
    torch.set_num_threads(1)
    console = Console(soft_wrap=True)
    wanted = [grid for only in args.only or [""] for grid in asked(only, grids(args.quick))]
    if args.plan:
        console.print(plan(wanted), markup=False)
        return 0
    if args.report:
        studies = page.merged(page.collected(wanted, Finished(sorted(args.out.glob("*.json")))), args.results)
        page.write(studies, args.results, args.page)
        console.print(*(page.tables(study) for study in studies.values()), sep="\n", markup=False)
        return 0
    if args.processes > 1:
        together(wanted, args.out / f"{args.record}.json", args.processes, args.device, 60 * args.minutes)
        return 0
    pictures = args.pictures or (args.out if args.quick else DOCS)
    args.out.mkdir(parents=True, exist_ok=True)
    pictures.mkdir(parents=True, exist_ok=True)
    record = Record(args.out / ("quick.json" if args.quick else f"{args.record}.json"))
    if any(only in "regression" for only in args.only or [""]):
        batches, seeds = ((128,), (0, 1)) if args.quick else (linear.BATCHES, linear.SEEDS)
        with console.status("regression"):
            losses = linear.measured(record, batches, seeds)
        console.print(f"regression\n\n{report.regression(losses)}\n{report.ends(losses)}", markup=False)
        report.draw_regression(losses, pictures / "evidence-regression.png")
    if any(only in "spread" for only in args.only or [""]):
        with console.status("spread of the weights"):
            found = spread.measured(record, *(((1, 4), (8,)) if args.quick else ()))
        console.print(f"spread of the weights\n\n{report.spreads(found)}", markup=False)
        if not args.quick:
            report.draw_spreads(found, pictures / "evidence-spread.png")
    for grid in wanted:
        choosing, reported = ((100,), (0, 1)) if args.quick else (CHOOSING, grid.seeds)
        with console.status(grid.title):
            run(grid, record, choosing, reported)
        console.print(page.tables(page.study(grid, Finished([record.path]), choosing, reported)), markup=False)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only", action="append", help="only studies whose title holds this, or a column: TITLE@COLUMN"
    )
    parser.add_argument("--processes", type=int, default=1, help="how many runs at a time; prints nothing")
    parser.add_argument("--device", default="cpu", help="where those train models of a million parameters and more")
    parser.add_argument("--minutes", type=float, default=600, help="after which those begin no other run")
    parser.add_argument("--plan", action="store_true", help="only say which studies there are, with their budgets")
    parser.add_argument("--quick", action="store_true", help="a few steps and seeds: that it runs, not what it finds")
    parser.add_argument("--report", action="store_true", help="only make the page, of what is recorded")
    parser.add_argument("--out", type=Path, default=Path("out/evidence"), help="where runs are remembered")
    parser.add_argument("--record", default="runs", help="the record's name there: one for each process at a time")
    parser.add_argument("--pictures", type=Path, help="where pictures go; docs unless --quick")
    parser.add_argument("--results", type=Path, default=page.RESULTS, help="the data of the page")
    parser.add_argument("--page", type=Path, default=DOCS / "evidence.md", help="where the page goes")
    return parser.parse_args(arguments)


def asked(only: str, every: Sequence[Grid]) -> list[Grid]:
    """The studies that an ``--only`` asks for."""
    title, _, column = only.partition("@")
    found = [grid for grid in every if title in grid.title]
    return [grid.of(column) for grid in found if column in grid.columns] if column else found


def plan(wanted: Sequence[Grid]) -> str:
    lines = [f"{grid.minutes:4} min  {grid.title}" for grid in wanted]
    return "\n".join([*lines, f"{sum(grid.minutes for grid in wanted):4} min of one core at most"])


def run(grid: Grid, record: Record, choosing: Sequence[int], reported: Sequence[int]) -> None:
    """Run a study column by column, until it is done or its budget is spent.

    Seeds are the outer loop, so that every method has as many when the budget ends.
    """
    end = time.process_time() + 60 * grid.minutes
    for column in grid.columns:
        chosen = []
        for (_, place), settings in grid.cells.items():
            if time.process_time() > end:
                return
            if place == column:
                chosen.append(choose(record, settings, choosing))
        for seed in reported:
            for setting, rate in chosen:
                if time.process_time() > end:
                    return
                record.score(setting, rate, seed, final=True)


def together(wanted: Sequence[Grid], path: Path, processes: int, device: str, seconds: float) -> None:
    """Run the cells of studies side by side, in the order of the studies."""
    context = multiprocessing.get_context("spawn")
    one_thread = functools.partial(torch.set_num_threads, 1)
    # A cell asks for six runs at a time.
    cells = max(2, processes // 3)
    with ProcessPoolExecutor(processes, context, one_thread) as workers, ThreadPoolExecutor(cells) as threads:
        record = Shared(path, workers, device, seconds)

        def cell(settings: Sequence[Setting], seeds: Sequence[int]) -> None:
            try:
                setting, rate = choose(record, settings)
                record.expect(setting, [rate], seeds, final=True)
                for seed in seeds:
                    record.score(setting, rate, seed, final=True)
            except UnfinishedError:
                pass

        begun = [threads.submit(cell, settings, grid.seeds) for grid in wanted for settings in grid.cells.values()]
        for one in begun:
            one.result()
        workers.shutdown(cancel_futures=True)


if __name__ == "__main__":
    sys.exit(main())
