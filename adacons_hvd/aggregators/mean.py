"""The plain average."""

from __future__ import annotations

from ..ops import Tensor
from .base import NONFINITE_POLICIES, Aggregator, Statistics, average_weights, one_of

__all__ = ["Mean"]


class Mean(Aggregator):
    """The plain average: what Horovod computes, through the same machinery as the others.

    >>> import torch
    >>> Mean()(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([2., 3.])
    """

    portable = True
    pure = True

    def __init__(self, nonfinite: str = "propagate") -> None:
        self.nonfinite = one_of("nonfinite", nonfinite, NONFINITE_POLICIES)

    def weights(self, statistics: Statistics) -> Tensor:
        return average_weights(statistics.present)
