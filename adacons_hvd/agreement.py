"""Finding out that ranks differ, before they act on it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from .collectives import Collectives

__all__ = ["DisagreementError", "confirm", "digest"]


class DisagreementError(RuntimeError):
    """Ranks were given different settings or parameters. Raised on all of them alike."""

    # By this TensorFlow's AutoGraph tells that it may add where it happened; else it raises an error of its own.
    __init__ = Exception.__init__


def digest(description: Mapping[str, Any]) -> int:
    """A number that differs if descriptions do; positive, and fits a signed 64-bit integer."""
    text = json.dumps(description, sort_keys=True).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 2


def confirm(collectives: Collectives, description: Mapping[str, Any], name: str) -> None:
    """Exchange descriptions, known to differ, and raise an error that says how."""
    text = json.dumps(description, sort_keys=True).encode()
    descriptions = [json.loads(t) for t in collectives.allgather_bytes(text, f"{name}.differences")]
    lines = [line for key in _keys(descriptions) for line in _difference(key, descriptions)]
    raise DisagreementError(
        "the ranks do not agree on how to aggregate gradients:\n  "
        + "\n  ".join(lines)
        + "\nEvery rank must build the same model and wrap its optimizer with the same arguments."
    )


def _keys(descriptions: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for description in descriptions for key in description))


def _difference(key: str, descriptions: Sequence[Mapping[str, Any]]) -> list[str]:
    values = [description.get(key, "not given") for description in descriptions]
    if all(value == values[0] for value in values):
        return []
    if all(isinstance(value, list) for value in values):
        return [_first_difference(key, values)]
    return [f"{key}: {_by_ranks(values)}"]


def _first_difference(key: str, lists: Sequence[Sequence[Any]]) -> str:
    longest = max(len(items) for items in lists)
    for index in range(longest):
        here = [items[index] if index < len(items) else "none" for items in lists]
        if any(value != here[0] for value in here):
            return f"{key}, first difference at number {index}: {_by_ranks(here)}"
    return key


def _by_ranks(values: Sequence[Any]) -> str:
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        ranks.setdefault(text, []).append(rank)
    return "; ".join(f"{value} on rank{'s' if len(some) > 1 else ''} {_shorten(some)}" for value, some in ranks.items())


def _shorten(ranks: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
