"""The command's output on a terminal: tables on standard output, progress on standard error."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .errors import require

__all__ = ["console", "progress", "show_json", "show_table"]


def console(json_wanted: bool) -> Any:
    """A console for the result, or None where JSON is wanted instead, for which rich is not needed."""
    if json_wanted:
        return None
    require("rich", "showing tables (all but --json)")
    from rich.console import Console

    # In a file or a pipe there is no width to fit, and a cut table is of no use.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def show_json(result: Any) -> None:
    print(json.dumps(result, indent=2, allow_nan=False))


def show_table(console: Any, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; columns whose heading ends in a space are aligned to the left."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading.rstrip(), justify="left" if heading.endswith(" ") else "right")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str, int], None]]:
    """A progress bar; yields a function that says what is done now and how much was done before.

    Only on a terminal, and without one if rich is missing.
    """
    if not sys.stderr.isatty():
        yield lambda what, done: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield lambda what, done: None
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda what, done: bar.update(task, description=what, advance=done)
