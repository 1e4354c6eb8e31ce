"""Horovod's callbacks for Keras 3, and :class:`AggregationLogger`."""

from __future__ import annotations

import keras

from .backends import keras_backend
from .common_callbacks import make_callbacks

_made = make_callbacks(keras, keras_backend())
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
