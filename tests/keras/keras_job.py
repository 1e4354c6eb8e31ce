"""Training with Keras on every rank. Runs on the ranks."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import harness
import numpy as np


def keras_and_hvd() -> tuple[Any, Any]:
    """The Keras this process is for, and what of this package belongs to it, initialised."""
    if os.environ.get("TF_USE_LEGACY_KERAS"):
        import tf_keras as keras

        import adacons_hvd.tensorflow.keras as hvd
    else:
        import keras

        import adacons_hvd.keras as hvd
    hvd.init()
    return keras, hvd


def data(rows: int = 32, rank: int | None = None, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets, different on every rank."""
    rank = harness.rank() if rank is None else rank
    rng = np.random.default_rng(100 * seed + rank)
    x = rng.standard_normal((rows, 6)).astype(np.float32)
    y = x.sum(1, keepdims=True) + (1 + rank) * rng.standard_normal((rows, 1))
    return x, y.astype(np.float32)


def network(keras: Any, dtype: str | None = None, **first: Any) -> Any:
    """A small model that is the same on every rank."""
    dense = keras.layers.Dense
    layers = [keras.Input((6,), dtype=dtype), dense(5, activation="tanh", dtype=dtype, **first), dense(1, dtype=dtype)]
    model = keras.Sequential(layers)
    rng = np.random.default_rng(3)
    model.set_weights([rng.standard_normal(w.shape) * 0.5 for w in model.get_weights()])
    return model


def digest(arrays: Sequence[Any]) -> str:
    bits = b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)
    return hashlib.sha256(bits).hexdigest()


def equal_bits(model: Any) -> bool:
    """Whether all ranks hold the same weights."""
    return len(set(harness.gather(digest(model.get_weights())))) == 1


def assert_equal_bits(model: Any, optimizer: Any = None) -> None:
    assert equal_bits(model), "ranks ended with different weights"
    if optimizer is not None:
        variables = optimizer.variables
        # Keras empties sums of gradients by multiplying them by zero, which leaves each rank's own signs.
        arrays = [np.asarray(v.numpy()) + 0 for v in (variables() if callable(variables) else variables)]
        assert len(set(harness.gather(digest(arrays)))) == 1, "ranks ended with different optimizer variables"


def recording(keras: Any) -> Any:
    """SGD that keeps the gradients it was given last, which is what ranks aggregated."""

    class RecordingSGD(keras.optimizers.SGD):  # type: ignore[misc]
        def build(self, variables: Any) -> None:
            if not getattr(self, "seen", None):
                super().build(variables)
                self.seen = [self.add_variable_from_reference(v, "seen") for v in variables]
                self.keys = [self._var_key(v) for v in variables]

        def update_step(self, gradient: Any, variable: Any, *rest: Any) -> None:
            self.seen[self.keys.index(self._var_key(variable))].assign(gradient)
            super().update_step(gradient, variable, *rest)

    return RecordingSGD


def own_gradients(model: Any, x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    """This rank's gradients of the mean squared error, by the framework itself."""
    backend = getattr(type(model), "__module__", "")
    import keras

    if keras.backend.backend() == "torch" and not backend.startswith("tf_keras"):
        import torch

        inputs, targets = torch.from_numpy(x), torch.from_numpy(y)
        loss = (model(inputs) - targets).square().mean()
        found = torch.autograd.grad(loss, [v.value for v in model.trainable_weights])
        return [g.detach().numpy().astype(np.float64) for g in found]
    import tensorflow as tf

    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.square(model(x) - y))
    found = tape.gradient(loss, model.trainable_weights)
    return [tf.convert_to_tensor(g).numpy().astype(np.float64) for g in found]


