"""The mean gradients of earlier steps, on behalf of one optimizer: who keeps which part, moved, saved and loaded.

An aggregator with a ``history`` of m has the mean gradients of the last m steps kept for it. Schedules keep them by
bucket and, with ``one-pass``, by shard; both change with the layout, with the workers and with the schedule. So a part
that is kept is described by where it lies in the whole gradient, all dense parameters side by side in their order: a
list of *intervals*. By it parts are saved, and found again by whoever is to keep them next.

A state that one rank saves holds the parts of that rank. Ranks that each load their own go on bit for bit. For a state
that any rank, and any number of them, can go on from, all ranks call :meth:`History.gather` before one saves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

from .. import agreement
from ..aggregators.checkpoint import MEANS
from ..collectives import Collectives
from ..ops import Tensor, ops_for
from ..schedules import Schedule

__all__ = ["History", "Interval", "Keeper", "Place", "divide", "intervals_of"]


class Interval(NamedTuple):
    """The elements ``start`` to ``stop`` of the whole gradient."""

    start: int
    stop: int


class Part(NamedTuple):
    """The mean gradients of some intervals, side by side: ``[m, n]``."""

    intervals: list[Interval]
    rows: Tensor


class Keeper(Protocol):
    """What keeps the mean gradients of a bucket's elements: the bucket itself, or what outlives it."""

    #: The bucket's, in elements, padding included.
    length: int
    schedule: Schedule
    #: The rows that ``ops.past_room`` has made, for the elements that :meth:`Schedule.kept` says.
    past: Tensor


class Place(NamedTuple):
    """Where a bucket's elements lie in the whole gradient, in the order in which they lie in the bucket."""

    bucket: Keeper
    intervals: list[Interval]


