"""Graphs of functions; those of many small operations once for all graphs that they are a part of.

From statistics to weights there are a hundred operations on a few numbers each, and to add one to a graph takes Python
longer than TensorFlow takes to run it. A graph of a step has them twice, for when all ranks are there and for when some
are not, and every trace of every model has them again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import tensorflow as tf

from .structures import described, rebuilt, tensors_in

__all__ = ["make_graph", "recorded"]

#: How many graphs are kept. They are a megabyte each, and few training scripts need more than two.
_MOST = 64

#: The graphs, and the form of their results, by the key and all else that tells one from another.
_graphs: dict[Hashable, tuple[Callable[..., list[tf.Tensor]], Any]] = {}


def make_graph(function: Callable[..., Any], *signature: Any) -> Callable[..., Any]:
    """The graph of a function, for arguments of this signature.

    A ``tf.function`` would trace in its first call, and TensorFlow warns of code that does so in call after call:
    many models in one process are enough.
    """
    graph: Callable[..., Any] = tf.function(function, signature, autograph=False).get_concrete_function()
    return graph


def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with a key before its arguments, as a call of a graph which the whole process has in common.

    Arguments and results may be tensors and what holds them: dictionaries, tuples and dataclasses. A graph is nothing
    but operations: it keeps neither the function alive nor what it is called with.
    """

    def call(key: Hashable, *arguments: Any) -> Any:
        tensors = list(tensors_in(arguments, tf.Tensor))
        alike = key, described(arguments, tf.Tensor, _signature)
        if alike not in _graphs:
            if len(_graphs) == _MOST:
                del _graphs[next(iter(_graphs))]
            _graphs[alike] = _graph(function, arguments, [_signature(tensor) for tensor in tensors])
        graph, form = _graphs[alike]
        return rebuilt(form, tf.Tensor, iter(graph(*tensors)))

    return call


def _graph(
    function: Callable[..., Any], arguments: Any, signature: list[tf.TensorSpec]
) -> tuple[Callable[..., list[tf.Tensor]], Any]:
    """The graph of a function, from the arguments' tensors to those of its result, and that result."""
    results = []

    def flat(*tensors: tf.Tensor) -> list[tf.Tensor]:
        results.append(function(*rebuilt(arguments, tf.Tensor, iter(tensors))))
        return list(tensors_in(results[0], tf.Tensor))

    # On no device, whatever those are on which it happens to be needed first.
    with tf.init_scope(), tf.device(None):
        graph = make_graph(flat, *signature)
    return graph, results[0]


def _signature(tensor: tf.Tensor) -> tf.TensorSpec:
    return tf.TensorSpec(tensor.shape, tensor.dtype)
