"""All of ``horovod.torch``, with an ``aggregator`` for its ``DistributedOptimizer``.

import adacons_hvd.torch as hvd        # was: import horovod.torch as hvd
"""

from typing import TYPE_CHECKING, Any

from horovod.torch import *  # noqa: F403
from horovod.torch import elastic as elastic

from ..aggregators import AdaCons as AdaCons
from ..aggregators import Aggregator as Aggregator
from ..aggregators import Mean as Mean
from .optimizer import DistributedOptimizer as DistributedOptimizer
from .optimizer import broadcast_optimizer_state as broadcast_optimizer_state

if TYPE_CHECKING:
    # Horovod comes without types; whatever it has, this module has.
    def __getattr__(name: str) -> Any: ...
