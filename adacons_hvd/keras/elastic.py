"""Horovod's elastic state and callbacks, for whichever Keras; and, as this module's own, for Keras 3."""

from __future__ import annotations

from typing import Any

import keras as keras_3

from ..engine.elastic import make_run, make_state
from .backends import backend_of, keras_backend
from .binding import distributed_part
from .callbacks import build_optimizer, variables_of_optimizer

__all__ = [
    "CommitStateCallback",
    "KerasState",
    "TensorFlowKerasState",
    "UpdateBatchStateCallback",
    "UpdateEpochStateCallback",
    "run",
]


def make_elastic(keras: Any, backend_name: str) -> dict[str, Any]:
    """States, the elastic callbacks and ``run``, for this Keras."""
    module = backend_of(backend_name)
    State: Any = make_state(module)

    class KerasState(State):  # type: ignore[misc]
        """A model, its optimizer and what aggregators remember, to be committed, restored and shared.

        Args:
            model: the model, built.
            optimizer: its optimizer, if the model is not compiled with it.
            kwargs: further values to share, which become attributes.
        """

        def __init__(self, model: Any, optimizer: Any = None, **kwargs: Any) -> None:
            if not model.built:
                raise ValueError("the model must be built first: model.build(input_shape)")
            self.model = model
            self.optimizer = optimizer or model.optimizer
            # A worker that has just started has to have the variables that others share with it.
            build_optimizer(self.optimizer, model.trainable_variables)
            super().__init__(**kwargs)

        def reset(self) -> None:
            super().reset()
            part = distributed_part(self.optimizer)
            if part is not None:
                part._adacons.exchange.reset()

        def _kept_variables(self) -> list[Any]:
            return [*self.model.variables, *variables_of_optimizer(self.optimizer)]

        def _memories(self) -> list[Any]:
            part = distributed_part(self.optimizer)
            return [*super()._memories(), *([] if part is None else [part._adacons.exchange])]

    class CommitStateCallback(keras.callbacks.Callback):  # type: ignore[misc]
        """Commit ``state`` every ``batches_per_commit`` batches, and at the end of each epoch."""

        def __init__(self, state: Any, batches_per_commit: int = 1) -> None:
            super().__init__()
            self.state = state
            self.batches_per_commit = self.batches_remaining = batches_per_commit

        def on_train_begin(self, logs: Any = None) -> None:
            self.batches_remaining = self.batches_per_commit

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.batches_remaining -= 1
            if self.batches_remaining == 0:
                self.state.commit()
                self.batches_remaining = self.batches_per_commit

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.state.commit()

    class UpdateBatchStateCallback(keras.callbacks.Callback):  # type: ignore[misc]
        """Keep ``state.batch`` at the number of the batch, and shorten the epoch after a reset."""

        def __init__(self, state: Any) -> None:
            super().__init__()
            self.state = state
            self.steps_per_epoch: int | None = None

        def on_train_begin(self, logs: Any = None) -> None:
            self.steps_per_epoch = None

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            if self.params.get("steps"):
                if self.steps_per_epoch is None:
                    self.steps_per_epoch = self.params["steps"]
                self.params["steps"] = self.steps_per_epoch - self.state.batch

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.state.batch = batch

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.state.batch = 0

    class UpdateEpochStateCallback(keras.callbacks.Callback):  # type: ignore[misc]
        """Keep ``state.epoch`` at the number of the epoch, counted across resets."""

        def __init__(self, state: Any) -> None:
            super().__init__()
            self.state = state
            self.initial_epoch = state.epoch

        def on_train_begin(self, logs: Any = None) -> None:
            self.initial_epoch = self.state.epoch

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.state.epoch = self.initial_epoch + epoch + 1

    made = (KerasState, CommitStateCallback, UpdateBatchStateCallback, UpdateEpochStateCallback)
    return {**{cls.__name__: cls for cls in made}, "run": make_run(module)}


_made = make_elastic(keras_3, keras_backend())
KerasState = _made["KerasState"]
CommitStateCallback = _made["CommitStateCallback"]
UpdateBatchStateCallback = _made["UpdateBatchStateCallback"]
UpdateEpochStateCallback = _made["UpdateEpochStateCallback"]
run = _made["run"]
#: Horovod's name for what ``KerasState`` derives from.
TensorFlowKerasState = KerasState
