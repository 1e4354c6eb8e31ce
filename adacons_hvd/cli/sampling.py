"""Batches of any size for any simulated worker, from whatever kind of data a user has."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from .errors import CommandError

__all__ = ["Framework", "map_leaves", "sampler_of"]

Batch = Any


class Framework(Protocol):
    """The parts of making batches that differ between frameworks."""

    #: Makes a batch of samples; None where data sets with a length hold batches, not samples.
    collate: Callable[[list[Any]], Batch] | None

    def join(self, tensors: list[Any]) -> Any:
        """Concatenate along the first axis."""
        ...


def sampler_of(data: Any, framework: Framework, seed: int) -> Callable[[int, int], Batch]:
    """A function of (worker, size) that returns a batch.

    Simulated workers draw at random from the same data, except where ``data`` is such a function
    itself.
    """
    chance = random.Random(seed)
    indexed = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    if isinstance(data, (tuple, dict)) and (rows := _rows(data)):
        return lambda worker, size: _pick(data, _choose(chance, rows, size))
    if isinstance(data, Iterable) or indexed:
        if indexed and not isinstance(data, (list, tuple, dict)):
            if framework.collate is not None:
                collate = framework.collate
                return lambda worker, size: collate([data[i] for i in _choose(chance, len(data), size)])
            data = [data[i] for i in range(len(data))]
        stream = _Stream(data, framework)
        return lambda worker, size: stream.take(size)
    if callable(data):
        return lambda worker, size: data(worker, size)
    raise CommandError(
        f"the data, a {type(data).__name__}, is none of: a tuple or dict of tensors with one row a sample, "
        "a data set with a length, an iterable of batches, a function of (worker, size)"
    )


def _choose(chance: random.Random, rows: int, size: int) -> list[int]:
    if size > rows:
        raise CommandError(f"a batch of {size} was asked for and the data has {rows} samples; give smaller batches")
    return chance.sample(range(rows), size)


class _Stream:
    """Batches of any size cut from batches of the user's size."""

    def __init__(self, batches: Iterable[Batch], framework: Framework) -> None:
        self.batches = batches
        self.framework = framework
        self.iterator: Iterator[Batch] = iter(batches)
        self.rest: list[Batch] = []

    def take(self, size: int) -> Batch:
        parts, rows = self.rest, sum(_rows(part) for part in self.rest)
        while rows < size:
            parts.append(self._next())
            rows += _rows(parts[-1])
        whole = map_leaves(lambda *leaves: self.framework.join(list(leaves)), *parts)
        self.rest = [_pick(whole, slice(size, None))] if rows > size else []
        return _pick(whole, slice(0, size))

    def _next(self) -> Batch:
        batch = next(self.iterator, None)
        if batch is None:
            self.iterator = iter(self.batches)
            batch = next(self.iterator, None)
        if batch is None:
            raise CommandError("the data ran out of batches; make it longer, or something that can be iterated again")
        if not _rows(batch):
            raise CommandError("a batch of the data is neither a tensor nor a tuple, list or dict of tensors")
        return batch


# --- batches are tensors, or tuples, lists and dicts of them -----------------------------------------


def map_leaves(function: Callable[..., Any], first: Batch, *others: Batch) -> Batch:
    """Apply a function to the tensors at the same place of all batches.

    >>> map_leaves(lambda a, b: a + b, {"x": 1, "y": (2, 3)}, {"x": 10, "y": (20, 30)})
    {'x': 11, 'y': (22, 33)}
    """
    if isinstance(first, dict):
        return {key: map_leaves(function, first[key], *(other[key] for other in others)) for key in first}
    if isinstance(first, (tuple, list)):
        return type(first)(map_leaves(function, *parts) for parts in zip(first, *others, strict=True))
    return function(first, *others)


def _pick(batch: Batch, rows: Any) -> Batch:
    return map_leaves(lambda leaf: leaf[rows], batch)


def _rows(batch: Batch) -> int:
    """How many samples a batch has; 0 if it is none."""
    found: set[int] = set()

    def look(leaf: Any) -> None:
        shape = tuple(getattr(leaf, "shape", ()))
        found.add(int(shape[0]) if shape else 0)

    map_leaves(look, batch)
    return found.pop() if len(found) == 1 else 0
