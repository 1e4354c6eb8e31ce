"""An aggregator's memory on behalf of one optimizer: made to fit, repaired, saved and loaded."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..aggregators import Aggregator, Memory, pack_memory, unpack_memory
from ..collectives import Collectives
from ..ops import Tensor, ops_for
from .history import History, Interval, Place

__all__ = ["STATE_KEY", "State", "holders", "rank_to_follow", "share_memory"]

#: Where an optimizer's ``state_dict`` keeps the aggregator's state.
STATE_KEY = "adacons"


@dataclass
class State:
    """An aggregator's memory on behalf of one optimizer, and the number of workers it is for."""

    memory: Memory = field(default_factory=dict)
    workers: int = 0
    #: The mean gradients of earlier steps that the memory goes with.
    history: History = field(default_factory=History)
    #: Some tensor where memories are kept, and what the memory was last made to fit.
    _reference: Tensor = None
    _fitted: Any = None

    def fit(self, aggregator: Aggregator, groups: int, workers: int, reference: Tensor) -> None:
        """Make a loaded memory fit the groups and workers there are, on ``reference``'s device."""
        wanted = (groups, workers, getattr(reference, "device", None))
        if wanted == self._fitted:
            return
        ops = ops_for(reference)
        self._reference, self._fitted = ops.zeros((1,), reference), wanted
        self.memory = self.tensors()
        known = ops.shape(self.memory["steps"])[0] if self.memory else groups
        if known != groups:
            warnings.warn(
                f"the aggregator's state is for {known} groups of parameters and there are {groups} now, "
                "so it starts afresh",
                stacklevel=2,
            )
            self.memory = {}
        self.memory = aggregator.adopted(self.memory)
        if self.memory and self.workers != workers:
            self.memory = aggregator.resized(self.memory, workers)
        self.workers = workers

    def tensors(self) -> Memory:
        """The memory as tensors. What a step leaves may be Python's own numbers."""
        if self._reference is None:
            return self.memory
        ops = ops_for(self._reference)
        return {name: ops.beside(value, self._reference) for name, value in self.memory.items()}

    def resume_history(
        self,
        aggregator: Aggregator,
        places: Sequence[Place],
        held: Sequence[Sequence[Interval]],
        collectives: Collectives,
        name: str,
    ) -> None:
        """Put the mean gradients of earlier steps into a new layout. All ranks call this together.

        It comes after :meth:`fit`, once all ranks remember the same. ``held`` is as in :meth:`History.resume`.
        """
        if not self.history.resume(places, held if self.kept else [], collectives, name) and self.kept:
            self._begin_history_afresh(aggregator)

    def refill_history(self, aggregator: Aggregator, places: Sequence[Place], lengths: Sequence[int]) -> None:
        """Put a state that was just loaded into a layout that is there, without the other ranks."""
        self.history.held(lengths, aggregator.history)
        if not self.history.refill(places) and self.kept:
            self._begin_history_afresh(aggregator)

    def _begin_history_afresh(self, aggregator: Aggregator) -> None:
        warnings.warn(
            "the mean gradients of earlier steps belong to other parameters, or no rank has some of them, so the "
            "aggregator's history begins afresh. Before one rank saves, all must call gather_history(); otherwise "
            "each must save, and load, its own state",
            stacklevel=4,
        )
        self.memory = {**self.memory, **aggregator.no_past(self.memory["steps"])}

    @property
    def kept(self) -> int:
        """How many steps' mean gradients were kept so far. Waits for the device."""
        kept = self.memory.get("kept")
        return 0 if kept is None else int(ops_for(kept).to_list(kept)[0][0])

    def state_dict(self) -> dict[str, Any]:
        return pack_memory(self.tensors(), self.workers) | self.history.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.memory, self.workers = unpack_memory(state)
        self._fitted = None
        self.history.load_state_dict(state)

    def digest(self) -> int:
        """A number that differs between ranks if what they remember does. Waits for the device."""
        memory = self.tensors()
        values = [memory[name] for name in sorted(memory)]
        if not values:
            return 0
        ops = ops_for(values[0])
        return int(ops.to_list(ops.digest(values)))

    @property
    def steps(self) -> int:
        """How many steps are remembered, in the group with the most. Waits for the device."""
        steps = self.memory.get("steps")
        if steps is None:
            return 0
        return int(max(row[0] for row in ops_for(steps).to_list(steps)))


def rank_to_follow(remembered: Sequence[tuple[int, int]]) -> int | None:
    """The rank whose memory all take, given everyone's digest and number of steps; None where all remember the same.

    What the most steps have gone into is what all get. Otherwise each rank would weigh the gradients in its own way.

    >>> rank_to_follow([(7, 3), (8, 5), (9, 5)])
    1
    >>> rank_to_follow([(7, 3), (7, 3)]) is None
    True
    """
    if all(digest == remembered[0][0] for digest, _ in remembered):
        return None
    steps = [steps for _, steps in remembered]
    return steps.index(max(steps))


def holders(remembered: Sequence[tuple[int, int]], held: Sequence[Sequence[Sequence[int]]]) -> list[list[Interval]]:
    """What each rank holds of the history that goes with the memory all take; arguments by rank.

    >>> holders([(7, 3), (8, 5)], [[(0, 2)], [(2, 4)]])
    [[], [Interval(start=2, stop=4)]]
    """
    leader = remembered[rank_to_follow(remembered) or 0]
    return [
        [Interval(*pair) for pair in mine] if tuple(memory) == tuple(leader) else []
        for memory, mine in zip(remembered, held, strict=True)
    ]


def share_memory(
    state: State,
    remembered: Sequence[tuple[int, int]],
    collectives: Collectives,
    name: str,
    *,
    reference: Tensor,
    ranks: Sequence[int],
    expected: bool = False,
) -> None:
    """Let all ranks remember the same, and warn if that was not ``expected`` to differ.

    Memories differ where a rank has missed steps since its ``hvd.join()``, or where a checkpoint was not loaded on all
    ranks. All ranks call this together, with everyone's digest and number of steps.

    Args:
        state: what this rank's aggregator remembers.
        remembered: see :func:`rank_to_follow`.
        collectives: the workers.
        name: a prefix for the names of collectives.
        reference: some tensor on the device where memories are kept.
        ranks: how the warning calls the workers.
        expected: whether there is nothing to warn of.
    """
    leader = rank_to_follow(remembered)
    if leader is None:
        return
    if not expected:
        warnings.warn(
            f"the aggregator remembers other steps on some ranks than on others ({[steps for _, steps in remembered]} "
            f"of them), so all go on from what rank {ranks[leader]} remembers; load checkpoints on every rank",
            stacklevel=3,
        )
    ops, leads = ops_for(reference), leader == collectives.rank
    # Python writes a float so that reading it gives the same bits.
    mine = {name: [ops.shape(value), list(_numbers(ops.to_list(value)))] for name, value in state.tensors().items()}
    sent = collectives.allgather_bytes(json.dumps([state.workers, mine]).encode() if leads else b"", f"{name}.memory")
    if not leads:
        workers, theirs = json.loads(sent[leader])
        memory = {key: ops.reshape(ops.like(flat, reference), shape) for key, (shape, flat) in theirs.items()}
        state.load_state_dict(pack_memory(memory, workers))


def _numbers(values: Any) -> Iterator[float]:
    """The numbers in lists of lists."""
    if isinstance(values, list):
        for value in values:
            yield from _numbers(value)
    else:
        yield values
