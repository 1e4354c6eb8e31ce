"""The average at a length of its own."""

from __future__ import annotations

from ..ops import ops_for
from .base import NONFINITE_POLICIES, Aggregator, Decision, Statistics, average_weights, one_of
from .checkpoint import Memory

__all__ = ["NormalizedMean"]

#: A mean gradient whose squared length is below this fraction of its workers' mean square is what rounding has left
#: of gradients that cancel; its direction means nothing.
CANCELLATION = 1e-6


class NormalizedMean(Aggregator):
    """The average, scaled to a length that does not follow that of the gradients.

    Args:
        length: ``"unit"`` makes the result one long, so that the learning rate alone says how far a step goes.
            ``"agreement"`` makes it ``||gbar|| / rms(n_i)`` long: one where all workers agree, and less the more they
            differ.
        nonfinite: see :attr:`Aggregator.nonfinite`.

    Where gradients are zero or cancel there is no direction, and the step is the average.

    >>> import torch
    >>> NormalizedMean()(torch.tensor([[3.0, 0.0], [3.0, 8.0]]))
    tensor([0.6000, 0.8000])
    >>> NormalizedMean(length="agreement")(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    tensor([0.5000, 0.5000])
    """

    pure = True

    def __init__(self, length: str = "unit", nonfinite: str = "propagate") -> None:
        self.length = one_of("length", length, ("unit", "agreement"))
        self.nonfinite = one_of("nonfinite", nonfinite, NONFINITE_POLICIES)

    def weigh(self, statistics: Statistics, memory: Memory) -> Decision:
        ops = ops_for(statistics.squares)
        average = average_weights(statistics.present)
        mean, spread = statistics.mean_square, ops.total(average * statistics.squares)
        fallback = mean <= CANCELLATION * spread
        square = mean if self.length == "unit" else spread
        return Decision(average / ops.sqrt(ops.where(fallback, ops.ones_like(square), square)), memory, fallback)
