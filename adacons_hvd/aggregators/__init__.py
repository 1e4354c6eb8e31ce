"""The mathematics: statistics of N workers' gradients in, N weights out.

An aggregator knows nothing of frameworks (operations come from :mod:`adacons_hvd.ops`), of communication
(:mod:`adacons_hvd.schedules` produces the statistics and applies the weights) or of optimizers.

To add one, subclass :class:`Aggregator` and write one method:

>>> import torch
>>> class InverseNorm(Aggregator):
...     '''Weigh each worker by one over its gradient's length.'''
...     def weights(self, statistics):
...         inverse = 1 / statistics.norms
...         return inverse / inverse.sum(-1, keepdim=True)
>>> InverseNorm()(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
tensor([0.7500, 0.7500])
"""

from .adacons import AdaCons
from .base import Aggregator, Decision, Statistics, average_weights, table_of
from .checkpoint import Memory, pack_memory, unpack_memory
from .curvature import Curvature
from .mean import Mean
from .normalized_mean import NormalizedMean
from .torchjd import from_torchjd

__all__ = [
    "AdaCons",
    "Aggregator",
    "Curvature",
    "Decision",
    "Mean",
    "Memory",
    "NormalizedMean",
    "Statistics",
    "average_weights",
    "from_torchjd",
    "pack_memory",
    "table_of",
    "unpack_memory",
]
