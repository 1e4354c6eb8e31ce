"""Which gradients travel together, in which order, and where each one starts: arithmetic, without any tensor.

The plan is the same on every rank, because it is computed from what all ranks have agreed on: the parameters in order,
their types and sizes, and which of them have sparse gradients.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from ..schedules import Segment

__all__ = ["BucketPlan", "Item", "group_parameters", "plan_buckets", "segments", "shared_buckets"]

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Item:
    """One gradient, as far as it matters to how it travels."""

    key: Hashable
    #: How many real numbers the gradient consists of.
    length: int
    #: The group of parameters whose weights it shares.
    group: int
    #: Gradients of one bucket have this in common: the element type, and the device if there are several.
    kind: Hashable
    #: Bytes that one number takes in a bucket.
    width: int
    #: How many numbers a row has, where few rows are not zero, so that only those travel; None where all travel.
    row_length: int | None = None


@dataclass(frozen=True)
class BucketPlan:
    """The items of one bucket, by their positions, in the order in which they lie in it."""

    positions: tuple[int, ...]
    sparse: bool = False


def plan_buckets(
    items: Sequence[Item], bucket_bytes: int, together: Sequence[Sequence[Hashable]] | None = None
) -> list[BucketPlan]:
    """Distribute items over buckets, each as soon as it is full.

    Backward computes the last layers' gradients first, so buckets are filled from the end: the first to be complete is
    the first to leave. Sparse gradients with rows of one length and one group share a bucket, whatever its size; one
    without any element has none. ``together`` lists the keys of items that share a bucket, whatever its size, as
    Horovod's ``groups`` does; the rest then travel alone.

    >>> items = [Item(name, 3, 0, "float32", 4) for name in "abcd"]
    >>> [plan.positions for plan in plan_buckets(items, bucket_bytes=24)]
    [(3, 2), (1, 0)]
    >>> [plan.positions for plan in plan_buckets(items, 24, together=[["a", "d"]])]
    [(3, 0), (2,), (1,)]
    """
    plans: list[BucketPlan] = []
    # By whether they are sparse, and by what gradients of one bucket have in common.
    filling: dict[tuple[bool, Hashable], list[int]] = {}
    sizes: dict[Hashable, int] = {}
    place = {key: number for number, group in enumerate(together or ()) for key in group}
    for position in reversed(range(len(items))):
        item = items[position]
        if item.length == 0:
            continue
        sparse = item.row_length is not None
        kind: tuple[Hashable, ...] = (item.kind, item.row_length, item.group) if sparse else (item.kind,)
        if together is not None:
            kind = (*kind, place.get(item.key, ("alone", position)))
        filling.setdefault((sparse, kind), []).append(position)
        sizes[kind] = sizes.get(kind, 0) + item.length * item.width
        if not sparse and together is None and sizes[kind] >= bucket_bytes:
            sizes[kind] = 0
            plans.append(BucketPlan(tuple(filling.pop((sparse, kind)))))
    return plans + [BucketPlan(tuple(positions), sparse) for (sparse, _), positions in filling.items()]


def shared_buckets(groups: int | Sequence[Sequence[Key]] | None, keys: Sequence[Key]) -> list[list[Key]] | None:
    """Horovod's ``groups`` as lists of keys; None where buckets are filled by their size.

    >>> shared_buckets(2, ["a", "b", "c"])
    [['a'], ['b', 'c']]
    """
    if groups is None or groups == 0:
        return None
    if isinstance(groups, int):
        count = min(groups, len(keys))
        bounds = [len(keys) * k // count for k in range(count + 1)] if count else [0]
        return [list(keys[start:stop]) for start, stop in pairwise(bounds)]
    return [list(group) for group in groups]


def group_parameters(
    granularity: str | Sequence[Sequence[Key]], parameters: Sequence[Key]
) -> tuple[dict[Key, int], int]:
    """The group of every parameter, and the number of groups.

    >>> group_parameters("layer", ["weight", "bias"])
    ({'weight': 0, 'bias': 1}, 2)
    >>> group_parameters([["bias"]], ["weight", "bias"])
    ({'weight': 1, 'bias': 0}, 2)
    """
    if granularity == "model":
        return dict.fromkeys(parameters, 0), 1
    if granularity == "layer":
        return {p: i for i, p in enumerate(parameters)}, max(len(parameters), 1)
    assert not isinstance(granularity, str)
    group_of = {p: i for i, group in enumerate(granularity) for p in group}
    rest = len(granularity)
    has_rest = any(p not in group_of for p in parameters)
    return {p: group_of.get(p, rest) for p in parameters}, rest + has_rest


def segments(parts: Iterable[tuple[int, int]]) -> list[Segment]:
    """The segments of a flat buffer in which parts of given ``(length, group)`` lie side by side.

    None is empty: there would be nothing to compute of it.

    >>> segments([(3, 0), (2, 0), (0, 2), (4, 1)])
    [Segment(start=0, stop=5, group=0), Segment(start=5, stop=9, group=1)]
    """
    found: list[Segment] = []
    stop = 0
    for length, group in parts:
        start, stop = stop, stop + length
        if found and found[-1].group == group:
            found[-1] = found[-1]._replace(stop=stop)
        elif length:
            found.append(Segment(start, stop, group))
    return found
