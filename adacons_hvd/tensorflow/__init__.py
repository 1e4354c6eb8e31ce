"""All of ``horovod.tensorflow``, with an ``aggregator`` for its tape and its optimizer.

import adacons_hvd.tensorflow as hvd        # was: import horovod.tensorflow as hvd
"""

from importlib import import_module as _import_module

from horovod.tensorflow import *  # noqa: F403

from .optimizer import DistributedOptimizer as DistributedOptimizer
from .tape import DistributedGradientTape as DistributedGradientTape
from .tape import PartialDistributedGradientTape as PartialDistributedGradientTape

# Horovod's module of this name is here already, and would be what `from . import` finds.
elastic = _import_module(".elastic", __name__)
