"""What the Keras binding needs of TensorFlow, for Keras 3 and for ``tf_keras``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import horovod.tensorflow as hvd
import tensorflow as tf

from ..collectives.horovod_tensorflow import make_variable
from ..tensorflow.arguments import checked_groups, checked_settings
from ..tensorflow.checkpoints import StateBase, state_in_checkpoint
from ..tensorflow.reducer import Reducer, Settings, key_of, native, start_over
from ..tensorflow.tape import TapeState, local_gradient, variables_of

__all__ = [
    "StateBase",
    "checked_groups",
    "checked_settings",
    "hvd",
    "key_of",
    "local_gradient",
    "make_exchange",
    "start_over",
    "state_in_checkpoint",
    "variables_of",
]


#: What TensorFlow raises when a collective fails. Not what it raises for wrong arguments: those do
#: not become right by doing the same once more.
COLLECTIVE_ERRORS = (
    tf.errors.UnknownError,
    tf.errors.FailedPreconditionError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.InternalError,
)

#: What remembers something beside an optimizer.
OTHER_MEMORIES = (TapeState(),)


class _Exchange(Reducer):
    """A reducer, and what an optimizer needs beside it."""

    _count: tf.Variable | None = None

    def everywhere(self, condition: tf.Tensor) -> tf.Tensor:
        """Whether a condition holds on every worker."""
        if not self.settings.process_set.included():
            return condition
        self.prepare(loss_scaling=True)
        assert self._collectives is not None
        against = tf.cast(~tf.convert_to_tensor(condition), tf.int32)[None]
        against = self._collectives.allreduce(against, f"{self.name}.everywhere").wait()
        return tf.ensure_shape(against, (1,))[0] == 0

    def accumulate(
        self,
        gradients: Sequence[Any],
        variables: Sequence[Any],
        passes: int,
        apply: Callable[[list[Any]], Any],
        skip: Callable[[], Any],
    ) -> None:
        """Add gradients up; call ``apply`` with their sums every ``passes`` times, else ``skip``."""
        if self._count is None:
            with tf.init_scope():
                self._count = make_variable(tf.zeros((), tf.int64))
            self._sums: dict[Any, tf.Variable] = {}
        sums: list[tf.Variable | None] = []
        for gradient, variable in zip(gradients, variables, strict=True):
            if gradient is None:
                sums.append(None)
                continue
            key = key_of(variable)
            if key not in self._sums:
                with tf.init_scope():
                    self._sums[key] = make_variable(tf.zeros(tuple(variable.shape), gradient.dtype))
            self._sums[key].assign_add(tf.convert_to_tensor(gradient))
            sums.append(self._sums[key])
        count = self._count.assign_add(1)

        def finish() -> tf.Tensor:
            assert self._count is not None
            apply([None if total is None else total.read_value() for total in sums])
            for total in sums:
                if total is not None:
                    total.assign(tf.zeros_like(total))
            self._count.assign(0)
            return tf.constant(0)

        def wait() -> tf.Tensor:
            skip()
            return tf.constant(0)

        tf.cond(tf.equal(count, passes), finish, wait)

    def reset(self) -> None:
        super().reset()
        if self._count is not None:
            # A worker that has just started begins a sum, and so must all.
            for variable in (self._count, *self._sums.values()):
                variable.assign(tf.zeros_like(variable))


def make_exchange(settings: Settings) -> _Exchange:
    return _Exchange(settings)


def broadcast_variables(variables: Sequence[Any], root_rank: int, process_set: Any = hvd.global_process_set) -> None:
    """Give every worker the values of ``root_rank``.

    Horovod's own goes by names, which Keras may have numbered otherwise on another rank.
    """
    natives = [native(variable) for variable in variables]

    def exchange() -> None:
        for i, variable in enumerate(natives):
            name = f"adacons.broadcast.{i}"
            variable.assign(
                hvd.broadcast(variable, root_rank, name=name, ignore_name_scope=True, process_set=process_set)
            )

    tf.function(exchange, autograph=False)()


def average(values: Sequence[float]) -> list[float]:
    """The mean over all workers."""
    mean = hvd.allreduce(tf.constant(list(values), tf.float64), op=hvd.Average, name="adacons.metrics")
    result: list[float] = mean.numpy().tolist()
    return result


def broadcast_object(value: Any, root_rank: int, name: str) -> Any:
    return hvd.broadcast_object(value, root_rank, name=name)


def copy_of(variable: Any) -> Any:
    return tf.identity(native(variable))


def assign(variable: Any, value: Any) -> None:
    native(variable).assign(value)
