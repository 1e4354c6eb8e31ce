"""Optimizers of Keras 3 take cases, on TensorFlow and on PyTorch."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import cases
import harness
import keras
import numpy as np
from cases import GIVEN, Case, Options, Seen, no_options

import adacons_hvd.keras as hvd
from adacons_hvd import AdaCons

OPTIONS = ("schedule", "bucket_bytes", "gradient_predivide_factor")


def fitting(case: Case) -> Case:
    """Without sparse, complex, missing gradients, for which Keras has ways of its own, and what PyTorch alone knows."""
    options = {name: case.options[name] for name in OPTIONS if name in case.options}
    types = ["float32" if "complex" in kind else kind for kind in case.types]
    return replace(case, options=options, types=types, sparse=[], missing=[], frozen={}, optimizer="SGD")


def run(case: Case) -> Counter[str]:
    """Train, compare, and count what was met."""
    hvd.init()
    me = harness.rank()
    variables = [
        keras.Variable(np.zeros(s), dtype=k, name=f"v{i}")
        for i, (s, k) in enumerate(zip(case.shapes, case.types, strict=True))
    ]
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.SGD(1.0),
        aggregator=AdaCons(**case.aggregator, nonfinite=case.nonfinite),
        compression=hvd.Compression.fp16 if case.fp16 else hvd.Compression.none,
        granularity=cases.pick(case.granularity, variables),
        groups=cases.pick(case.groups, variables),
        backward_passes_per_step=case.passes,
        **case.options,
    )
    optimizer.build(variables)
    raw, seen = {}, {}
    for epoch in case.times(me):
        for step in epoch:
            total = [np.zeros(0)] * len(variables)
            for turn in range(case.passes):
                values = [cases.gradient(case, step, turn, me, i) for i in range(len(variables))]
                given = [_tensor(value, v) for value, v in zip(values, variables, strict=True)]
                mine = [_array(g) for g in given]
                total = [t + m for t, m in zip(total, mine, strict=True)] if turn else mine
                error = _apply(optimizer, given, variables)
            raw[step] = total
            # A step of length one, from zero.
            found = [0 - _array(v) for v in variables]
            seen[step] = Seen(error) if error else Seen.of(found, optimizer.report)
            for variable in variables:
                variable.assign(keras.ops.zeros_like(variable))
        _join()
    memory = optimizer._adacons.exchange.state_dict()
    return cases.judged(case, raw, seen, [_array(v) for v in variables], memory)


#: The arguments of which ranks may disagree.
ARGUMENTS = {"aggregator", "granularity", "groups", "compression", "sparse_as_dense", "check_replicas", *OPTIONS}
FP16 = hvd.Compression.fp16


OPTIMIZERS = ("Adam",)
ROUNDING = 0.0
#: A graph says nothing.
SAYS_WHO_LEADS = keras.backend.backend() == "torch"


class Training:
    """A training with these options, which are told of the variables."""

    def __init__(self, options: Options = no_options, optimizer: str = "Adam") -> None:
        hvd.init()
        self.kind = optimizer
        named = zip("ab", GIVEN.shapes, strict=True)
        self.variables = [keras.Variable(np.ones(s), dtype="float64", name=n) for n, s in named]
        given = {"aggregator": AdaCons(momentum=0.9), "schedule": "one-pass", **options(self.variables)}
        self.optimizer = hvd.DistributedOptimizer(self.plain(), **given)

    def plain(self) -> Any:
        """An optimizer that is not distributed."""
        optimizer = getattr(keras.optimizers, self.kind)(0.01)
        optimizer.build(self.variables)
        return optimizer

    def step(self, number: int) -> None:
        pairs = zip(cases.given_gradients(number), self.variables, strict=True)
        self.optimizer.apply([_tensor(gradient, v) for gradient, v in pairs], self.variables)

    def values(self) -> list[np.ndarray]:
        return [keras.ops.convert_to_numpy(v).copy() for v in self.variables]

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
        for variable, value in zip(self.variables, saved["values"], strict=True):
            variable.assign(value)

    def through_plain(self, saved: dict[str, Any]) -> dict[str, Any]:
        """The state of a plain optimizer that has loaded this one."""
        plain, own = self.plain(), {}
        plain.load_own_variables(saved["optimizer"])
        plain.save_own_variables(own)
        return {**saved, "optimizer": own, "memory": {}}


def _apply(optimizer: Any, gradients: list[Any], variables: list[Any]) -> str:
    """The error the step ended with."""
    try:
        optimizer.apply(gradients, variables)
    except FloatingPointError as error:
        return str(error)
    return ""


def _tensor(value: Any, variable: Any) -> Any:
    assert value is not None
    return keras.ops.convert_to_tensor(value.double().numpy(), dtype=variable.dtype)  # numpy knows no bfloat16


def _array(tensor: Any) -> np.ndarray:
    """As float64 numbers."""
    array: np.ndarray = keras.ops.convert_to_numpy(keras.ops.cast(tensor, "float64")).reshape(-1).copy()
    return array


def _join() -> None:
    if keras.backend.backend() == "torch":
        import adacons_hvd.torch as binding
    else:
        import adacons_hvd.tensorflow as binding
    binding.join()
