"""``DistributedOptimizer`` for Keras 2, which lives on as ``tf_keras``.

Its optimizers have a place for this: ``aggregate_gradients`` (``_aggregate_gradients`` in
``tf_keras.optimizers.legacy``), through which ``apply_gradients`` passes what it is given, and
``LossScaleOptimizer``, too, before it decides whether to leave a step out.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import tensorflow as tf
import tf_keras

from .binding import Binding, Distributed, StateHolder, distributed_class, distributed_part
from .saving import save_state_in_h5

__all__ = ["wrap_legacy"]


class _Distributed(Distributed):
    """What is added to the class of an optimizer of Keras 2."""

    def aggregate_gradients(self, grads_and_vars: Iterable[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
        gradients, variables = zip(*grads_and_vars, strict=True)
        return list(zip(self._adacons.reduce(gradients, variables), variables, strict=True))

    _aggregate_gradients = aggregate_gradients

    def apply_gradients(self, grads_and_vars: Iterable[tuple[Any, Any]], *args: Any, **kwargs: Any) -> Any:
        binding = self._adacons
        if binding.passes == 1:
            return super().apply_gradients(grads_and_vars, *args, **kwargs)  # type: ignore[misc]
        gradients, variables = zip(*grads_and_vars, strict=True)
        with tf.init_scope():
            if hasattr(self, "build"):
                self.build(variables)
            else:
                self._create_all_weights(variables)

        def apply(sums: list[Any]) -> None:
            super(_Distributed, self).apply_gradients(  # type: ignore[misc]
                list(zip(sums, variables, strict=True)), *args, **kwargs
            )

        binding.accumulate(gradients, variables, apply, lambda: self.iterations.assign_add(1))
        return self.iterations

    # Keras's own, as far as they are used here.
    build: Any
    iterations: Any
    _create_all_weights: Any


def wrap_legacy(optimizer: Any, binding: Binding) -> Any:
    """Make an optimizer of ``tf_keras`` a distributed one."""
    inner = getattr(optimizer, "inner_optimizer", None)
    if inner is not None:
        optimizer._optimizer = wrap_legacy(inner, binding)
        # Its checkpoints are those of the optimizer within.
        tf.__internal__.tracking.DelegatingTrackableMixin.__init__(optimizer, optimizer._optimizer)
        return optimizer
    if distributed_part(optimizer) is not None:
        raise ValueError("this optimizer is distributed already; its gradients would be aggregated twice")
    base = type(optimizer)

    def from_config(cls: type, config: dict[str, Any], custom_objects: Any = None) -> Any:
        return wrap_legacy(base.from_config(config, custom_objects), binding.again())

    wrapped: Any = object.__new__(distributed_class(_Distributed, base, from_config))
    wrapped.__dict__.update(optimizer.__dict__)
    wrapped.__dict__["_adacons"] = binding
    state = _state_class(binding.backend)(binding.exchange)
    wrapped.adacons_state = state
    if isinstance(optimizer, tf_keras.optimizers.legacy.Optimizer):
        wrapped._track_trackable(state, "adacons_state")  # these do not track what is assigned to them
    return wrapped


@functools.cache
def _state_class(backend: Any) -> type:
    """What the aggregator remembers, as an attribute that Keras 2 and TensorFlow save.

    Keras 2 looks for such attributes among layers, metrics, optimizers and losses only; a loss is
    the one that needs nothing else.
    """

    def call(self: Any, y_true: Any, y_pred: Any) -> Any:
        raise NotImplementedError("this is no loss; it keeps an aggregator's state")

    return type("AggregatorState", (StateHolder, backend.StateBase, tf_keras.losses.Loss), {"call": call})


save_state_in_h5(tf_keras)
