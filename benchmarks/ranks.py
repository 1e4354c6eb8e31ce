"""What every rank of a benchmark does: time contenders in turn, and hand over the times.

A contender is a function that does one step. All ranks start together, and a step takes as long as
it takes the slowest. Contenders take turns, so that what else happens on the machine happens to
all of them, and what counts is each turn's ratio to the first of them, the peer.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch


def arguments() -> tuple[dict[str, Any], Path]:
    """The case to run, and where rank 0 leaves its results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case", help="a JSON object")
    parser.add_argument("results", type=Path)
    args = parser.parse_args()
    return json.loads(args.case), args.results


def take_turns(contenders: Mapping[str, Callable[[], object]], turns: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of every turn, the slowest rank's, by contender.

    Each contender first has two turns that do not count. ``seconds`` is about how long all turns
    may take; there are three at least.
    """
    for once in contenders.values():
        _timed(once)
    expected = sum(_together([_timed(once) for once in contenders.values()]))
    turns = max(3, min(turns, int(seconds / max(expected, 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for turn in range(turns):
        # Nobody always comes after the same one.
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            times[name].append(_timed(contenders[name]))
    return {name: _together(own) for name, own in times.items()}


def _timed(once: Callable[[], object]) -> float:
    hvd.barrier()
    start = time.perf_counter()
    once()
    return time.perf_counter() - start


def _together(own: list[float]) -> list[float]:
    """The slowest rank's times."""
    everyone = hvd.allgather(torch.tensor([own], dtype=torch.float64), name="benchmark.times")
    return everyone.max(0).values.tolist()


def hand_over(results: Path, value: object) -> None:
    if hvd.rank() == 0:
        results.write_text(json.dumps(value), encoding="utf-8")
