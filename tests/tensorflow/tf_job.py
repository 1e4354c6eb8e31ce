"""Training with TensorFlow on every rank, beside the oracle. Runs on the ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import harness
import numpy as np
import oracle
import tensorflow as tf

SHAPES: list[tuple[int, ...]] = [(6, 5), (5,), (5, 7), (7,), (7, 1), (1,)]


def fixed_gradients(rank: int, step: int, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[np.ndarray]:
    """Gradients that agree to some extent, of different lengths, the same in every framework."""
    shared = np.random.default_rng(step)
    own = np.random.default_rng(1000 * step + rank + 1)
    length = 0.1 + 3 * own.random()
    return [
        (length * (shared.standard_normal(shape) + own.standard_normal(shape))).astype(np.float32) for shape in shapes
    ]


def array(gradient: Any, like: Any) -> np.ndarray:
    """A gradient as float64, zeros where there is none."""
    if gradient is None:
        return np.zeros(tuple(like.shape))
    return tf.convert_to_tensor(gradient).numpy().astype(np.float64)


def assert_equal_bits(variables: Sequence[Any], ranks: Sequence[int] | None = None) -> None:
    """These ranks (by default all) must hold the same bits."""
    bits = b"".join(np.ascontiguousarray(np.asarray(v.numpy())).tobytes() for v in variables)
    everyone = harness.gather(hashlib.sha256(bits).hexdigest())
    some = range(len(everyone)) if ranks is None else ranks
    assert len({everyone[rank] for rank in some}) == 1, f"ranks hold different variables: {everyone}"


def judge(
    raw: list[list[np.ndarray]],
    found: list[list[np.ndarray]],
    *,
    layerwise: bool = False,
    tolerance: float = 1e-5,
    groups: Sequence[Sequence[int]] | None = None,
    **settings: Any,
) -> None:
    """Hold ``found[step]`` against the oracle's result of everyone's ``raw[step]``."""
    everyone = harness.gather(raw)
    if harness.rank():
        return
    count = len(raw[0])
    groups = groups or ([[i] for i in range(count)] if layerwise else [list(range(count))])
    expected_of = oracle.Grouped(groups, **settings)
    for step, mine in enumerate(found):
        expected = expected_of([worker[step] for worker in everyone])
        off = oracle.error(mine, expected)
        assert off <= tolerance, f"step {step} is off by {off:.2e}, more than {tolerance:.0e}"


def make_variables(shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[tf.Variable]:
    """Variables that are the same on every rank."""
    rng = np.random.default_rng(7)
    return [tf.Variable(rng.standard_normal(shape).astype(np.float32)) for shape in shapes]


def pulling(variables: Sequence[Any], gradients: Sequence[Any]) -> tf.Tensor:
    """A loss whose gradient with respect to the variables is ``gradients`` plus the variables."""
    parts = [tf.reduce_sum(v * g) + tf.reduce_sum(v * v) / 2 for v, g in zip(variables, gradients, strict=True)]
    return tf.add_n(parts)
