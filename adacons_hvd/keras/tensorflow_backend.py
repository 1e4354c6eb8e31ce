"""The parts of the Keras binding that need TensorFlow, for Keras 3 and for ``tf_keras``.

This cannot be imported where ``tf.keras`` does not compute with TensorFlow; the error
says what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from ..collectives.horovod_tensorflow import make_variable
from ..engine.settings import Settings
from ..tensorflow import checkpoints, errors, tape
from ..tensorflow.checkpoints import state_in_checkpoint as state_in_checkpoint
from ..tensorflow.reducer import Reducer
from ..tensorflow.sharing import COLLECTIVE_ERRORS as COLLECTIVE_ERRORS
from ..tensorflow.sharing import OTHER_MEMORIES as OTHER_MEMORIES
from ..tensorflow.sharing import assign as assign
from ..tensorflow.sharing import average as average
from ..tensorflow.sharing import broadcast_object as broadcast_object
from ..tensorflow.sharing import broadcast_variables as broadcast_variables
from ..tensorflow.sharing import copy_of as copy_of
from ..tensorflow.sharing import hvd as hvd
from ..tensorflow.sharing import start_over as start_over
from ..tensorflow.tape import local_gradient as local_gradient
from ..tensorflow.variables import VARIABLES, key_of, native
from .backends import require_tensorflow

require_tensorflow()

StateBase: type = checkpoints.StateBase

NAME = "tensorflow"

#: Has AutoGraph leave a function as it is. (XLA cannot compile it, and says so.)
untraced = tf.autograph.experimental.do_not_convert


class _Exchange(Reducer):
    """A reducer, and what an optimizer needs beside it."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._count: tf.Variable | None = None
        self._sums: dict[Any, tf.Variable] = {}

    def everywhere(self, condition: tf.Tensor) -> tf.Tensor:
        """Whether a condition holds on every worker."""
        if not self.settings.process_set.included():
            return condition
        session, self._loss_scaling = self.session(), True
        against = tf.cast(~tf.convert_to_tensor(condition), tf.int32)[None]
        against = session.collectives.allreduce(against, f"{session.name}.everywhere").wait()
        return tf.ensure_shape(against, (1,))[0] == 0

    @property
    def count(self) -> tf.Variable:
        """How many steps' gradients have been added up."""
        if self._count is None:
            with tf.init_scope():
                self._count = make_variable(tf.zeros((), tf.int64))
        return self._count

    def accumulate(
        self,
        gradients: Sequence[Any],
        variables: Sequence[Any],
        passes: int,
        apply: Callable[[list[Any]], Any],
        skip: Callable[[], Any],
    ) -> None:
        """Add gradients up; call ``apply`` with their sums every ``passes`` times, else ``skip``."""
        sums = self._add(gradients, variables)

        def finish() -> tf.Tensor:
            apply(self._take(sums))
            return tf.constant(0)

        def wait() -> tf.Tensor:
            skip()
            return tf.constant(0)

        tf.cond(tf.equal(self.count, passes), finish, wait)

    def accumulated(
        self,
        gradients: Sequence[Any],
        variables: Sequence[Any],
        passes: int,
        finish: Callable[[list[Any]], list[Any]],
    ) -> list[Any]:
        """Add gradients up; what ``finish`` makes of their sums every ``passes`` times, else the sums so far."""
        sums = self._add(gradients, variables)
        # A graph has gradients for the same variables in either case: where some rank has any. Which these are is
        # known once the first branch is traced.
        known = [i for i, total in enumerate(sums) if total is not None]

        def finished() -> list[tf.Tensor]:
            results = finish(self._take(sums))
            known[:] = [i for i, result in enumerate(results) if result is not None]
            return [tf.convert_to_tensor(results[i]) for i in known]

        def so_far() -> list[tf.Tensor]:
            values = _values(sums)
            return [tf.zeros_like(native(variables[i])) if values[i] is None else values[i] for i in known]

        found = tf.cond(tf.equal(self.count, passes), finished, so_far)
        everything: list[Any] = [None] * len(sums)
        for index, gradient in zip(known, found, strict=True):
            everything[index] = gradient
        return everything

    def _add(self, gradients: Sequence[Any], variables: Sequence[Any]) -> list[tf.Variable | None]:
        """Add to the sums, and count; the sums of these variables, None without a gradient."""
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
        self.count.assign_add(1)
        return sums

    def _take(self, sums: Sequence[tf.Variable | None]) -> list[tf.Tensor | None]:
        """The sums; new ones begin, whatever becomes of these."""
        values = _values(sums)
        for total in sums:
            if total is not None:
                total.assign(tf.zeros_like(total))
        self.count.assign(0)
        return values

    def stray(self, how: str, variables: Sequence[Any] = ()) -> None:
        """Tell the other ranks of a step along gradients that were never aggregated, and raise the error on all."""
        super().stray(how)

    def reset(self) -> None:
        super().reset()
        if self._count is not None:
            # A worker that has just started begins a sum, and so must all.
            for variable in (self._count, *self._sums.values()):
                variable.assign(tf.zeros_like(variable))


def _values(variables: Sequence[tf.Variable | None]) -> list[tf.Tensor | None]:
    return [None if variable is None else variable.read_value() for variable in variables]


def make_exchange(settings: Settings) -> _Exchange:
    return _Exchange(settings)


def checked_settings(**given: Any) -> Settings:
    """The settings, or an error that names the argument and the value."""
    return Settings.checked(VARIABLES, hvd, **given)


def decoded(error: Exception) -> Exception | None:
    """The error that a graph has found, which TensorFlow can only tell as one of its own."""
    return errors.decoded(error) if isinstance(error, tf.errors.OpError) else None


def is_aggregated_elsewhere(variables: Sequence[Any]) -> bool:
    """Whether a ``DistributedGradientTape`` aggregates the gradients of one of these variables."""
    keys, known = set(map(key_of, variables)), list[Any](tape._reducers)
    return any(key in keys for *_, sources in known for key, _ in sources)


def broadcast_global_variables(root_rank: int) -> None:
    """TensorFlow 2 has no global variables, so this is an error that says what to use."""
    raise RuntimeError(
        "broadcast_global_variables() is for TensorFlow 1. Use BroadcastGlobalVariablesCallback, or "
        "hvd.broadcast_variables() of adacons_hvd.tensorflow."
    )