class History:
    """The mean gradients of earlier steps for one optimizer, as far as this rank keeps them."""

    def __init__(self) -> None:
        #: Stands for the parameters whose gradients these are, and how many numbers they have.
        self._parameters, self._size = 0, 0
        #: Where this rank's parts are while there is a layout.
        self._places: list[Place] = []
        #: The parts there are while there is none.
        self._parts: list[Part] = []
        #: All of it, from when it was gathered until the next step.
        self._whole: list[Part] = []

    # --- from one layout to the next ------------------------------------------------------------

    def suspend(self) -> None:
        """Take the parts out of a layout that is about to go."""
        self._parts, self._whole, self._places = self._whole or self._held(), [], []

    def held(self, lengths: Sequence[int], steps: int) -> list[Interval]:
        """What this rank holds of the gradients of these parameters; what belongs to others is dropped.

        A layout for them is about to be made, and what there is of one is suspended.
        """
        self.suspend()
        parameters = _parameters(lengths)
        if parameters != self._parameters or any(len(rows) != steps for _, rows in self._parts):
            self._parts = []
        self._parameters, self._size = parameters, sum(lengths)
        return [interval for part in self._parts for interval in part.intervals]

    def resume(
        self, places: Sequence[Place], held: Sequence[Sequence[Interval]], collectives: Collectives, name: str
    ) -> bool:
        """Put the parts that all ranks hold into a new layout; False where some are missing, and it stays empty.

        All ranks call this together. ``held`` has for each rank what :meth:`held` returned, or nothing if that belongs
        to other steps than the rest.
        """
        parts, self._parts, self._places = self._parts, [], list(places)
        shares = divide(held, self._size)
        if shares is None or not places:
            return self._fill(())
        return self._fill(self._wholes(parts, shares[collectives.rank], _sum_of(collectives, name)))

    def refill(self, places: Sequence[Place]) -> bool:
        """Put parts into a layout without the other ranks; False where this rank lacks some, and it stays empty.

        For a state that was loaded while there is a layout, and holds this rank's own parts, or all. It comes after
        :meth:`held`.
        """
        parts, self._parts, self._places = self._parts, [], list(places)
        mine = [interval for place in places for interval in _kept(place)]
        if not all(_covers(parts, interval) for interval in mine):
            return self._fill(())
        return self._fill(self._wholes(parts, mine, lambda whole: whole))

    def _fill(self, wholes: Iterable[Tensor]) -> bool:
        """Keep what belongs to the layout of the mean gradients of all steps, and zeros where none are given.

        Returns whether there were any.
        """
        found: list[list[Tensor]] = [[] for _ in self._places]
        for whole in wholes:
            for place, rows in zip(self._places, found, strict=True):
                kept = _kept(place)
                rows.append(ops_for(whole).concat([whole[start:stop] for start, stop in kept] or [whole[:0]]))
        for place, rows in zip(self._places, found, strict=True):
            ops = ops_for(place.bucket.past)
            filling = ops.stack(rows) if rows else ops.zeros((0, 0), place.bucket.past)
            place.bucket.past = ops.filled(place.bucket.past, filling)
        return all(found)

    def gather(self, collectives: Collectives, name: str) -> None:
        """Hold all of it, for a state to be saved before the next step. All ranks call this together."""
        if not self._places:
            return
        held = [_kept(place) for place in self._places]
        mine = [interval for intervals in held for interval in intervals]
        if not self._places[0].bucket.schedule.complete:
            rows = list(self._wholes(self._held(), mine, _sum_of(collectives, name)))
            self._whole = [Part([Interval(0, self._size)], ops_for(rows[0]).stack(rows))]

    def step_taken(self) -> None:
        """What was gathered is out of date."""
        self._whole = []

    def _wholes(
        self, parts: Sequence[Part], mine: Sequence[Interval], complete: Callable[[Tensor], Tensor]
    ) -> Iterator[Tensor]:
        """The whole mean gradient of one step after the other, so that no rank holds more than one at a time.

        Each is what these parts hold of it within intervals of this rank's, zeros elsewhere, and then ``complete``.
        """
        reference = self._places[0].bucket.past
        ops = ops_for(reference)
        for step in range(self._places[0].bucket.schedule.history):
            whole = ops.zeros((self._size,), reference)
            given = [(start, stop, ops.wide(ops.beside(row, whole))) for start, stop, row in _cut(parts, step, mine)]
            yield complete(ops.assemble(whole, sorted(given, key=lambda piece: piece[0]), out=whole))

    def _held(self) -> list[Part]:
        if not self._places:
            return self._parts
        parts = []
        for place in self._places:
            intervals = _kept(place)
            rows = ops_for(place.bucket.past).current(place.bucket.past)
            if intervals:
                length = sum(stop - start for start, stop in intervals)
                parts.append(Part(intervals, rows[: place.bucket.schedule.history, :length]))
        return parts

    # --- saved and loaded -----------------------------------------------------------------------

    @property
    def bytes(self) -> int:
        """How much memory this rank keeps it in."""
        return sum(ops_for(p.bucket.past).bytes_of(p.bucket.past) for p in self._places)

    def state_dict(self) -> dict[str, Any]:
        """What this rank holds, as tensors and numbers; empty if that is nothing."""
        parts = self._whole or self._held()
        if not parts:
            return {}
        ops = ops_for(parts[0].rows)
        rows = [part.rows for part in parts]
        if len({part.rows.dtype for part in parts}) > 1:
            rows = [ops.wide(each) for each in rows]
        places = [number for part in parts for interval in part.intervals for number in interval]
        return dict(zip(MEANS, (ops.join(rows, 1), places, self._parameters), strict=True))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Hold what :meth:`state_dict` returned, in place of everything else."""
        self._places, self._parts, self._whole = [], [], []
        if state.get(MEANS[0]) is not None:
            rows, places, parameters = (state[name] for name in MEANS)
            numbers = list(map(int, places))
            intervals = [Interval(*pair) for pair in zip(numbers[::2], numbers[1::2], strict=True)]
            self._parts, self._parameters = [Part(intervals, rows)], int(parameters)


def intervals_of(lengths: Sequence[int]) -> list[Interval]:
    """Where parameters of these lengths lie in the whole gradient.

    >>> intervals_of([3, 2])
    [Interval(start=0, stop=3), Interval(start=3, stop=5)]
    """
    stops = list(accumulate(lengths))
    return [Interval(stop - length, stop) for length, stop in zip(lengths, stops, strict=True)]


def divide(held: Sequence[Sequence[Interval]], stop: int, start: int = 0) -> list[list[Interval]] | None:
    """Which intervals each rank gives to the others, so that each element is given once; None if one would be missing.

    The elements are those from ``start`` to ``stop``.

    >>> divide([[Interval(0, 6)], [Interval(4, 9)]], 9)
    [[Interval(start=0, stop=6)], [Interval(start=6, stop=9)]]
    >>> divide([[Interval(0, 6)], []], 9) is None
    True
    """
    missing = [Interval(start, stop)] if start < stop else []
    shares = []
    for intervals in held:
        share = []
        for first, last in intervals:
            left = []
            for gap in missing:
                common = Interval(max(first, gap.start), min(last, gap.stop))
                if common.start >= common.stop:
                    left.append(gap)
                    continue
                share.append(common)
                around = (Interval(gap.start, common.start), Interval(common.stop, gap.stop))
                left += [rest for rest in around if rest.start < rest.stop]
            missing = left
        shares.append(share)
    return None if missing else shares


def _parameters(lengths: Sequence[int]) -> int:
    # Short enough to survive as a float64, which some checkpoints make of every number.
    return agreement.digest({"lengths": list(lengths)}) >> 10


def _kept(place: Place) -> list[Interval]:
    """Where in the whole gradient the elements lie that this rank keeps of a bucket, in their order."""
    first, last = place.bucket.schedule.kept(place.bucket.length)
    found, offset = [], 0
    for start, stop in place.intervals:
        low, high = max(first - offset, 0), min(last - offset, stop - start)
        if low < high:
            found.append(Interval(start + low, start + high))
        offset += stop - start
    return found


def _covers(parts: Sequence[Part], interval: Interval) -> bool:
    return divide([part.intervals for part in parts], interval.stop, interval.start) is not None


def _sum_of(collectives: Collectives, name: str) -> Callable[[Tensor], Tensor]:
    """The sum of a tensor over all workers, outside of a step."""

    def total(whole: Tensor) -> Tensor:
        return ops_for(whole).bound(lambda x: collectives.allreduce(x, f"{name}.means", out=x).wait(), whole)()

    return total


def _cut(parts: Sequence[Part], step: int, wanted: Sequence[Interval]) -> Iterator[tuple[int, int, Tensor]]:
    """What the parts hold of one step's mean gradient within the intervals wanted."""
    for intervals, rows in parts:
        offset = 0
        for start, stop in intervals:
            for low, high in ((max(start, w.start), min(stop, w.stop)) for w in wanted):
                if low < high:
                    yield low, high, rows[step, offset + low - start : offset + high - start]
            offset += stop - start
