"""All of ``horovod.keras``, with an optimizer that aggregates under Keras 3.

import adacons_hvd.keras as hvd        # was: import horovod.keras as hvd

Keras' backend decides what runs underneath: ``horovod.tensorflow``, or ``horovod.torch`` with
``KERAS_BACKEND=torch`` (then TensorFlow is not imported).
"""

from importlib import import_module as _import_module

from .backends import keras_backend as _keras_backend

if _keras_backend() == "torch":
    from .on_torch import *  # noqa: F403
else:
    from horovod.keras import *  # noqa: F403
    from horovod.tensorflow.mpi_ops import ProcessSet as ProcessSet
    from horovod.tensorflow.mpi_ops import add_process_set as add_process_set
    from horovod.tensorflow.mpi_ops import global_process_set as global_process_set
    from horovod.tensorflow.mpi_ops import remove_process_set as remove_process_set

    from .tensorflow_backend import broadcast_global_variables as broadcast_global_variables

from ..aggregators import AdaCons as AdaCons
from .public import DistributedOptimizer as DistributedOptimizer
from .public import PartialDistributedOptimizer as PartialDistributedOptimizer
from .public import load_model as load_model

# Horovod's modules of these names are here already, and would be what `from . import` finds.
callbacks = _import_module(".callbacks", __name__)
elastic = _import_module(".elastic", __name__)
