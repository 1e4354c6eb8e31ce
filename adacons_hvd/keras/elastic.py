"""Horovod's elastic state and callbacks for Keras 3."""

from __future__ import annotations

import keras

from .backends import keras_backend
from .common_elastic import make_elastic

_made = make_elastic(keras, keras_backend())
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
