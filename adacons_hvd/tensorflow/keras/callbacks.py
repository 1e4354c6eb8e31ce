"""Horovod's callbacks for ``tf.keras``, whichever Keras that is, and :class:`AggregationLogger`."""

from __future__ import annotations

import tensorflow as tf

from ...keras.callbacks import make_callbacks

_made = make_callbacks(tf.keras, "tensorflow")
AggregationLogger = _made["AggregationLogger"]
BestModelCheckpoint = _made["BestModelCheckpoint"]
BroadcastGlobalVariablesCallback = _made["BroadcastGlobalVariablesCallback"]
LearningRateScheduleCallback = _made["LearningRateScheduleCallback"]
LearningRateWarmupCallback = _made["LearningRateWarmupCallback"]
MetricAverageCallback = _made["MetricAverageCallback"]

__all__ = [
    "AggregationLogger",
    "BestModelCheckpoint",
    "BroadcastGlobalVariablesCallback",
    "LearningRateScheduleCallback",
    "LearningRateWarmupCallback",
    "MetricAverageCallback",
]
