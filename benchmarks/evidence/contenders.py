"""The contenders are the four rows of the paper's ablation, controls without consensus, and second-order rules."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from adacons_hvd import AdaCons, Aggregator, Curvature, Decision, Mean, NormalizedMean, Statistics
from adacons_hvd.aggregators import Memory

Table = torch.Tensor


class EqualLengths(Aggregator):
    """The average of the gradients' directions: AdaCons with all coefficients equal."""

    def weights(self, statistics: Statistics) -> Table:
        here = statistics.present.double()
        lengths = torch.where(statistics.norms > 0, statistics.norms, torch.inf)
        return here / (here.sum(-1, keepdim=True) * lengths)


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


AVERAGE, NORMALIZED, EQUAL, ADACONS = "average", "normalised average", "equal lengths", "AdaCons"
LONG, OTHERS = "AdaCons, length of average", "AdaCons, others only"
#: Curvature of the workers' gradients and the averages of eight earlier steps; of the workers alone; of averages alone.
CURVATURE, WORKERS_ONLY, PAST_ONLY = "Curvature", "Curvature, workers only", "Curvature, past only"
AGREEING, AGREEING_CURVATURE = "average, length by agreement", "Curvature, length by agreement"
DAMPINGS, MEMORIES = (0.1, 0.3, 3.0, 10.0), (2, 4, 16, 32)


def _curvature(**settings: Any) -> Contender:
    return Contender(functools.partial(Curvature, **settings), "unit")


CONTENDERS = {
    AVERAGE: Contender(Mean, "average"),
    NORMALIZED: Contender(NormalizedMean, "unit"),
    EQUAL: Contender(EqualLengths, "unit"),
    "basic": Contender(lambda: AdaCons(momentum=0, normalize=False), "sum"),
    "momentum": Contender(lambda: AdaCons(normalize=False), "sum"),
    "normalization": Contender(lambda: AdaCons(momentum=0), "unit"),
    ADACONS: Contender(AdaCons, "unit"),
    LONG: Contender(lambda: AdaCons(scale="average"), "average"),
    OTHERS: Contender(OthersOnly, "unit"),
    CURVATURE: _curvature(),
    WORKERS_ONLY: _curvature(memory=0),
    PAST_ONLY: _curvature(workers=False),
    AGREEING: Contender(lambda: NormalizedMean(length="agreement"), "unit"),
    AGREEING_CURVATURE: _curvature(length="agreement"),
    **{f"{CURVATURE}, damping {damping:g}": _curvature(damping=damping) for damping in DAMPINGS},
    **{f"{CURVATURE}, memory {memory}": _curvature(memory=memory) for memory in MEMORIES},
}
