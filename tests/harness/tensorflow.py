"""TensorFlow as forked ranks have it: it does not optimize graphs, which takes longer than a test's few steps.

A third of the time until a tape's graph has run once goes there. Where graphs are to be as users have them, as in
`tests/conformance`, they are made in `optimized_graphs`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import tensorflow as tf


def _optimize(yes: bool) -> None:
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": not yes})


@contextlib.contextmanager
def optimized_graphs() -> Iterator[None]:
    """Graphs that are made in here are optimized, as they are by default."""
    _optimize(True)
    try:
        yield
    finally:
        _optimize(False)


_optimize(False)
