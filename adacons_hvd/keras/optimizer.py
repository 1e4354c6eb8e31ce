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
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from ..aggregators import Aggregator
from .backends import backend_of, keras_backend

__all__ = ["Distributed", "distributed_part", "wrap"]


class Binding:
    """What an optimizer needs to aggregate. A plain object, so that Keras tracks none of it."""

    def __init__(
        self,
        backend: Any,
        settings: Any,
        passes: int,
        average_passes: bool,
        scale_local: bool,
        local: Sequence[Any] = (),
    ) -> None:
        if passes <= 0:
            raise ValueError(f"backward_passes_per_step must be positive, got {passes!r}")
        self.backend = backend
        self.settings = settings
        self.passes = passes
        self.average_passes = average_passes
        self.scale_local = scale_local
        self.local = {backend.key_of(variable) for variable in local}
        self.exchange = backend.make_exchange(settings)
        #: The variables Keras is about to update; set while it does.
        self.variables: Sequence[Any] = ()

    def again(self) -> Binding:
        """The same settings for another optimizer."""
        other = Binding(self.backend, self.settings, self.passes, self.average_passes, self.scale_local)
        other.local = set(self.local)
        return other

    def reduce(self, gradients: Sequence[Any], variables: Sequence[Any], unscale: Any = 1.0) -> list[Any]:
        """Everyone's gradients, except for local variables."""
        gradients = list(gradients)
        shared = [i for i, v in enumerate(variables) if self.backend.key_of(v) not in self.local]
        for i in set(range(len(gradients))) - set(shared):
            gradients[i] = self.backend.local_gradient(gradients[i], self.settings.process_set, self.scale_local)
        if shared:
            mine = [gradients[i] for i in shared]
            theirs = self.exchange.reduce(mine, [variables[i] for i in shared], unscale)
            for i, gradient in zip(shared, theirs, strict=True):
                gradients[i] = gradient
        return gradients


# Not exported by name, but the base of all that is.
_Saveable: Any = next(cls for cls in keras.optimizers.Optimizer.__mro__ if cls.__name__ == "KerasSaveable")


class AggregatorState(_Saveable):
    """What the aggregator remembers, as an attribute that Keras saves and loads.

    It has its own place in a ``.keras`` file, beside the optimizer's variables. An optimizer
    without it looks for no such place, so the file loads without this package, too.
    """

    def __init__(self, exchange: Any) -> None:
        self._exchange = exchange

    def _obj_type(self) -> str:
        return "Optimizer"

    def save_own_variables(self, store: Any) -> None:
        import numpy as np

        for name, value in self._exchange.state_dict().items():
            store[name] = np.asarray(value)

    def load_own_variables(self, store: Any) -> None:
        names = list(store.keys())
        if "version" in names:
            self._exchange.load_state_dict({name: store[name][()] for name in names})


