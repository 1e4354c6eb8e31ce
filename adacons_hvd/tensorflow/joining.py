"""``hvd.join()``, as often as one likes."""

from __future__ import annotations

import tensorflow as tf
from horovod.tensorflow import mpi_ops

from ..ops.tensorflow_graphs import make_graph

__all__ = ["join"]


def join() -> tf.Tensor:
    """Leave until every rank has called this; returns the last that did.

    For data that ends earlier on some ranks than on others. Those that go on aggregate among
    themselves; with an aggregator a rank that has left has no weight, with a plain average it
    counts as zeros, as in Horovod.

    Horovod's own works once. TensorFlow evaluates an operation without inputs beforehand and keeps
    the result, so that a second call returns at once, while other ranks still count on this one. A
    function made anew is evaluated anew.
    """
    result: tf.Tensor = make_graph(lambda: mpi_ops.join())()
    return result
