"""An aggregator's memory on behalf of one optimizer, in variables that a graph assigns to.

It must be the same on every rank, and there are innocent ways to make it differ: a rank that left early has missed
steps; only rank 0 has restored a checkpoint. So the flags tell how many steps each rank remembers, and if those differ,
all take up what the one with the most does (:func:`shared`).

A history of mean gradients belongs to one list of parameters, so each layout has its own. A step in a graph is taken
without Python: it cannot move the rows of one rank to another. So they are moved while ranks lay out, and where ranks
remember different steps afterwards, the history begins afresh.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from ..aggregators import Aggregator, Memory, Statistics
from ..aggregators.checkpoint import MEANS
from ..collectives.horovod_tensorflow import HorovodTensorFlow, make_variable
from ..engine.history import History, Interval, Place
from ..engine.memory import State, holders, share_memory
from ..engine.session import Arrival
from .flags import Flags

__all__ = ["Memories", "Past", "shared"]

Labels = tuple[Hashable, ...]
Variables = dict[str, tf.Variable]


@dataclass
class Past:
    """The mean gradients of earlier steps in one layout."""

    history: History
    #: Where they are kept, and the lengths of the gradients that they are means of.
    places: list[Place]
    lengths: list[int]
    #: The part of the aggregator's memory that goes with them.
    variables: Variables
    #: How many were kept when they were gathered.
    _gathered: int = 0

    @property
    def kept(self) -> int:
        """How many were kept so far. Not for graphs."""
        return int(self.variables["kept"].numpy().max())

    def gather(self, collectives: HorovodTensorFlow, name: str) -> None:
        """Hold all of them, until one more is kept. All ranks call this together."""
        self.history.gather(collectives, name)
        self._gathered = self.kept

    def current(self) -> History:
        """The history, without what was gathered earlier than in this step."""
        if self.kept != self._gathered:
            self.history.step_taken()
        return self.history

    def clear(self) -> None:
        """Begin afresh; in a graph, add the operations that do."""
        for variable in (*self.variables.values(), *(place.bucket.past for place in self.places)):
            variable.assign(tf.zeros_like(variable))


class Memories:
    """The memory of an aggregator, for each way to divide parameters into groups that was in use."""

    def __init__(self, aggregator: Aggregator | None) -> None:
        self._aggregator = aggregator
        self._workers = 0
        self._by_labels: dict[Labels, Variables] = {}
        #: The labels of the groups in use, None before the first layout.
        self._labels: Labels | None = None
        #: The history of each layout, and that of the layout in use.
        self._pasts: list[Past] = []
        self._past: Past | None = None
        #: What comes from a checkpoint, or was remembered before a reset, until the next layout.
        self._loaded: State | None = None

    # --- layouts --------------------------------------------------------------------------------

    def of(self, labels: Labels, workers: int) -> Variables:
        """The variables for what the aggregator remembers of these groups, its history excepted."""
        self._workers = workers
        if self._aggregator is None:
            return {}
        if labels not in self._by_labels:
            blank, past = self._blank(len(labels)), self._no_past(len(labels))
            self._by_labels[labels] = {k: make_variable(v) for k, v in blank.items() if k not in past}
        return self._by_labels[labels]

    def resume(
        self,
        labels: Labels,
        lengths: list[int],
        places: list[Place],
        collectives: HorovodTensorFlow,
        name: str,
        ranks: Sequence[int],
        compare: Callable[[tuple[int, int], Sequence[Interval]], list[Arrival]],
    ) -> Past:
        """The history of a new layout, with what all ranks have loaded of it. All ranks call this together.

        ``compare`` tells the other ranks what this one remembers, and returns what all do.
        """
        assert self._aggregator is not None
        if any(past.kept for past in self._pasts):
            warnings.warn(
                "other parameters are trained than before, so the aggregator's history begins afresh", stacklevel=2
            )
        for past in self._pasts:
            past.clear()
        state = self._loaded or State()
        if self._labels is None:
            self._loaded = state
        reference = tf.zeros((), tf.float64)
        state.fit(self._aggregator, len(labels), collectives.size, reference)
        held = state.history.held(lengths, self._aggregator.history)
        arrivals = compare((state.digest(), state.steps), held)
        remembered = [arrival.memory for arrival in arrivals]
        share_memory(state, remembered, collectives, name, reference=reference, ranks=ranks)
        state.fit(self._aggregator, len(labels), collectives.size, reference)
        everyones = holders(remembered, [arrival.held for arrival in arrivals])
        state.resume_history(self._aggregator, places, everyones, collectives, name)
        variables = {k: make_variable(v) for k, v in self._no_past(len(labels)).items()}
        self._pasts.append(Past(state.history, places, lengths, variables))
        return self._pasts[-1]

    def use(self, labels: Labels, past: Past | None) -> None:
        """From now on these groups are in use: give them what is remembered, of a checkpoint or of groups before."""
        before, self._labels = self._labels, labels
        self._past = past
        if self._loaded is not None:
            self._take_up()
        elif before is not None and before != labels:
            former = self._by_labels.get(before, {})
            pairs = [(row, before.index(label)) for row, label in enumerate(labels) if label in before]
            for name, variable in self._by_labels.get(labels, {}).items():
                rows = variable.numpy()
                for row, place in pairs:
                    rows[row] = former[name][place].numpy()
                variable.assign(rows)

    # --- saved and loaded -----------------------------------------------------------------------

    def gather_history(self, collectives: HorovodTensorFlow, name: str) -> None:
        """Hold the mean gradients of earlier steps of all ranks, until the next. All ranks call this together."""
        if self._past is not None:
            self._past.gather(collectives, name)

    def state_dict(self) -> dict[str, Any]:
        """The memory in use, as numbers and arrays."""
        state = self._remembered().state_dict()
        return {name: value.numpy() if tf.is_tensor(value) else value for name, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned, saved by any number of workers."""
        means, *numbers = MEANS
        tensors = {
            name: tf.constant(value, None if name == means else tf.float64)
            for name, value in state.items()
            if name not in ("version", "workers", *numbers)
        }
        loaded = State()
        loaded.load_state_dict({**state, **tensors})
        self._loaded = loaded
        if self._labels is not None:
            self._take_up(refill=True)

    def reset(self) -> None:
        """Keep what is remembered for the workers that will be there."""
        self._loaded = self._remembered()
        self._loaded.history.suspend()
        self._by_labels, self._labels, self._pasts, self._past = {}, None, [], None

    def _remembered(self) -> State:
        """The memory in use."""
        if self._loaded is not None:
            return self._loaded
        variables = {} if self._labels is None else self._by_labels.get(self._labels, {})
        if not variables:
            return State()
        if self._past is None:
            return State(_values(variables), self._workers)
        return State(_values(variables | self._past.variables), self._workers, self._past.current())

    def _blank(self, groups: int) -> Memory:
        assert self._aggregator is not None
        nothing = tf.zeros((groups, self._workers), tf.float64)
        gramian = tf.zeros((groups, self._workers, self._workers), tf.float64)
        blank = Statistics(nothing, nothing, nothing == 0, gramian if self._aggregator.needs_gramian else None)
        return self._aggregator.started(blank)

    def _no_past(self, groups: int) -> Memory:
        assert self._aggregator is not None
        return self._aggregator.no_past(tf.zeros((groups, 1), tf.float64))

    def _take_up(self, refill: bool = False) -> None:
        """Make what was loaded what the aggregator remembers of the groups in use."""
        assert self._loaded is not None
        assert self._labels is not None
        state, self._loaded = self._loaded, None
        if self._aggregator is None:
            return
        groups = len(self._labels)
        state.fit(self._aggregator, groups, self._workers, tf.zeros((), tf.float64))
        variables = self._by_labels[self._labels]
        if self._past is not None:
            variables = variables | self._past.variables
            if refill:
                self._past.history = state.history
                state.refill_history(self._aggregator, self._past.places, self._past.lengths)
        for name, blank in self._blank(groups).items():
            variables[name].assign(state.memory.get(name, blank))


