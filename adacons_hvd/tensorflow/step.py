"""The step of an aggregator as a part of a graph, and what a report on it needs."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import tensorflow as tf

from ..aggregators import Aggregator, Decision, Memory, Statistics
from ..collectives.horovod_tensorflow import HorovodTensorFlow, make_variable
from ..engine.session import ONLY_SUMS
from ..report import Report
from ..schedules import SCHEDULES, Step
from . import errors
from .layout import Layout
from .packing import Gradient, Packing

__all__ = ["GraphStep", "Outcome", "Seen", "identities"]


class Outcome(NamedTuple):
    """The outcome of a step, as tensors of its graph."""

    gradients: list[Gradient]
    #: The aggregator's memory after the step.
    memory: Memory
    #: The tensors that a report needs.
    seen: dict[str, tf.Tensor]


class GraphStep(Step):
    """A step whose error is raised by the graph, because only the graph sees the values."""

    def __init__(self, collectives: HorovodTensorFlow, aggregator: Aggregator, groups: int, name: str) -> None:
        super().__init__(collectives, aggregator, groups, name)
        self._begin_graph = collectives.start
        self._checks: list[tf.Tensor] = []

    def _refuse_nonfinite(self, statistics: Statistics) -> None:
        bad = tf.reduce_any(~tf.math.is_finite(statistics.squares), 0)
        self._checks.append(errors.check(tf.reduce_any(bad), self.aggregator.refuse, lambda: [_where(bad)]))

    def _tell(self, news: tf.Tensor) -> None:
        tell = functools.partial(self.aggregator.tell, first=self.collectives.rank == 0)
        some = tf.reduce_any(news[: self.collectives.size] != 0)
        self._checks.append(errors.check(some, tell, lambda: [news]))

    def aggregate(
        self,
        packings: Sequence[Packing],
        schedule_name: str,
        predivide: float,
        unscale: tf.Tensor,
        memory: Memory,
        gradients: Mapping[int, Gradient],
    ) -> Outcome:
        """Add the operations that aggregate gradients, given by their slots' indices, to the graph."""
        self._begin_graph()
        schedule = SCHEDULES[schedule_name](self.collectives, predivide, self.aggregator.history)
        buckets = [packing.pack(gradients, schedule) for packing in packings]
        decision, statistics = self.run(buckets, memory, unscale)
        results = dict(gradients)  # what has no elements is in no packing
        with tf.control_dependencies(self._checks):
            for packing, bucket in zip(packings, buckets, strict=True):
                results.update(packing.unpack(bucket))
            found = identities([results[i] for i in gradients])
            # Nothing is learnt from a step that ends with an error.
            memory = {name: tf.identity(value) for name, value in decision.memory.items()}
        seen = {
            "weights": decision.weights,
            "fallback": decision.fallback,
            "dots": statistics.dots,
            "squares": statistics.squares,
            "present": statistics.present,
            **{f"stage {name}": value for name, value in decision.stages.items()},
            **({} if decision.past_weights is None else {"past weights": decision.past_weights}),
        }
        return Outcome(found, memory, seen)


class Seen:
    """Keeps the tensors of the last step that a report on it needs, in variables."""

    def __init__(self) -> None:
        self._variables: dict[str, tf.Variable] = {}

    def keep(self, tensors: Mapping[str, tf.Tensor]) -> None:
        """Add the operations that keep these tensors to the graph."""
        for name, value in tensors.items():
            variable = self._variables.get(name)
            if variable is None or variable.shape != value.shape:
                with tf.init_scope():
                    variable = make_variable(tf.zeros(value.shape, value.dtype))
                self._variables[name] = variable
            variable.assign(value)

    def report(self, layout: Layout) -> Report | None:
        """The report on the last step, which was one of this layout; None before the first."""
        if not self._variables:
            return None
        seen = {name: variable.read_value() for name, variable in self._variables.items()}
        memory = {name: variable.read_value() for name, variable in layout.memory.items()}
        stages = {name.removeprefix("stage "): value for name, value in seen.items() if name.startswith("stage ")}
        decision = Decision(seen["weights"], memory, seen["fallback"], stages, seen.get("past weights"))
        statistics = Statistics(seen["dots"], seen["squares"], seen["present"])
        history_bytes = 0 if layout.past is None else layout.past.history.bytes
        return Report(decision, statistics, layout.choice if seen["all here"] else ONLY_SUMS, history_bytes)


def identities(gradients: Sequence[Gradient]) -> list[Gradient]:
    """The same gradients, as operations that wait for the control dependencies in force."""
    return [tf.nest.map_structure(tf.identity, gradient, expand_composites=True) for gradient in gradients]


def _where(condition: tf.Tensor) -> tf.Tensor:
    return tf.reshape(tf.where(condition), (-1,))
