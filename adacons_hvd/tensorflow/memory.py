"""An aggregator's memory on behalf of one optimizer, in variables that a graph assigns to.

It must be the same on every rank, and there are innocent ways to make it differ: a rank that left early has missed
steps; only rank 0 has restored a checkpoint. So the flags tell how many steps each rank remembers, and if those differ,
all take up what the one with the most does (:func:`shared`).
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping
from typing import Any

import tensorflow as tf

from ..aggregators import Aggregator, Memory, Statistics, pack_memory, unpack_memory
from ..collectives.horovod_tensorflow import HorovodTensorFlow, make_variable
from .flags import Flags

__all__ = ["Memories", "shared"]

Labels = tuple[Hashable, ...]
Variables = dict[str, tf.Variable]


class Memories:
    """The memory of an aggregator, for each way to divide parameters into groups that was in use."""

    def __init__(self, aggregator: Aggregator | None) -> None:
        self._aggregator = aggregator
        self._workers = 0
        self._by_labels: dict[Labels, Variables] = {}
        #: The labels of the groups in use, None before the first layout.
        self._labels: Labels | None = None
        #: A memory and for how many workers, from a checkpoint or before a reset, until the next layout.
        self._loaded: tuple[Memory, int] | None = None

    def of(self, labels: Labels, workers: int) -> Variables:
        """The variables for what the aggregator remembers of these groups."""
        self._workers = workers
        if self._aggregator is None:
            return {}
        if labels not in self._by_labels:
            self._by_labels[labels] = {k: make_variable(v) for k, v in self._blank(len(labels)).items()}
        return self._by_labels[labels]

    def use(self, labels: Labels) -> None:
        """From now on these groups are in use: give them what is remembered, of a checkpoint or of groups before."""
        before, self._labels = self._labels, labels
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

    def state_dict(self) -> dict[str, Any]:
        """The memory in use, as numbers and arrays."""
        memory, workers = self._remembered()
        return pack_memory({name: value.numpy() for name, value in memory.items()}, workers)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned, saved by any number of workers."""
        memory, workers = unpack_memory(state)
        self._loaded = {name: tf.constant(value, tf.float64) for name, value in memory.items()}, workers
        if self._labels is not None:
            self._take_up()

    def reset(self) -> None:
        """Keep what is remembered for the workers that will be there."""
        self._loaded = self._remembered()
        self._by_labels, self._labels = {}, None

    def _remembered(self) -> tuple[Memory, int]:
        """The memory in use, and for how many workers."""
        if self._loaded is not None:
            return self._loaded
        variables = {} if self._labels is None else self._by_labels.get(self._labels, {})
        if not variables:
            return {}, 0
        return {name: variable.read_value() for name, variable in variables.items()}, self._workers

    def _blank(self, groups: int) -> Memory:
        assert self._aggregator is not None
        nothing = tf.zeros((groups, self._workers), tf.float64)
        gramian = tf.zeros((groups, self._workers, self._workers), tf.float64)
        blank = Statistics(nothing, nothing, nothing == 0, gramian if self._aggregator.needs_gramian else None)
        return self._aggregator.started(blank)

    def _take_up(self) -> None:
        """Make what was loaded what the aggregator remembers of the groups in use."""
        assert self._loaded is not None
        assert self._labels is not None
        (loaded, workers), self._loaded = self._loaded, None
        if self._aggregator is None:
            return
        groups = len(self._labels)
        known = loaded["steps"].shape[0] if loaded else groups
        if known != groups:
            warnings.warn(
                f"the aggregator's state is for {known} groups of parameters and there are {groups} now, "
                "so it starts afresh",
                stacklevel=2,
            )
            loaded = {}
        if loaded and workers != self._workers:
            loaded = self._aggregator.resized(loaded, self._workers)
        for name, blank in self._blank(groups).items():
            self._by_labels[self._labels][name].assign(loaded.get(name, blank))


def shared(memory: Variables, flags: Flags, collectives: HorovodTensorFlow, name: str) -> Memory:
    """The values of a memory's variables: those of the rank that remembers the most steps, if ranks differ."""
    own = {key: variable.read_value() for key, variable in memory.items()}
    root = tf.argmax(flags.steps)
    differ = tf.reduce_any((flags.here == 1) & (flags.steps != flags.steps[root]))

    def share() -> list[tf.Tensor]:
        collectives.start()
        flat = tf.concat([tf.reshape(value, (-1,)) for value in own.values()], 0)
        flat = tf.where(root == collectives.rank, flat, tf.zeros_like(flat))
        flat = collectives.allreduce(flat, f"{name}.memory").wait()
        parts = tf.split(flat, [value.shape.num_elements() for value in own.values()])
        return [tf.reshape(part, value.shape) for part, value in zip(parts, own.values(), strict=True)]

    values = tf.cond(differ, share, lambda: list(own.values()))
    return dict(zip(own, values, strict=True))