def fit_beside_oracle(
    keras: Any,
    hvd: Any,
    steps: int = 8,
    tolerance: float = 1e-5,
    fit: dict[str, Any] | None = None,
    dtype: str | None = None,
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Train by ``model.fit``, by default with AdaCons, and hold every step's gradients against the oracle.

    ``settings`` are those of :class:`oracle.Grouped`.
    """
    import oracle

    from adacons_hvd import AdaCons

    x, y = (array.astype(dtype or "float32") for array in data(8 * steps))
    model = network(keras, dtype)
    options.setdefault("aggregator", AdaCons())
    optimizer = hvd.DistributedOptimizer(recording(keras)(0.02), **options)
    model.compile(optimizer, loss="mse", **(fit or {}))
    raw: list[list[np.ndarray]] = []
    found: list[list[np.ndarray]] = []

    class Watch(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            part = slice(8 * batch, 8 * batch + 8)
            raw.append(own_gradients(model, x[part], y[part]))

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            found.append([np.asarray(v.numpy() if not hasattr(v, "cpu") else v.cpu()) for v in optimizer.seen])

    model.fit(x, y, batch_size=8, epochs=1, shuffle=False, verbose=0, callbacks=[Watch()])
    everyone = harness.gather(raw)
    assert len(found) == steps
    judge = oracle.Grouped([list(range(len(raw[0])))], **(settings or {}))
    for step in range(steps):
        off = oracle.error(found[step], judge([worker[step] for worker in everyone]))
        assert off <= tolerance, f"step {step} is off by {off:.2e}, more than {tolerance:.0e}"
    assert_equal_bits(model, optimizer)
    return optimizer


def beside_plain(
    keras: Any,
    hvd: Any,
    make_optimizer: Any,
    *,
    steps: int = 4,
    micro: int = 1,
    summed: bool = False,
    fit: dict[str, Any] | None = None,
    model_of: Any = None,
    inputs: Any = None,
    scale: str = "average",
    **options: Any,
) -> Any:
    """Train by ``model.fit``, and a twin by the oracle and the plain optimizer; they must agree.

    The twin is given, every ``micro`` batches, the oracle's result of everyone's gradients, added
    up or averaged over the batches, and knows nothing of Horovod.
    """
    import oracle

    from adacons_hvd import AdaCons

    settings = {"momentum": 0.9, "scale": scale}
    options = {"schedule": "two-pass", "check_replicas": 0, **options}  # whose graph is traced soonest
    x, y = (inputs or data)(8 * steps * micro)
    model_of = model_of or network
    model, twin = model_of(keras), model_of(keras)
    twin.set_weights(model.get_weights())
    optimizer = hvd.DistributedOptimizer(make_optimizer(), aggregator=AdaCons(**settings), **options)
    model.compile(optimizer, loss="mse", **(fit or {}))
    model.fit(x, y, batch_size=8, epochs=1, shuffle=False, verbose=0)
    plain = make_optimizer()
    if getattr(plain, "gradient_accumulation_steps", None):
        plain.gradient_accumulation_steps = None
    judge = oracle.Grouped([list(range(len(twin.trainable_weights)))], **settings)
    for step in range(steps):
        total: list[np.ndarray] = []
        for k in range(step * micro, (step + 1) * micro):
            mine = own_gradients(twin, x[8 * k : 8 * k + 8], y[8 * k : 8 * k + 8])
            total = [a + b for a, b in zip(total, mine, strict=True)] if total else mine
        if not summed:
            total = [g / micro for g in total]
        loss_scale = getattr(plain, "loss_scale_factor", None) or 1.0
        expected = [loss_scale * g for g in judge(harness.gather(total))]
        _apply(keras, plain, expected, twin.trainable_variables)
    if getattr(plain, "use_ema", False):
        plain.finalize_variable_values(twin.trainable_variables)
    for got, expected in zip(model.get_weights(), twin.get_weights(), strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-5)
    assert_equal_bits(model, optimizer)
    return optimizer


def _apply(keras: Any, optimizer: Any, gradients: Sequence[np.ndarray], variables: Sequence[Any]) -> None:
    single = [gradient.astype(np.float32) for gradient in gradients]
    if hasattr(keras, "ops"):
        optimizer.apply([keras.ops.convert_to_tensor(g) for g in single], variables)
    else:
        import tensorflow as tf

        optimizer.apply_gradients(zip(map(tf.constant, single), variables, strict=True))


def distributed(keras: Any, hvd: Any, aggregated: bool = True, **options: Any) -> Any:
    """A distributed SGD; with the schedule whose graph is traced soonest, where nothing else is asked for."""
    from adacons_hvd import AdaCons

    options.setdefault("aggregator", AdaCons() if aggregated else None)
    options.setdefault("schedule", "two-pass")
    return hvd.DistributedOptimizer(keras.optimizers.SGD(0.01), **options)


def compiled(keras: Any, optimizer: Any, **options: Any) -> Any:
    """The small model, compiled with this optimizer if there is one."""
    model = network(keras)
    if optimizer is not None:
        model.compile(optimizer, loss="mse", **options)
    return model


def fit(model: Any, steps: int = 3, **options: Any) -> Any:
    """Train by this rank's data; returns the model."""
    model.fit(*data(8 * steps), batch_size=8, shuffle=False, verbose=0, **options)
    return model


def apply(keras: Any, model: Any, step: Any, variables: Any = None) -> None:
    """Give ``step`` gradients of this rank alone, and variables of the model."""
    variables = model.trainable_variables if variables is None else variables
    gradients = [np.full(v.shape, 1.0 + harness.rank(), np.float32) for v in variables]
    if hasattr(keras, "ops"):
        step([keras.ops.convert_to_tensor(g) for g in gradients], variables)
    else:
        import tensorflow as tf

        step([tf.constant(g) for g in gradients], variables)
