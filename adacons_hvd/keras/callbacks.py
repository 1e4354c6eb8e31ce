"""Horovod's callbacks: mixins that are joined with the ``Callback`` of whichever Keras, here with that of Keras 3.

Horovod's own call what Keras 3 no longer has (``optimizer.lr``, ``backend.get_value``,
``optimizer.variables()``), so most of them stop the training under Keras 3 with an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras as keras_3

from ..engine.elastic import share_memories, share_variables
from .backends import Backend, backend_of, keras_backend
from .binding import distributed_part

__all__ = [
    "AggregationLogger",
    "BestModelCheckpoint",
    "BroadcastGlobalVariablesCallback",
    "LearningRateScheduleCallback",
    "LearningRateWarmupCallback",
    "MetricAverageCallback",
]

Logs = dict[str, Any]


class _Mixin:
    #: ``"tensorflow"`` or ``"torch"``.
    backend_name: str
    model: Any
    params: Mapping[str, Any]

    @property
    def backend_module(self) -> Backend:
        return backend_of(self.backend_name)


class _BroadcastGlobalVariablesCallback(_Mixin):
    """Start every rank with the variables of ``root_rank``, and with its aggregator's memory.

    Before the first step, if by then all ranks have built their model; else after it, as in
    Horovod. States of random number generators stay each rank's own.
    """

    def __init__(self, root_rank: int, device: str = "", local_variables: Any = None) -> None:
        super().__init__()
        self.root_rank = root_rank
        self.device = device
        self.broadcast_done = False
        self._local: set[int] = set()
        if local_variables is not None and not isinstance(local_variables, (list, tuple, set)):
            local_variables = [local_variables]
        for variable in local_variables or ():
            self.register_local_var(variable)

    def register_local_var(self, variable: Any) -> None:
        """Leave this variable as it is on every rank."""
        self._local.add(id(variable))

    def on_train_begin(self, logs: Logs | None = None) -> None:
        if self.broadcast_done:
            return
        if self.model.built:
            build_optimizer(self.model.optimizer, self.model.trainable_variables)
        # One rank may have loaded its model, and another make it in the first step.
        if self.backend_module.average([float(not self.model.built)]) == [0.0]:
            self._broadcast()

    def on_train_batch_end(self, batch: int, logs: Logs | None = None) -> None:
        if not self.broadcast_done:
            self._broadcast()

    def _broadcast(self) -> None:
        optimizer, module = self.model.optimizer, self.backend_module
        variables = [v for v in self.model.variables if id(v) not in self._local]
        share_variables(module, [*variables, *variables_of_optimizer(optimizer)], self.root_rank)
        part = distributed_part(optimizer)
        if part is not None:
            share_memories(module, [part._adacons.exchange], self.root_rank)
        self.broadcast_done = True


class _MetricAverageCallback(_Mixin):
    """Average what is logged at the end of an epoch over all ranks.

    Put it before callbacks that act on logs, such as ``ReduceLROnPlateau``.
    """

    def __init__(self, device: str = "") -> None:
        super().__init__()
        self.device = device

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        names = sorted(logs or {})
        if logs is not None and names:
            for name, mean in zip(names, self.backend_module.average([float(logs[n]) for n in names]), strict=True):
                logs[name] = mean


class _LearningRateScheduleCallback(_Mixin):
    """Set the learning rate to ``initial_lr * multiplier(epoch)``, as in Horovod.

    ``multiplier`` may be a number, the factor per epoch. With ``staircase`` the rate changes once
    an epoch, else every batch. With ``momentum_correction`` an optimizer with momentum keeps the
    momentum of its weights when the rate changes: Horovod multiplies the coefficient for one
    step, which no longer reaches a compiled step; here the velocities are multiplied, which is
    the same.
    """

    def __init__(
        self,
        initial_lr: float,
        multiplier: float | Callable[[float], float],
        start_epoch: int = 0,
        end_epoch: int | None = None,
        staircase: bool = True,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
    ) -> None:
        super().__init__()
        if initial_lr is None:
            raise ValueError("initial_lr is required")
        self.initial_lr = initial_lr
        self.start_epoch = start_epoch
        self.end_epoch = end_epoch
        self.staircase = staircase
        self.momentum_correction = momentum_correction
        self.steps_per_epoch = steps_per_epoch
        self.current_epoch = 0
        if callable(multiplier):
            self.multiplier: Callable[[float], float] = multiplier
        else:
            factor = float(multiplier)
            self.multiplier = lambda epoch: factor ** (epoch - start_epoch)

    def on_train_begin(self, logs: Logs | None = None) -> None:
        if not self.staircase and not self.steps_per_epoch:
            self.steps_per_epoch = self.params.get("steps")
            if not self.steps_per_epoch:
                raise ValueError(f"{type(self).__name__} cannot tell how many steps an epoch has; give steps_per_epoch")

    def on_epoch_begin(self, epoch: int, logs: Logs | None = None) -> None:
        self.current_epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: Logs | None = None) -> None:
        beyond = self.end_epoch is not None and self.current_epoch >= self.end_epoch
        if self.current_epoch < self.start_epoch or beyond:
            return
        if not self.staircase:
            assert self.steps_per_epoch is not None
            self._adjust(self.current_epoch + batch / self.steps_per_epoch)
        elif batch == 0:
            self._adjust(self.current_epoch)

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        if logs is not None:
            logs["lr"] = self.learning_rate

    @property
    def learning_rate(self) -> float:
        rate: Any = self.model.optimizer.learning_rate
        value: float = float(rate.numpy() if hasattr(rate, "numpy") else rate)
        return value

    def _adjust(self, epoch: float) -> None:
        old, new = self.learning_rate, self.initial_lr * self.multiplier(epoch)
        optimizer = self.model.optimizer
        optimizer.learning_rate = new
        inner = getattr(optimizer, "inner_optimizer", optimizer)
        if self.momentum_correction and old and old != new and getattr(inner, "momentum", 0):
            for velocity in _velocities(inner, self.model.trainable_variables):
                velocity.assign(velocity * (new / old))


def _velocities(optimizer: Any, variables: Any) -> list[Any]:
    """The velocities that an SGD optimizer with momentum adds to variables."""
    if hasattr(optimizer, "get_slot"):  # of tf_keras.optimizers.legacy
        slots = [optimizer.get_slot(variable, "momentum") for variable in variables]
        return [slot for slot in slots if slot is not None]
    return getattr(optimizer, "momentums", [])


class _LearningRateWarmupCallback(_LearningRateScheduleCallback):
    """Raise the learning rate from ``initial_lr / size`` to ``initial_lr``, as in Horovod."""

    def __init__(
        self,
        initial_lr: float,
        warmup_epochs: int = 5,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
        verbose: int = 0,
    ) -> None:
        def multiplier(epoch: float) -> float:
            size = self.backend_module.hvd.size()
            # As in Horovod: round numbers at the end of each epoch.
            assert self.steps_per_epoch is not None
            epoch += 1 / self.steps_per_epoch
            return float((epoch * (size - 1) / warmup_epochs + 1) / size)

        super().__init__(
            initial_lr,
            multiplier,
            end_epoch=warmup_epochs,
            staircase=False,
            momentum_correction=momentum_correction,
            steps_per_epoch=steps_per_epoch,
        )
        self.verbose = verbose

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        super().on_epoch_end(epoch, logs)
        finished = self.end_epoch is not None and epoch == self.end_epoch - 1
        if finished and self.verbose > 0 and self.backend_module.hvd.rank() == 0:
            print(f"\nEpoch {epoch + 1}: finished gradual learning rate warmup to {self.learning_rate:g}.")


class _AggregationLogger(_Mixin):
    """Put the aggregator's spread and fallbacks into ``logs``.

    ``adacons_spread`` is how differently the workers counted in the last step, 0 if equally, and
    ``adacons_fallbacks`` how many steps so far were plain averages; see
    :class:`adacons_hvd.report.Report`. Progress bars, TensorBoard and CSV loggers show them. Put
    it before callbacks that act on logs.

    Args:
        every: ``"epoch"``, or ``"batch"``, which makes the host wait for the device every step.
    """

    def __init__(self, every: str = "epoch") -> None:
        super().__init__()
        if every not in ("epoch", "batch"):
            raise ValueError(f'every must be "epoch" or "batch", got {every!r}')
        self.every = every

    def on_train_batch_end(self, batch: int, logs: Logs | None = None) -> None:
        if self.every == "batch":
            self._add(logs)

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        self._add(logs)

    def _add(self, logs: Logs | None) -> None:
        part = distributed_part(self.model.optimizer)
        report = None if part is None else part.report
        if logs is not None and report is not None:
            logs["adacons_spread"] = max(report.spread)
            logs["adacons_fallbacks"] = report.fallbacks


def build_optimizer(optimizer: Any, variables: Sequence[Any]) -> None:
    """Have an optimizer make its variables now, not in its first step."""
    if hasattr(optimizer, "_create_all_weights"):  # of tf_keras.optimizers.legacy
        optimizer._create_all_weights(variables)
    elif not getattr(optimizer, "built", False):
        optimizer.build(list(variables))


def variables_of_optimizer(optimizer: Any) -> list[Any]:
    own = optimizer.variables
    return list(own() if callable(own) else own)


def make_callbacks(keras: Any, backend_name: str) -> dict[str, type]:
    """The callbacks, as classes of this Keras."""
    mixins = {
        "AggregationLogger": _AggregationLogger,
        "BroadcastGlobalVariablesCallback": _BroadcastGlobalVariablesCallback,
        "LearningRateScheduleCallback": _LearningRateScheduleCallback,
        "LearningRateWarmupCallback": _LearningRateWarmupCallback,
        "MetricAverageCallback": _MetricAverageCallback,
    }
    made: dict[str, type] = {
        name: type(
            name,
            (mixin, keras.callbacks.Callback),
            {"__doc__": mixin.__doc__, "__module__": __name__, "backend_name": backend_name},
        )
        for name, mixin in mixins.items()
    }

    class BestModelCheckpoint(keras.callbacks.ModelCheckpoint):  # type: ignore[misc]
        """Keras's ``ModelCheckpoint`` with ``save_best_only``; set ``filepath`` before training."""

        def __init__(
            self,
            monitor: str = "val_loss",
            verbose: int = 0,
            save_weights_only: bool = False,
            mode: str = "auto",
            save_freq: str | int = "epoch",
            filepath: str = "",
        ) -> None:
            super().__init__(
                filepath=filepath or ("best.weights.h5" if save_weights_only else "best.keras"),
                monitor=monitor,
                verbose=verbose,
                save_best_only=True,
                save_weights_only=save_weights_only,
                mode=mode,
                save_freq=save_freq,
            )

    made["BestModelCheckpoint"] = BestModelCheckpoint
    return made


_made = make_callbacks(keras_3, keras_backend())
AggregationLogger = _made["AggregationLogger"]
BestModelCheckpoint = _made["BestModelCheckpoint"]
BroadcastGlobalVariablesCallback = _made["BroadcastGlobalVariablesCallback"]
LearningRateScheduleCallback = _made["LearningRateScheduleCallback"]
LearningRateWarmupCallback = _made["LearningRateWarmupCallback"]
MetricAverageCallback = _made["MetricAverageCallback"]
