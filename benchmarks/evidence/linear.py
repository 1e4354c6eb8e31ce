"""The paper's stochastic linear regression: the table of its published sample, and its Figure 2.

Minimise E[(w . x)^2] / 2 over 1,000 dimensions, x uniform in [0, 1], from a start uniform in
[-5, 5]. As in the sample, a worker adds up two batches for an update, so that 1,000 iterations
are 500 updates, and the step along a direction p is the one that ends nearest to the optimum at
zero, <p, w> / <p, p>: a rate that no training run could know, and for which lengths do not matter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from adacons_hvd import AdaCons, Aggregator, Decision, Mean, Statistics
from adacons_hvd.aggregators import Memory

from .contenders import EQUAL, EqualLengths
from .search import Record

DIMENSIONS, UPDATES, EVERY = 1000, 500, 10
BATCHES = (128, 512, 2048)
WORKERS = (8, 32, 128)
SEEDS = tuple(range(6))
AVERAGE = "average"
#: Where a contender stays, before squares of its gradients leave float32's range.
CONVERGED = 1e-30

#: By batch and contender, a tensor of seeds x moments.
Losses = dict[int, dict[str, torch.Tensor]]


class SampleSort(Aggregator):
    """AdaCons as the published sample has it: it reads the momentum at the sort's indices, not at each one's rank."""

    def start(self, statistics: Statistics) -> Memory:
        return {"curve": (statistics.dots / statistics.norms).sort().values}

    def weigh(self, statistics: Statistics, memory: Memory) -> Decision:
        values, order = (statistics.dots / statistics.norms).sort()
        curve = 0.99 * memory["curve"] + 0.01 * values
        alpha = curve.gather(-1, order)
        weights = alpha / alpha.sum(-1, keepdim=True) / statistics.norms
        return Decision(weights, {"curve": curve}, torch.zeros_like(alpha[..., :1], dtype=torch.bool))


#: Names, numbers of workers, aggregators.
Rivals = dict[str, tuple[int, Aggregator]]


def contenders() -> Rivals:
    """An average is the same for any number of workers."""
    found: Rivals = {AVERAGE: (8, Mean())}
    for workers in WORKERS:
        found[f"AdaCons, {workers} workers"] = (workers, AdaCons())
        found[f"without momentum, {workers} workers"] = (workers, AdaCons(momentum=0))
        found[f"as the sample sorts, {workers} workers"] = (workers, SampleSort())
    return found


def controls() -> Rivals:
    """Return AdaCons without consensus: all coefficients are equal."""
    return {f"{EQUAL}, {workers} workers": (workers, EqualLengths()) for workers in WORKERS}


#: What runs together, on the same data.
PANELS = {"regression": contenders, "regression, controls": controls}


def run(
    batch: int, seed: int, make: Callable[[], Rivals] = contenders, updates: int = UPDATES
) -> dict[str, list[float]]:
    """The expected loss of each contender before every tenth update and after the last; all see the same data."""
    generator = torch.Generator().manual_seed(seed)
    start = -5 + 10 * torch.rand(DIMENSIONS, generator=generator)
    rivals = make()
    points = {name: start.clone() for name in rivals}
    losses: dict[str, list[float]] = {name: [] for name in rivals}
    for update in range(updates + 1):
        if update % EVERY == 0:
            for name, w in points.items():
                losses[name].append(float(f"{expected_loss(w):.4g}"))
        data = torch.rand(2 * batch, DIMENSIONS, generator=generator)
        outputs = data @ torch.stack(list(points.values())).T
        for column, (name, (workers, aggregator)) in enumerate(rivals.items()):
            shards, errors = data.view(workers, -1, DIMENSIONS), outputs[:, column].view(workers, 1, -1)
            w = points[name]
            if expected_loss(w) > CONVERGED:
                direction = aggregator((errors @ shards)[:, 0] / shards.shape[1])
                w -= (direction @ w) / (direction @ direction) * direction
    return losses


def expected_loss(w: torch.Tensor) -> float:
    """E[x x^T] is a twelfth of the identity and a quarter everywhere."""
    w = w.double()
    return float(w.square().sum() / 24 + w.sum().square() / 8)


def measured(record: Record, batches: tuple[int, ...] = BATCHES, seeds: tuple[int, ...] = SEEDS) -> Losses:
    found: Losses = {}
    for batch in batches:
        found[batch] = {}
        for panel, make in PANELS.items():
            key = f"{panel}, batch {batch}"
            runs = [record.get(f"{key}, seed {seed}", functools.partial(run, batch, seed, make)) for seed in seeds]
            found[batch] |= {name: torch.tensor([r[name] for r in runs]).double() for name in make()}
    return found
