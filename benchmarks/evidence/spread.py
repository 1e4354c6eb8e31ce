"""When AdaCons is an average: how far its weights and its direction are from one, by batch and workers.

Of a worker's s_i, n_i^2 / N is its own gradient's share, which tells nothing about the others. The
less data a worker has, the more of s_i is that; the more it has, the more equal gradients become.
"""

from __future__ import annotations

import functools

import torch
from torch.func import grad, vmap

from adacons_hvd import AdaCons, Statistics

from .search import Record
from .tasks import task

BATCHES = (1, 4, 16, 64, 256, 1024)
WORKERS = (8, 32, 128)
#: Steps of training before the gradients are looked at.
MOMENTS = {"early": 20, "late": 1000}
DRAWS = 4

#: What :func:`look` found, by moment, workers and batch.
Looks = dict[tuple[str, int, int], dict[str, float]]


def look(batch: int, workers: int, steps: int) -> dict[str, float]:
    """The weights' standard deviation over their mean size, the direction's angle to the average, and the own share."""
    work = task("images")
    generator = torch.Generator().manual_seed(0)
    vector = work.start(generator)
    parameters = work.named(vector)
    slope = grad(lambda p, x, y: work.loss(work.model(p, x), y))
    slopes = vmap(slope, (None, 0, 0))
    x, y = work.train
    optimizer = torch.optim.SGD([vector], lr=0.05, momentum=0.9)
    for _ in range(steps):
        chosen = torch.randint(len(y), (256,), generator=generator)
        vector.grad = torch.cat([piece.flatten() for piece in slope(parameters, x[chosen], y[chosen]).values()])
        optimizer.step()
    found = {"spread": 0.0, "angle": 0.0, "own share": 0.0}
    for _ in range(DRAWS):
        # A few workers at a time, which bounds the memory.
        rows = []
        for _ in range(workers // 8):
            chosen = torch.randint(len(y), (8, batch), generator=generator)
            rows.append(torch.cat([g.flatten(1) for g in slopes(parameters, x[chosen], y[chosen]).values()], 1))
        matrix = torch.cat(rows)
        decision, _ = AdaCons(momentum=0).explain(matrix)
        weights, statistics = decision.weights, Statistics.of(matrix)
        direction = weights.float() @ matrix
        cosine = torch.cosine_similarity(direction, matrix.mean(0), dim=0)
        found["spread"] += float(weights.std() / weights.abs().mean()) / DRAWS
        found["angle"] += float(cosine.clamp(max=1).acos().rad2deg()) / DRAWS
        found["own share"] += float(statistics.squares.mean() / workers / statistics.dots.mean()) / DRAWS
    return {name: float(f"{value:.3g}") for name, value in found.items()}


def measured(record: Record, batches: tuple[int, ...] = BATCHES, workers: tuple[int, ...] = WORKERS) -> Looks:
    found: Looks = {}
    for when, steps in MOMENTS.items():
        for count in workers:
            for batch in batches:
                key = f"spread, {when}, {count} x {batch}"
                found[when, count, batch] = record.get(key, functools.partial(look, batch, count, steps))
    return found
