"""All of ``horovod.tensorflow``, with an ``aggregator`` for its tape and its optimizer.

import adacons_hvd.tensorflow as hvd        # was: import horovod.tensorflow as hvd
"""

from importlib import import_module as _import_module

from horovod.tensorflow import *  # noqa: F403

from .joining import join as join
from .optimizer import DistributedOptimizer as DistributedOptimizer
from .tape import DistributedGradientTape as DistributedGradientTape
from .tape import PartialDistributedGradientTape as PartialDistributedGradientTape
from .tape import TapeState as TapeState

del globals()["elastic"]  # Horovod's


def __getattr__(name: str) -> object:
    # Ours imports Keras, which not everyone needs.
    if name in ("elastic", "keras"):
        return _import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
