"""The contenders are the four rows of the paper's ablation, controls without consensus, and a second-order variant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from adacons_hvd import AdaCons, Aggregator, Decision, Mean, Statistics
from adacons_hvd.aggregators import Memory

Table = torch.Tensor


class NormalizedMean(Aggregator):
    """The average scaled to unit length: what normalising does without consensus."""

    def weights(self, statistics: Statistics) -> Table:
        here = statistics.present.double()
        # The squared length of a mean is the mean of the inner products with it.
        count = here.sum(-1, keepdim=True)
        length = ((here * statistics.dots).sum(-1, keepdim=True) / count).clamp(min=0).sqrt()
        return here / (count * length)


class EqualLengths(Aggregator):
    """The average of the gradients' directions: AdaCons with all coefficients equal."""

    def weights(self, statistics: Statistics) -> Table:
        here = statistics.present.double()
        lengths = torch.where(statistics.norms > 0, statistics.norms, torch.inf)
        return here / (here.sum(-1, keepdim=True) * lengths)


class SubspaceNewton(Aggregator):
    """The minimum of a damped quadratic model within the span of the workers' gradients, at unit length.

    The model's curvature is the empirical Fisher matrix, F = 1/N sum_i g_i g_i^T, of which the
    span sees all: with K the Gramian, (F + damping)^-1 gbar = sum_i w_i g_i where
    (K / N + damping) w = 1 / N. Damping is relative to the mean diagonal of K / N: much of it gives
    the normalised average, little gives the shortest vector in the gradients' affine hull. The
    learning rate is the radius of the trust region, on whose boundary every step ends.
    """

    needs_gramian = True

    def __init__(self, damping: float = 1.0) -> None:
        if damping <= 0:
            raise ValueError(f"damping must be positive, got {damping!r}")
        self.damping = float(damping)

    def weights(self, statistics: Statistics) -> Table:
        assert statistics.gramian is not None
        table, here = statistics.gramian, statistics.present.double()
        mean = (here * statistics.squares).sum(-1, keepdim=True) / here.sum(-1, keepdim=True)
        damped = table + self.damping * torch.diag_embed(mean.expand_as(here))
        step = here * torch.linalg.solve(damped, here)
        length = torch.einsum("...i,...ij,...j->...", step, table, step).clamp(min=0).sqrt()
        return step / length[..., None]


class OthersOnly(AdaCons):
    """AdaCons where a gradient's agreement with itself does not count.

    s_i holds n_i^2 / N that says nothing about the others, and with little data per worker it is
    most of it. Without it, s_i is the inner product with the other workers' part of the mean.
    """

    def weigh(self, statistics: Statistics, memory: Memory) -> Decision:
        count = statistics.present.double().sum(-1, keepdim=True)
        dots = statistics.dots - statistics.squares / count
        return super().weigh(Statistics(dots, statistics.squares, statistics.present), memory)


@dataclass(frozen=True)
class Contender:
    make: Callable[[], Aggregator]
    #: How long its result is: "average", "unit", or "sum" of as many gradients as there are workers.
    length: str


AVERAGE, NORMALIZED, EQUAL, ADACONS, NEWTON = (
    "average",
    "normalised average",
    "equal lengths",
    "AdaCons",
    "subspace Newton",
)
LONG = "AdaCons, length of average"
OTHERS, LIGHT, HEAVY = "AdaCons, others only", f"{NEWTON}, damping 0.1", f"{NEWTON}, damping 10"
CONTENDERS = {
    AVERAGE: Contender(Mean, "average"),
    NORMALIZED: Contender(NormalizedMean, "unit"),
    EQUAL: Contender(EqualLengths, "unit"),
    "basic": Contender(lambda: AdaCons(momentum=0, normalize=False), "sum"),
    "momentum": Contender(lambda: AdaCons(normalize=False), "sum"),
    "normalization": Contender(lambda: AdaCons(momentum=0), "unit"),
    ADACONS: Contender(AdaCons, "unit"),
    LONG: Contender(lambda: AdaCons(scale="average"), "average"),
    NEWTON: Contender(SubspaceNewton, "unit"),
    LIGHT: Contender(lambda: SubspaceNewton(0.1), "unit"),
    HEAVY: Contender(lambda: SubspaceNewton(10), "unit"),
    OTHERS: Contender(OthersOnly, "unit"),
}
