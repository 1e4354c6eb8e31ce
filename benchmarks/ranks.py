"""Every rank of a benchmark times contenders in turn, and hands over the times.

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
from typing import Any, Protocol


def arguments() -> tuple[dict[str, Any], Path]:
    """The case to run, and where rank 0 leaves its results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case", help="a JSON object")
    parser.add_argument("results", type=Path)
    args = parser.parse_args()
    return json.loads(args.case), args.results


class Group(Protocol):
    """The ranks that are measured together: ``horovod.torch``, for one."""

    def rank(self) -> int: ...
    def barrier(self) -> object: ...
    def allgather_object(self, value: Any) -> list[Any]: ...


def take_turns(
    group: Group, contenders: Mapping[str, Callable[[], object]], turns: int, seconds: float
) -> dict[str, list[float]]:
    """Seconds of every turn, the slowest rank's, by contender.

    Each contender first has two turns that do not count. ``seconds`` is about how long all turns
    may take; there are five at least.
    """
    for once in contenders.values():
        _timed(group, once)
    expected = sum(_together(group, [_timed(group, once) for once in contenders.values()]))
    turns = max(5, min(turns, int(seconds / max(expected, 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for turn in range(turns):
        # Nobody always comes after the same one.
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            times[name].append(_timed(group, contenders[name]))
    return {name: _together(group, own) for name, own in times.items()}


def _timed(group: Group, once: Callable[[], object]) -> float:
    group.barrier()
    start = time.perf_counter()
    once()
    return time.perf_counter() - start


def _together(group: Group, own: list[float]) -> list[float]:
    """The slowest rank's times."""
    return [max(times) for times in zip(*group.allgather_object(own), strict=True)]


def hand_over(group: Group, results: Path, value: object) -> None:
    if group.rank() == 0:
        results.write_text(json.dumps(value), encoding="utf-8")