def _values(variables: Variables) -> Memory:
    return {name: variable.read_value() for name, variable in variables.items()}


def shared(
    memory: Variables, past: Past | None, flags: Flags, collectives: HorovodTensorFlow, name: str
) -> dict[str, tf.Tensor]:
    """The values of a memory's variables: those of the rank that remembers the most steps, if ranks differ.

    A history begins afresh then, since its rows are spread over ranks that remember other steps.
    """
    own = _values(memory)
    lost = {} if past is None else {key: own.pop(key) for key in past.variables}
    root = tf.argmax(flags.steps)
    here = flags.here == 1
    steps, kept = tf.gather(flags.steps, root), tf.gather(flags.kept, root)
    differ = tf.reduce_any(here & ((flags.steps != steps) | (flags.kept != kept)))
    flat = tf.concat([tf.reshape(value, (-1,)) for value in own.values()], 0)

    def share() -> tf.Tensor:
        collectives.start()
        if past is not None:
            past.clear()
        return collectives.allreduce(tf.where(root == collectives.rank, flat, 0.0), f"{name}.memory").wait()

    parts = tf.split(tf.cond(differ, share, lambda: flat), [value.shape.num_elements() for value in own.values()])
    found = {key: tf.reshape(part, own[key].shape) for key, part in zip(own, parts, strict=True)}
    return found | {key: tf.where(differ, tf.zeros_like(value), value) for key, value in lost.items()}
