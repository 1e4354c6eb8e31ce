"""Collectives over ``horovod.tensorflow``.

Meant for the inside of a ``tf.function``: there each collective is a node, and starts as soon as
its input exists. Horovod knows a collective by its node's name, which is given here without the
scopes around it, because those may differ between ranks. Outside, TensorFlow names every operation
after its type; only :meth:`HorovodTensorFlow.allgather_bytes` is for there, and makes a function.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from horovod.tensorflow import mpi_ops as hvd
from tensorflow.python.ops.resource_variable_ops import ResourceVariable

from ..ops.tensorflow_graphs import make_graph
from . import Pending, ready

__all__ = ["HorovodTensorFlow", "make_variable"]

# Horovod has no function for these element types. Moving data needs none: the bytes travel as
# another type of the same width. Adding does, so a sum is made in float32.
_CARRIER = {tf.bfloat16: tf.float16}


class HorovodTensorFlow:
    """The workers of one Horovod process set.

    ``dense`` and ``sparse`` are the devices collectives on such gradients are placed on, as
    Horovod's ``device_dense`` and ``device_sparse``.
    """

    may_begin_with_sums = False
    direct = None
    kind = "horovod.tensorflow"

    def __init__(self, process_set: hvd.ProcessSet = hvd.global_process_set, dense: str = "", sparse: str = "") -> None:
        self.process_set = process_set
        self.size: int = process_set.size()
        self.rank: int = process_set.rank()
        self._dense = dense
        self._sparse = sparse
        self._received: list[tf.Tensor] = []  # in the graph that is being made
        with tf.init_scope(), tf.device("cpu"):
            self._zero = make_variable(tf.constant([0]))

    def start(self) -> None:
        """Begin a new graph, or a new step of one."""
        self._received = []

    def anchored(self, tensor: tf.Tensor) -> tf.Tensor:
        """``tensor``, in a way that TensorFlow cannot know its value beforehand.

        A collective of a constant (a bias' gradient can be one, and a shard that is all padding)
        would be evaluated while the graph is optimized, on this rank alone, which then waits for
        the others forever. A slice that begins at a variable is no constant, and costs nothing
        where it turns out to be the whole tensor.
        """
        if not tensor.shape.rank:
            return tensor
        begin = self._zero.read_value()
        if tensor.shape.rank > 1:
            begin = tf.pad(begin, [[0, tensor.shape.rank - 1]])
        size = [-1 if side is None else side for side in tensor.shape]
        return tf.ensure_shape(tf.slice(tensor, begin, size), tensor.shape)

    def _after_received(self, tensor: tf.Tensor) -> tf.Tensor:
        """``tensor``, and with it everything received by alltoall before.

        A rank whose shard is all padding has no use for what it receives, and TensorFlow leaves
        out of a graph what nobody uses, while the other ranks wait for this one to send. A control
        dependency would not do: an operation that only has those is left out just the same.
        """
        if not self._received or tensor.shape.rank != 1:
            return tensor
        zero = self._zero.read_value()
        graph = tf.compat.v1.get_default_graph()
        for received in (tensor for tensor in self._received if tensor.graph is graph):
            zero = zero * (1 + tf.cast(tf.equal(received[:1], 1), tf.int32))
        self._received = []
        return tf.ensure_shape(tf.slice(tensor, zero, [-1]), tensor.shape)

    def allreduce(
        self,
        tensor: tf.Tensor,
        name: str,
        *,
        prescale: float = 1.0,
        postscale: float = 1.0,
        out: tf.Tensor | None = None,
    ) -> Pending:
        tensor = self._after_received(tensor)
        with tf.device(self._dense):
            carrier = tf.float32 if tensor.dtype in _CARRIER else tensor.dtype
            result = hvd._allreduce(
                tf.cast(self.anchored(tensor), carrier),
                name=name,
                op=hvd.Sum,
                prescale_factor=prescale,
                postscale_factor=postscale,
                **self._where(),
            )
            result = tf.cast(result, tensor.dtype)
        return ready(lambda: result)

    def allgather(self, tensor: tf.Tensor, name: str, *, out: tf.Tensor | None = None) -> Pending:
        with tf.device(self._dense):
            result = _restored(hvd.allgather(_carried(self.anchored(tensor)), name=name, **self._where()), tensor)
            result = _with_length(result, tensor, self.size)
        return ready(lambda: result)

    def alltoall(self, tensor: tf.Tensor, name: str, *, out: tf.Tensor | None = None) -> Pending:
        with tf.device(self._dense):
            result = _restored(hvd.alltoall(_carried(self.anchored(tensor)), name=name, **self._where()), tensor)
            result = _with_length(result, tensor, 1)
        self._received.append(result)
        return ready(lambda: result)

    def allgather_rows(self, tensor: tf.Tensor, name: str) -> Pending:
        with tf.device(self._sparse):
            result = _restored(hvd.allgather(_carried(self.anchored(tensor)), name=name, **self._where()), tensor)
        return ready(lambda: result)

    def allgather_bytes(self, data: bytes, name: str) -> list[bytes]:
        def exchange(payload: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            lengths = self.allgather_rows(tf.shape(payload), f"{name}.length").wait()
            return lengths, self.allgather_rows(payload, f"{name}.bytes").wait()

        with tf.init_scope():
            payload = tf.constant(list(data), tf.uint8, shape=(len(data),))
            lengths, everything = make_graph(exchange, tf.TensorSpec((None,), tf.uint8))(payload)
        received = everything.numpy().tobytes()
        parts, start = [], 0
        for length in lengths.numpy().tolist():
            parts.append(received[start : start + length])
            start += length
        return parts

    def _where(self) -> dict[str, Any]:
        return {"ignore_name_scope": True, "process_set": self.process_set}


def make_variable(value: tf.Tensor) -> tf.Variable:
    """A variable that a ``tf.function`` being traced does not take for one of its own.

    It would trace once more for those, and refuse to have any made in a later trace. What decides
    that are the creators ``tf.Variable(...)`` asks; the class behind it asks nobody.
    """
    with tf.init_scope():
        return ResourceVariable(value, trainable=False)


def _carried(tensor: tf.Tensor) -> tf.Tensor:
    carrier = _CARRIER.get(tensor.dtype)
    return tensor if carrier is None else tf.bitcast(tensor, carrier)


def _restored(result: tf.Tensor, tensor: tf.Tensor) -> tf.Tensor:
    return result if result.dtype == tensor.dtype else tf.bitcast(result, tensor.dtype)


def _with_length(result: tf.Tensor, tensor: tf.Tensor, times: int) -> tf.Tensor:
    """Say how long the result is; Horovod's operations leave it open."""
    length = tensor.shape[0]
    return tf.ensure_shape(result, (None if length is None else times * length,))
