"""A live view of a run that is logged: loss, noise scale, each rank's agreement, schedule and fallbacks."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

from .display import console, show_json
from .errors import CommandError
from .plot import Record, read_log

__all__ = ["add_arguments", "run"]

#: How many of the last records a curve shows.
_SHOWN = 60
_BARS = "▁▂▃▄▅▆▇█"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("log", type=Path, help="a file written by adacons_hvd.logging, such as run.jsonl")
    parser.add_argument("--group", type=int, default=0, help="which group of parameters (default: 0, the first)")
    parser.add_argument("--every", type=float, default=1.0, metavar="S", help="seconds from look to look (1)")
    parser.add_argument("--once", action="store_true", help="show the run as it is now, and end")


def run(options: argparse.Namespace) -> int:
    if not options.every > 0:
        raise CommandError(f"--every must be positive, not {options.every}")
    if options.json:
        show_json(summary(_read(options), options.group))
        return 0
    screen = console(False)
    records = _read(options)
    if options.once:
        screen.print(view(records, options.group))
        return 0
    from rich.live import Live

    size = options.log.stat().st_size
    with Live(view(records, options.group), console=screen, auto_refresh=False) as live:
        while True:
            time.sleep(options.every)
            if options.log.exists() and options.log.stat().st_size != size:
                size = options.log.stat().st_size
                live.update(view(_read(options), options.group), refresh=True)


def _read(options: argparse.Namespace) -> list[Record]:
    records = read_log(options.log)
    if not 0 <= options.group < len(records[-1]["weights"]):
        groups = len(records[-1]["weights"])
        raise CommandError(f"--group must be from 0 to {groups - 1} for this log, not {options.group}")
    return records


def summary(records: list[Record], group: int) -> Record:
    """The last record's numbers of a group; None for what the log does not have."""
    last = records[-1]
    return {
        "step": last["steps"],
        "loss": last.get("loss"),
        "noise_scale": _of(last, "noise_scale", group),
        "adascale_gain": _of(last, "adascale_gain", group),
        "agreement": _of(last, "agreement", group) or [],
        "norms": last["norms"][group],
        "sick": last.get("sick", []),
        "schedule": last["schedule"],
        "fallbacks": last["fallbacks"],
    }


def view(records: list[Record], group: int) -> Any:
    """The run on a screen."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    now = summary(records, group)
    shown = records[-_SHOWN:]
    top = Table.grid(padding=(0, 2))
    top.add_row("step", Text(f"{now['step']}, by {now['schedule']}, {now['fallbacks']} fallbacks to the average"))
    for name, title in (("loss", "loss"), ("noise_scale", "noise scale"), ("adascale_gain", "AdaScale's gain")):
        if now[name] is not None:
            values = [record.get(name) if name == "loss" else _of(record, name, group) for record in shown]
            top.add_row(title, Text(f"{now[name]:.4g}"), Text(curve(values)))
    ranks = Table("rank", "agreement", "", "length", "")
    for rank, norm in enumerate(now["norms"]):
        sick = rank in now["sick"]
        past = [(_of(record, "agreement", group) or []) for record in shown]
        agreement = now["agreement"][rank] if rank < len(now["agreement"]) else None
        ranks.add_row(
            str(rank),
            "-" if agreement is None else f"{agreement:.3f}",
            Text(curve([row[rank] if rank < len(row) else None for row in past], -1, 1)),
            "-" if norm is None else f"{norm:.4g}",
            "sick" if sick else "",
            style="red" if sick else None,
        )
    return Group(top, ranks)


def curve(values: list[float | None], low: float | None = None, high: float | None = None) -> str:
    """A line of bars, and spaces for what is not known.

    >>> curve([0.0, 1.0, None, 2.0])
    '▁▄ █'
    """
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return " " * len(values)
    low, high = min(known) if low is None else low, max(known) if high is None else high
    height = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(
        " "
        if value is None or not math.isfinite(value)
        else _BARS[min(max(int((value - low) * height), 0), len(_BARS) - 1)]
        for value in values
    )


def _of(record: Record, name: str, group: int) -> Any:
    values = record.get(name)
    return None if values is None or group >= len(values) else values[group]
