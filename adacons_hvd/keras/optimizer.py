"""``DistributedOptimizer`` for Keras 3: what ``model.fit`` really calls, for all workers.

Keras 3 knows nothing of ``_compute_gradients``, which Horovod overrides: with Horovod's own
optimizer every rank trains alone. An optimizer's one entrance in Keras 3 is ``apply``; that is
where gradients of all workers take the place of this worker's. What Keras does after that
(clipping, weight decay, moving averages) then works on equal numbers everywhere.

Two things come before ``apply`` or go around it:

* A ``LossScaleOptimizer`` around the optimizer, which ``compile`` adds under ``mixed_float16``,
  looks at the gradients first and leaves a step out where they overflow. Ranks must decide that
  together, so its ``check_finite`` asks everyone.
* ``gradient_accumulation_steps`` adds gradients up inside ``apply``. They are aggregated when the
  sum is complete, just before it is clipped.

For these, and only for these, this module needs what Keras keeps to itself: an optimizer's
``_iterations`` (``iterations`` is another number where gradients accumulate), the variables it was
built for (``_trainable_variables``), and its methods ``_backend_apply_gradients`` and
``_clip_gradients``, which enclose the accumulation. The former is also where every step of every
optimizer comes by, so that is where steps are found out that were never aggregated.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import keras

from .backends import backend_of, keras_backend
from .binding import (
    Binding,
    Distributed,
    DistributedWithin,
    StateHolder,
    become,
    binding_of,
    check_step,
    distributed_part,
)
from .models import keep_distributed, keep_distributed_within, save_state_in_h5, watch_steps

__all__ = ["wrap"]

_backend = backend_of(keras_backend())

# The base of all that Keras saves is not exported by name.
_Saveable: Any = next(cls for cls in keras.optimizers.Optimizer.__mro__ if cls.__name__ == "KerasSaveable")


class _Distributed(Distributed):
    """The base that is added to the class of an optimizer of Keras 3."""

    #: Where Keras finds what to save.
    adacons_state: Any

    @_backend.untraced
    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> Any:
        binding = self._adacons
        if len(grads) == 0:
            return super().apply(grads, trainable_variables)  # type: ignore[misc]
        if any(getattr(v, "overwrite_with_gradient", False) for v in trainable_variables or ()):
            raise NotImplementedError(
                "float8 training passes statistics of each rank off as gradients, which cannot be aggregated"
            )
        if not self.built and trainable_variables is not None:
            with keras.name_scope(self.name, caller=self):
                self.build(list(trainable_variables))
        variables = self._trainable_variables if trainable_variables is None else list(trainable_variables)
        if self.gradient_accumulation_steps:
            if binding.passes > 1:
                raise ValueError(
                    "gradient_accumulation_steps and backward_passes_per_step both add gradients up; set one of them"
                )
            with binding.step():
                return super().apply(grads, trainable_variables)  # type: ignore[misc]
        if binding.passes == 1:
            return self._apply_aggregated(grads, variables)
        binding.accumulate(
            grads,
            variables,
            lambda sums: self._apply_aggregated(sums, variables),
            lambda: self._iterations.assign_add(1),
        )
        return None

    def _apply_aggregated(self, gradients: Sequence[Any], variables: Sequence[Any]) -> Any:
        unscale = 1.0 if self.loss_scale_factor is None else 1 / self.loss_scale_factor
        with self._adacons.step():
            return super().apply(self._adacons.reduce(gradients, variables, unscale), variables)  # type: ignore[misc]

    def _backend_apply_gradients(self, grads: Sequence[Any], trainable_variables: Sequence[Any]) -> Any:
        self._adacons.variables = trainable_variables
        return super()._backend_apply_gradients(grads, trainable_variables)  # type: ignore[misc]

    def _clip_gradients(self, grads: Sequence[Any]) -> Any:
        if self.gradient_accumulation_steps:
            grads = self._adacons.reduce(grads, self._adacons.variables)
        return super()._clip_gradients(grads)  # type: ignore[misc]

    # Keras's own, as far as they are used here.
    built: bool
    name: str
    gradient_accumulation_steps: int | None
    loss_scale_factor: float | None
    _iterations: Any
    _trainable_variables: Any
    build: Any


def wrap(optimizer: Any, binding: Binding) -> Any:
    """Make an optimizer of Keras 3 a distributed one."""
    if distributed_part(optimizer) is not None:
        raise ValueError("this optimizer is distributed already; its gradients would be aggregated twice")
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        # What has to be aggregated are true gradients, so it is done by the optimizer within.
        wrap(optimizer.inner_optimizer, binding)
        become(optimizer, DistributedWithin, binding, wrap)
        return optimizer
    become(optimizer, _Distributed, binding, wrap)
    optimizer.__dict__["_adacons"] = binding
    # Assigned as users assign attributes, so that TensorFlow's checkpoints find it, too.
    optimizer.adacons_state = _state_class()(binding.exchange)
    return optimizer


@functools.cache
def _state_class() -> type:
    """The class of the aggregator's memory, as something that Keras and the backend save."""

    def _obj_type(self: Any) -> str:
        return "Optimizer"

    return type("AggregatorState", (StateHolder, _Saveable, _backend.StateBase), {"_obj_type": _obj_type})


# --- what Keras does with optimizers, distributed or not --------------------------------------------


def _check_finite_everywhere() -> None:
    cls = keras.optimizers.LossScaleOptimizer
    original = cls.check_finite

    @_backend.untraced
    def everywhere(binding: Binding, finite: Any) -> Any:
        return binding.exchange.everywhere(finite)

    def check_finite(self: Any, grads: Sequence[Any]) -> Any:
        binding, finite = binding_of(self), original(self, grads)
        return finite if binding is None else everywhere(binding, finite)

    cls.check_finite = check_finite


def _check_steps() -> None:
    name = "_backend_apply_gradients"
    cls: Any = next(cls for cls in keras.optimizers.Optimizer.__mro__ if name in vars(cls))
    original = getattr(cls, name)

    @_backend.untraced
    def check(optimizer: Any, variables: Sequence[Any]) -> None:
        distributed = issubclass(type(optimizer), Distributed)
        check_step(_backend, optimizer, optimizer._adacons if distributed else None, variables)

    @functools.wraps(original)
    def _backend_apply_gradients(self: Any, grads: Sequence[Any], trainable_variables: Sequence[Any]) -> Any:
        check(self, trainable_variables)
        return original(self, grads, trainable_variables)

    setattr(cls, name, _backend_apply_gradients)


_check_finite_everywhere()
_check_steps()
watch_steps(keras)
keep_distributed(keras, wrap)
keep_distributed_within(keras.optimizers.LossScaleOptimizer, wrap)
save_state_in_h5(keras)
