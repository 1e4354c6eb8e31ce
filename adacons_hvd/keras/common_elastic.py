"""Horovod's elastic state, for whichever Keras."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from horovod.common.elastic import ObjectState, run_fn
from horovod.common.exceptions import HorovodInternalError

from .backends import backend_of
from .binding import distributed_part
from .common_callbacks import broadcast_model

__all__ = ["make_elastic"]


def make_elastic(keras: Any, backend_name: str) -> dict[str, Any]:
    """``KerasState``, the elastic callbacks and ``run``, for this Keras."""
    module = backend_of(backend_name)
    hvd = module.hvd

    class KerasState(ObjectState):  # type: ignore[misc]
        """A model, its optimizer and its aggregator, to be committed, restored and shared.

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
            self._save_model()
            super().__init__(bcast_object=hvd.broadcast_object, get_rank=hvd.rank, **kwargs)

        def save(self) -> None:
            self._save_model()
            super().save()

        def restore(self) -> None:
            for variable, value in zip(self._variables(), self._values, strict=False):
                module.assign(variable, value)
            part = distributed_part(self.optimizer)
            if part is not None and self._aggregator:
                part._adacons.exchange.load_state_dict(self._aggregator)
            super().restore()

        def sync(self) -> None:
            broadcast_model(module, self.model, self.optimizer, 0)
            self._save_model()
            super().sync()

        def reset(self) -> None:
            """Workers have come or gone: agree anew, and trace anew what was made for their number."""
            part = distributed_part(self.optimizer)
            if part is not None:
                part._adacons.exchange.reset()
            if hasattr(self.model, "train_function"):
                self.model.train_function = None
            super().reset()

        def _variables(self) -> list[Any]:
            own = self.optimizer.variables
            return [*self.model.variables, *(own() if callable(own) else own)]

        def _save_model(self) -> None:
            self._values = [module.copy_of(variable) for variable in self._variables()]
            part = distributed_part(self.optimizer)
            self._aggregator = None if part is None else part._adacons.exchange.state_dict()

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

    def reset() -> None:
        hvd.shutdown()
        hvd.init()
        module.start_over()

    def run(function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorate an elastic training function; its first argument is the state.

        Horovod's own knows its collectives' failures by their names in TensorFlow's errors, and
        takes any other failure for a success.
        """

        @functools.wraps(function)
        def attempt(state: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return function(state, *args, **kwargs)
            except module.COLLECTIVE_ERRORS as error:
                if "Horovod" in str(error) or "adacons.tf." in str(error):
                    raise HorovodInternalError(error) from error
                raise

        wrapped: Callable[..., Any] = run_fn(attempt, reset)
        return wrapped

    made = (KerasState, CommitStateCallback, UpdateBatchStateCallback, UpdateEpochStateCallback)
    return {**{cls.__name__: cls for cls in made}, "run": run}
