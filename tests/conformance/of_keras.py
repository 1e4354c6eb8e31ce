"""Trainings by a model and an optimizer of either Keras. Runs on the ranks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from cases import GIVEN, Options, given_gradients, joining, no_options

from adacons_hvd import AdaCons

#: The arguments of which ranks may disagree.
ARGUMENTS = {
    *("aggregator", "schedule", "granularity", "groups", "compression", "bucket_bytes", "sparse_as_dense"),
    *("gradient_predivide_factor", "check_replicas", "may_differ"),
}

_turns = itertools.count()


class Training:
    """Steps of a model along given gradients: on TensorFlow in a graph, eagerly, in a graph, ..."""

    #: Which Keras, and what of this package is for it.
    keras: Any
    hvd: Any
    variable: Callable[[np.ndarray, str], Any]
    tensor: Callable[[np.ndarray], Any]
    join: Callable[[], None]

    def __init__(self, options: Options = no_options, optimizer: str = "Adam") -> None:
        self.hvd.init()
        self.kind = optimizer
        self.variables = [self.variable(np.ones(s), n) for n, s in zip("ab", GIVEN.shapes, strict=True)]
        self.model = _model(self.keras, self.variables)
        given = {"aggregator": AdaCons(momentum=0.9), "schedule": "one-pass", **options(self.variables)}
        self.optimizer = self.hvd.DistributedOptimizer(self.plain(), **given)
        self.eagerly = next(_turns) % 2 == 1
        self.compile(self.optimizer)

    def compile(self, optimizer: Any) -> None:
        self.model.compile(optimizer, run_eagerly=self.eagerly)

    def plain(self) -> Any:
        """An optimizer that is not distributed."""
        optimizer = getattr(self.keras.optimizers, self.kind)(0.01)
        optimizer.build(self.variables)
        return optimizer

    def step(self, number: int) -> None:
        self.model.train_on_batch([gradient.numpy()[None] for gradient in given_gradients(number)])

    def given(self, number: int) -> tuple[list[Any], list[Any]]:
        """This rank's gradients of this step and their variables, for an optimizer's own methods."""
        return [self.tensor(gradient.numpy()) for gradient in given_gradients(number)], self.variables

    def values(self) -> list[np.ndarray]:
        return [value.copy() for value in self.model.get_weights()]

    def assign(self, values: Sequence[Any]) -> None:
        self.model.set_weights(values)

    def until_all_are_out_of_data(self) -> Any:
        return joining(self.join)

    @property
    def report(self) -> Any:
        return self.optimizer.report

    def save(self) -> dict[str, Any]:
        """All there is, and by itself what the aggregator remembers."""
        own: dict[str, Any] = {}
        self.optimizer.save_own_variables(own)
        return {"values": self.values(), "optimizer": own, "memory": self.optimizer._adacons.exchange.state_dict()}

    def load(self, saved: dict[str, Any]) -> None:
        if saved["memory"]:
            self.optimizer._adacons.exchange.load_state_dict(saved["memory"])
        self.optimizer.load_own_variables(saved["optimizer"])
        self.assign(saved["values"])

    def through_plain(self, saved: dict[str, Any]) -> dict[str, Any]:
        """The state of a plain optimizer that has loaded this one."""
        plain, own = self.plain(), {}
        plain.load_own_variables(saved["optimizer"])
        plain.save_own_variables(own)
        return {**saved, "optimizer": own, "memory": {}}


def _model(keras: Any, variables: list[Any]) -> Any:
    """A model of these variables whose gradients are what it is given."""
    total = getattr(keras, "ops", keras.backend).sum

    class Given(keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(dtype="float64")
            self.all, self.built = variables, True

        def call(self, gradients: Sequence[Any]) -> Any:
            return sum(total(v * gradient) for v, gradient in zip(self.all, gradients, strict=True))

        def compute_loss(self, x: Any = None, y: Any = None, y_pred: Any = None, *others: Any, **named: Any) -> Any:
            return y_pred

    return Given()


#: How errors call a step of the optimizer's own class, and that of another one.
AROUND = "something called the step of SGD instead of the distributed optimizer's own"
ANOTHER = "Adam, an optimizer that is not distributed, was used for variables of the distributed one"


def recompiled(training: Training, number: int) -> None:
    """The model has another optimizer, that nobody has distributed, while the distributed one is still there."""
    training.compile(training.keras.optimizers.Adam(0.1))
    try:
        training.step(number)
    finally:
        training.compile(training.optimizer)
