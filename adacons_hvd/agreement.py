"""Finding out that ranks differ, before they act on it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from .collectives import Collectives

__all__ = ["DisagreementError", "by_ranks", "confirm", "digest"]


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
    # A rank without an aggregator describes nothing else; that it lacks the rest would only repeat it.
    given = {rank: description[key] for rank, description in enumerate(descriptions) if key in description}
    values = list(given.values())
    if all(value == values[0] for value in values):
        return []
    if all(isinstance(value, list) for value in values):
        return [_first_difference(key, given)]
    return [f"{key}: {_values(given)}"]


def _first_difference(key: str, lists: Mapping[int, Sequence[Any]]) -> str:
    longest = max(len(items) for items in lists.values())
    for index in range(longest):
        here = {rank: items[index] if index < len(items) else "none" for rank, items in lists.items()}
        if len(set(map(str, here.values()))) > 1:
            return f"{key}, first difference at number {index}: {_values(here)}"
    return key


def _values(values: Mapping[int, Any]) -> str:
    ranks: dict[str, list[int]] = {}
    for rank, value in values.items():
        text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        ranks.setdefault(text, []).append(rank)
    return "; ".join(f"{value} on {by_ranks(some)}" for value, some in ranks.items())


def by_ranks(ranks: Sequence[int]) -> str:
    """Name some ranks.

    >>> by_ranks([0, 1, 2, 5]), by_ranks([3])
    ('ranks 0-2, 5', 'rank 3')
    """
    return f"rank{'s' if len(ranks) > 1 else ''} {_shorten(ranks)}"


def _shorten(ranks: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
