"""All of ``horovod.torch``, with an ``aggregator`` for its ``DistributedOptimizer``.

import adacons_hvd.torch as hvd        # was: import horovod.torch as hvd
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

from horovod.torch import *  # noqa: F403

from ..aggregators import AdaCons as AdaCons
from ..aggregators import Aggregator as Aggregator
from ..aggregators import Mean as Mean
from .broadcasting import broadcast_optimizer_state as broadcast_optimizer_state
from .broadcasting import broadcast_parameters as broadcast_parameters
from .numbering import init as init
from .optimizer import DistributedOptimizer as DistributedOptimizer

# Horovod's module of this name is here already, and would be what `from . import` finds.
elastic = _import_module(".elastic", __name__)

if TYPE_CHECKING:
    # Horovod comes without types; whatever it has, this module has.
    def __getattr__(name: str) -> Any: ...