class Distributed:
    """What is added to an optimizer's class. Never instantiated itself."""

    _base: type
    _adacons: Binding
    #: Where Keras finds what to save; see :class:`AggregatorState`.
    adacons_state: AggregatorState

    @property
    def aggregator(self) -> Aggregator | None:
        found: Aggregator | None = self._adacons.settings.aggregator
        return found

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
            return super().apply(grads, trainable_variables)  # type: ignore[misc]
        if binding.passes == 1:
            return self._apply_aggregated(grads, variables)
        binding.exchange.accumulate(
            grads,
            variables,
            binding.passes,
            lambda sums: self._apply_aggregated(sums, variables),
            lambda: self._iterations.assign_add(1),
        )
        return None

    def _apply_aggregated(self, gradients: Sequence[Any], variables: Sequence[Any]) -> Any:
        binding = self._adacons
        if binding.passes > 1 and binding.average_passes:
            gradients = [g if g is None else g / binding.passes for g in gradients]
        unscale = 1.0 if self.loss_scale_factor is None else 1 / self.loss_scale_factor
        return super().apply(binding.reduce(gradients, variables, unscale), variables)  # type: ignore[misc]

    def _backend_apply_gradients(self, grads: Sequence[Any], trainable_variables: Sequence[Any]) -> Any:
        self._adacons.variables = trainable_variables
        return super()._backend_apply_gradients(grads, trainable_variables)  # type: ignore[misc]

    def _clip_gradients(self, grads: Sequence[Any]) -> Any:
        if self.gradient_accumulation_steps:
            grads = self._adacons.reduce(grads, self._adacons.variables)
        return super()._clip_gradients(grads)  # type: ignore[misc]

    def load_aggregator_state(self, state: Mapping[str, Any]) -> None:
        self._adacons.exchange.load_state_dict(state)

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
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        # What has to be aggregated are true gradients, so it is done by the optimizer within.
        optimizer.inner_optimizer = wrap(optimizer.inner_optimizer, binding)
        return optimizer
    if distributed_part(optimizer) is not None:
        raise ValueError("this optimizer is distributed already; its gradients would be aggregated twice")
    base = type(optimizer)

    def from_config(cls: type, config: dict[str, Any], custom_objects: Any = None) -> Any:
        plain = base.from_config(config) if custom_objects is None else base.from_config(config, custom_objects)
        return wrap(plain, binding.again())

    cls = type(
        base.__name__,
        (Distributed, base),
        {
            "_base": base,
            "__module__": base.__module__,
            "from_config": classmethod(from_config),
            # Keras writes an object's __class__ into files. Were it not the class that was wrapped,
            # what is saved could not be loaded without this package. type() still tells.
            "__class__": property(lambda self: base),
        },
    )
    # The result takes over what the optimizer holds instead of being constructed anew from its
    # configuration, so variables it has built and state it has gathered all stay.
    wrapped: Any = object.__new__(cls)
    wrapped.__dict__.update(optimizer.__dict__)
    wrapped.__dict__["_adacons"] = binding
    wrapped.__dict__["adacons_state"] = AggregatorState(binding.exchange)
    return wrapped


def distributed_part(optimizer: Any) -> Any:
    """The distributed optimizer that this is, or that is within it; None if there is none."""
    while optimizer is not None:
        if hasattr(type(optimizer), "_adacons_distributed") or issubclass(type(optimizer), Distributed):
            return optimizer
        optimizer = getattr(optimizer, "inner_optimizer", None)
    return None


# --- what Keras decides before it asks the optimizer ----------------------------------------------
#
# Both functions below leave every optimizer alone that is not distributed.


def _check_finite_everywhere() -> None:
    cls = keras.optimizers.LossScaleOptimizer
    original = cls.check_finite

    def check_finite(self: Any, grads: Sequence[Any]) -> Any:
        finite = original(self, grads)
        part = distributed_part(self)
        return finite if part is None else part._adacons.exchange.everywhere(finite)

    cls.check_finite = check_finite


def _compile_without_xla() -> None:
    # Keras compares a model's compile with this class's, to see whether a model has its own.
    trainer: Any = next(cls for cls in reversed(keras.Model.__mro__) if "compile" in vars(cls))
    original = trainer.compile

    @functools.wraps(original)
    def compile(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: A001 - Keras's name
        original(self, *args, **kwargs)
        if distributed_part(self.optimizer) is None or not self.jit_compile:
            return
        asked = args[7] if len(args) > 7 else kwargs.get("jit_compile", "auto")
        self.jit_compile = False
        warnings.warn(
            "Horovod's operations cannot be compiled by XLA, so this model trains with jit_compile=False"
            + ("" if asked == "auto" else f" instead of jit_compile={asked!r}")
            + ".",
            stacklevel=2,
        )

    trainer.compile = compile


_check_finite_everywhere()
_compile_without_xla()


def make_binding(
    *,
    num_groups: int,
    groups: Any,
    backward_passes_per_step: int,
    average_aggregated_gradients: bool,
    scale_local_gradients: bool,
    local_layers: Any = None,
    backend: str | None = None,
    **settings: Any,
) -> Binding:
    """A binding from the arguments of ``DistributedOptimizer``."""
    module = backend_of(backend or keras_backend())
    return Binding(
        module,
        module.checked_settings(groups=module.checked_groups(groups, num_groups), **settings),
        backward_passes_per_step,
        average_aggregated_gradients,
        scale_local_gradients,
        module.variables_of(local_layers),
    )
