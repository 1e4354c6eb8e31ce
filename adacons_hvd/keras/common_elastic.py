"""Horovod's elastic state, for whichever Keras."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from horovod.common.elastic import ObjectState, run_fn
from horovod.common.exceptions import HorovodInternalError

from .backends import backend_of
from .binding import distributed_part
from .common_callbacks import broadcast_memories, broadcast_variables, build_optimizer, variables_of_optimizer

__all__ = ["make_elastic"]


def make_elastic(keras: Any, backend_name: str) -> dict[str, Any]:
    """States, the elastic callbacks and ``run``, for this Keras."""
    module = backend_of(backend_name)
    hvd = module.hvd

    @contextlib.contextmanager
    def failures_known() -> Iterator[None]:
        """Raise what a failed collective raises as what Horovod takes for one, and nothing else.

        Horovod's own knows its collectives' failures by their names in TensorFlow's errors, and
        takes any other failure for a success.
        """
        try:
            yield
        except module.COLLECTIVE_ERRORS as error:
            if "Horovod" in str(error) or "adacons." in str(error):
                raise HorovodInternalError(error) from error
            raise

    class State(ObjectState):  # type: ignore[misc]
        """Variables and what aggregators remember, to be committed, restored and shared."""

        def __init__(self, **kwargs: Any) -> None:
            self._save_values()
            super().__init__(bcast_object=hvd.broadcast_object, get_rank=hvd.rank, **kwargs)

        def save(self) -> None:
            self._save_values()
            super().save()

        def restore(self) -> None:
            for variable, value in zip(self._kept_variables(), self._values, strict=False):
                module.assign(variable, value)
            for memory, state in zip(self._memories(), self._states, strict=True):
                memory.load_state_dict(state)
            super().restore()

        def sync(self) -> None:
            with failures_known():
                broadcast_variables(module, self._kept_variables(), 0)
                broadcast_memories(module, self._memories(), 0)
                self._save_values()
                super().sync()

        def reset(self) -> None:
            """Workers have come or gone: agree anew. For Horovod's own ``run``; ours has done so."""
            module.start_over()
            super().reset()

        def _kept_variables(self) -> list[Any]:
            raise NotImplementedError

        def _memories(self) -> list[Any]:
            return list(module.OTHER_MEMORIES)

        def _save_values(self) -> None:
            self._values = [module.copy_of(variable) for variable in self._kept_variables()]
            self._states = [memory.state_dict() for memory in self._memories()]

    class KerasState(State):
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
            return super()._memories() + ([] if part is None else [part._adacons.exchange])

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
        """Decorate an elastic training function; its first argument is the state."""

        @functools.wraps(function)
        def attempt(state: Any, *args: Any, **kwargs: Any) -> Any:
            with failures_known():
                return function(state, *args, **kwargs)

        wrapped: Callable[..., Any] = run_fn(attempt, reset)
        return wrapped

    made = (State, KerasState, CommitStateCallback, UpdateBatchStateCallback, UpdateEpochStateCallback)
    return {**{cls.__name__: cls for cls in made}, "run": run}
