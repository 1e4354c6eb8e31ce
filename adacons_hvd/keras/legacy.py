"""``DistributedOptimizer`` for Keras 2, which lives on as ``tf_keras``.

Its optimizers have a place for this: ``aggregate_gradients`` (``_aggregate_gradients`` in
``tf_keras.optimizers.legacy``), through which ``apply_gradients`` passes what it is given, and
``LossScaleOptimizer``, too, before it decides whether to leave a step out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import tensorflow as tf
import tf_keras

from .optimizer import Binding

__all__ = ["wrap_legacy"]


class LegacyState(tf_keras.losses.Loss):
    """What the aggregator remembers, as an attribute that Keras 2 saves and loads.

    Keras 2 looks for such attributes among layers, metrics, optimizers and losses only; a loss is
    the one that needs nothing else.
    """

    def __init__(self, exchange: Any) -> None:
        super().__init__(name="adacons_state")
        self._exchange = exchange

    def call(self, y_true: Any, y_pred: Any) -> Any:
        raise NotImplementedError("this is no loss; it keeps an aggregator's state")

    def save_own_variables(self, store: Any) -> None:
        import numpy as np

        for name, value in self._exchange.state_dict().items():
            store[name] = np.asarray(value)

    def load_own_variables(self, store: Any) -> None:
        names = list(store.keys())
        if "version" in names:
            self._exchange.load_state_dict({name: store[name][()] for name in names})


class _Distributed:
    """What is added to an optimizer's class. Never instantiated itself."""

    _adacons_distributed = True
    _adacons: Binding

    @property
    def aggregator(self) -> Any:
        return self._adacons.settings.aggregator

    @property
    def process_set(self) -> Any:
        return self._adacons.settings.process_set

    @property
    def report(self) -> Any:
        """A :class:`adacons_hvd.report.Report` on the last step, or None."""
        return self._adacons.exchange.report

    def register_local_var(self, variable: Any) -> None:
        """Keep the gradient of this variable each rank's own."""
        self._adacons.local.add(self._adacons.backend.key_of(variable))

    def aggregate_gradients(self, grads_and_vars: Iterable[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
        gradients, variables = zip(*grads_and_vars, strict=True)
        return list(zip(self._adacons.reduce(gradients, variables), variables, strict=True))

    def _aggregate_gradients(self, grads_and_vars: Iterable[tuple[Any, Any]]) -> list[Any]:
        gradients, variables = zip(*grads_and_vars, strict=True)
        return self._adacons.reduce(gradients, variables)

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
            if binding.average_passes:
                sums = [g if g is None else g / binding.passes for g in sums]
            super(_Distributed, self).apply_gradients(  # type: ignore[misc]
                list(zip(sums, variables, strict=True)), *args, **kwargs
            )

        binding.exchange.accumulate(gradients, variables, binding.passes, apply, lambda: self.iterations.assign_add(1))
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
        return optimizer
    base = type(optimizer)
    if issubclass(base, _Distributed):
        raise ValueError("this optimizer is distributed already; its gradients would be aggregated twice")

    def from_config(cls: type, config: dict[str, Any], custom_objects: Any = None) -> Any:
        return wrap_legacy(base.from_config(config, custom_objects), binding.again())

    cls = type(
        base.__name__,
        (_Distributed, base),
        {
            "__module__": base.__module__,
            "from_config": classmethod(from_config),
            # As in Keras 3: what is saved must load without this package.
            "__class__": property(lambda self: base),
        },
    )
    wrapped: Any = object.__new__(cls)
    wrapped.__dict__.update(optimizer.__dict__)
    wrapped.__dict__["_adacons"] = binding
    wrapped.__dict__["adacons_state"] = LegacyState(binding.exchange)
    return wrapped
