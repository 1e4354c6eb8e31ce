"""Horovod's elastic state and callbacks for ``tf.keras``, whichever Keras that is."""

from __future__ import annotations

import tensorflow as tf

from ...keras.elastic import make_elastic

_made = make_elastic(tf.keras, "tensorflow")
KerasState = _made["KerasState"]
CommitStateCallback = _made["CommitStateCallback"]
UpdateBatchStateCallback = _made["UpdateBatchStateCallback"]
UpdateEpochStateCallback = _made["UpdateEpochStateCallback"]
run = _made["run"]
#: Horovod's name for what ``KerasState`` derives from.
TensorFlowKerasState = KerasState

__all__ = [
    "CommitStateCallback",
    "KerasState",
    "TensorFlowKerasState",
    "UpdateBatchStateCallback",
    "UpdateEpochStateCallback",
    "run",
]
