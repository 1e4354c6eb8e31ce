"""Errors that a graph raises, with texts that Python writes.

A graph knows one way to raise an error of its own, an assertion, and of that nothing reaches Python but a text. What is
wrong is often known by its values only, such as the ranks that differ. So where a graph suspects something, it asks a
Python function, the *judge*, which looks at the values and raises the error. The error travels through the assertion's
text: in a ``tf.function`` of the user's it shows as an ``InvalidArgumentError`` with that text, and :func:`decoded`
makes what the judge raised of it again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from ..agreement import DisagreementError
from ..engine.replicas import ReplicaError, StrayStepError

__all__ = ["check", "decoded", "require"]

#: The errors that a judge may raise.
_ERRORS = {
    cls.__name__: cls for cls in (DisagreementError, FloatingPointError, ReplicaError, RuntimeError, StrayStepError)
}

#: How an error is written, between the brackets that TensorFlow puts around an assertion's text. That text is one line.
_WRITTEN = re.compile(r"\[adacons_hvd (\w+): (.*)\]$", re.MULTILINE)


def require(fine: tf.Tensor, error: Exception) -> tf.Operation:
    """Have the graph fail with this error unless all is ``fine``."""
    with tf.device("cpu"):
        return tf.debugging.Assert(fine, [_written(error)])


def check(suspicious: tf.Tensor, judge: Callable[..., None], data: Callable[[], Sequence[Any]]) -> tf.Tensor:
    """Have the graph ask ``judge`` about the values of ``data()`` where it is ``suspicious``, and fail if it raises.

    The result is there once nothing was found. The operations that ``data`` makes run only where the judge is asked.
    TensorFlow keeps the judge for as long as the process lives, so it must hold nothing large.
    """

    def written(*values: Any) -> bytes:
        try:
            judge(*map(_plain, values))
        except tuple(_ERRORS.values()) as error:
            return _written(error)
        return b""

    def ask() -> tf.Tensor:
        text = tf.numpy_function(written, [tf.convert_to_tensor(value) for value in data()], tf.string)
        with tf.control_dependencies([tf.debugging.Assert(tf.equal(text, ""), [text])]):
            return tf.constant(True)

    with tf.device("cpu"):
        return tf.cond(suspicious, ask, lambda: tf.constant(True))


def decoded(error: tf.errors.OpError) -> Exception | None:
    """The error that a judge raised, if TensorFlow's error is about one."""
    found = _WRITTEN.search(error.message)
    if found is None or found[1] not in _ERRORS:
        return None
    # TensorFlow writes quotes, backslashes and whatever is no ASCII as in C.
    text = found[2].encode().decode("unicode_escape").encode("latin-1").decode()
    return _ERRORS[found[1]](text)


def _written(error: Exception) -> bytes:
    return f"adacons_hvd {type(error).__name__}: {error}".encode()


def _plain(value: Any) -> Any:
    """A value without numpy: numbers, texts and lists of them."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.decode() if isinstance(value, bytes) else value
