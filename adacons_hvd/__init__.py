"""A better way than averaging to combine gradients in Horovod: adaptive consensus (AdaCons).

This module holds the aggregators and imports no framework. The bindings are beside it:
``adacons_hvd.torch`` stands in for ``horovod.torch``, ``adacons_hvd.ddp`` serves PyTorch's own
DistributedDataParallel, and ``adacons_hvd.fsdp`` what ``fully_shard`` has sharded.

>>> import torch
>>> from adacons_hvd import AdaCons
>>> AdaCons()(torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 1.0]]))
tensor([0.8889, 0.1111])
"""

from .aggregators import AdaCons, Aggregator, Curvature, Decision, Mean, NormalizedMean, Statistics

__all__ = [
    "AdaCons",
    "Aggregator",
    "Curvature",
    "Decision",
    "Mean",
    "NormalizedMean",
    "Statistics",
    "__version__",
]

__version__ = "0.2.0"
