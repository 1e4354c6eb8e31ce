"""Optimizers of Keras 3 take cases, on TensorFlow and on PyTorch."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import cases
import harness
import keras
import numpy as np
import of_keras
from cases import Case, Seen
from guards import Stray
from of_keras import ANOTHER, AROUND, recompiled

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
        Training.join()
    memory = optimizer._adacons.exchange.state_dict()
    return cases.judged(case, raw, seen, [_array(v) for v in variables], memory)


ARGUMENTS = of_keras.ARGUMENTS
FP16 = hvd.Compression.fp16


OPTIMIZERS = ("Adam",)
ROUNDING = 0.0


class Training(of_keras.Training):
    """A training with these options, which are told of the variables."""

    keras, hvd = keras, hvd
    tensor = staticmethod(keras.ops.convert_to_tensor)

    @staticmethod
    def variable(value: np.ndarray, name: str) -> Any:
        return keras.Variable(value, dtype="float64", name=name)

    @staticmethod
    def join() -> None:
        if keras.backend.backend() == "torch":
            import adacons_hvd.torch as binding
        else:
            import adacons_hvd.tensorflow as binding
        binding.join()


def step_of_the_class(training: Training, number: int) -> None:
    """As something kept it from before the optimizer was distributed."""
    keras.optimizers.SGD.apply(training.optimizer, *training.given(number))


def compiled_step(training: Training, number: int) -> None:
    import torch

    torch.compile(lambda: step_of_the_class(training, number), backend="eager")()


ON_TORCH = keras.backend.backend() == "torch"
STRAYS = {
    "step of the class": Stray(step_of_the_class, AROUND),
    # The part of a step that comes after the aggregation.
    "inner step": Stray(lambda t, n: t.optimizer._backend_apply_gradients(*t.given(n)), AROUND),
    "plain optimizer": Stray(lambda t, n: keras.optimizers.Adam(0.1).apply(*t.given(n)), ANOTHER),
    "recompiled": Stray(recompiled, ANOTHER),
    **({"compiled step": Stray(compiled_step, AROUND)} if ON_TORCH else {}),
}
TELLS_HOW = SAYS_WHO_LEADS = ON_TORCH
COMPARES_AVERAGED = OUTLIVES_A_RANK = True
FOUND = 2 if ON_TORCH else 1
OUT_OF_DATA_IS_TOLD = False


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
