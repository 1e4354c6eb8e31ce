"""What Horovod's ``horovod.keras`` offers but Keras 3 no longer can, on TensorFlow.

Cannot be imported where ``tf.keras`` does not compute with TensorFlow; the error says what to do.
"""

from __future__ import annotations

from horovod.tensorflow.mpi_ops import ProcessSet, add_process_set, global_process_set, remove_process_set

from .backends import require_tensorflow

__all__ = ["ProcessSet", "add_process_set", "broadcast_global_variables", "global_process_set", "remove_process_set"]

require_tensorflow()


def broadcast_global_variables(root_rank: int) -> None:
    """TensorFlow 2 has no global variables, so this is an error that says what to use."""
    raise RuntimeError(
        "broadcast_global_variables() is for TensorFlow 1. Use BroadcastGlobalVariablesCallback, or "
        "hvd.broadcast_variables() of adacons_hvd.tensorflow."
    )
