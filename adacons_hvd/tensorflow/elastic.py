"""All of ``horovod.tensorflow.elastic``, with what Keras 3 needs."""

from __future__ import annotations

import tensorflow as tf
from horovod.common.exceptions import HorovodInternalError
from horovod.tensorflow.elastic import ObjectState, TensorFlowState

from ..keras.common_elastic import make_elastic

_made = make_elastic(tf.keras, "tensorflow")
TensorFlowKerasState = _made["KerasState"]
run = _made["run"]

__all__ = ["HorovodInternalError", "ObjectState", "TensorFlowKerasState", "TensorFlowState", "run"]
