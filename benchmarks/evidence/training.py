"""One training run with simulated workers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.func import grad, vmap

from .contenders import CONTENDERS
from .tasks import Task, task


@dataclass(frozen=True)
class Setting:
    """Everything about a run except its learning rate and its seed."""

    task: str
    contender: str
    optimizer: str = "SGD"
    workers: int = 32
    #: Examples per worker and step.
    batch: int = 64
    steps: int = 200
    #: What is wrong with the data or a worker; see :func:`draw` and :func:`spoil`.
    trouble: str = ""
    #: Which gradients are clipped: "", "before" they are aggregated or "after".
    clip: str = ""
    threshold: float = 0.0
    #: Whether the rate falls linearly to zero, or stays.
    falls: bool = True

    def __str__(self) -> str:
        words = [self.task, self.contender, self.optimizer, f"{self.workers} x {self.batch}", f"{self.steps} steps"]
        words += [self.trouble, f"clipped {self.clip} at {self.threshold:g}" if self.clip else ""]
        words += ["" if self.falls else "constant rate"]
        return ", ".join(word for word in words if word)


def train(setting: Setting, rate: float, seed: int, final: bool) -> float | None:
    """Train; the score, or None if parameters became infinite.

    The same seed gives every contender the same start and the same batches. ``final`` measures on
    the test data, otherwise on those where rates are chosen.
    """
    work = task(setting.task)
    generator = torch.Generator().manual_seed(seed)
    vector = work.start(generator)
    parameters = work.named(vector)
    slopes = vmap(grad(lambda p, x, y: work.loss(work.model(p, x), y)), (None, 0, 0))
    aggregator = CONTENDERS[setting.contender].make()
    optimizer = _optimizer(setting.optimizer, vector, rate)
    shards = shares(setting, work, generator)
    for step in range(setting.steps):
        x, y = draw(setting, work, shards, generator)
        rows = torch.cat([piece.flatten(1) for piece in slopes(parameters, x, y).values()], 1)
        spoil(setting, rows, generator)
        if setting.clip == "before":
            rows *= (setting.threshold / rows.norm(dim=1, keepdim=True)).clamp(max=1)
        direction = aggregator(rows)
        if setting.clip == "after":
            direction *= (setting.threshold / direction.norm()).clamp(max=1)
        vector.grad = direction
        optimizer.param_groups[0]["lr"] = rate * (1 - step / setting.steps if setting.falls else 1)
        optimizer.step()
        if step % 20 == 0 and not vector.isfinite().all():
            return None
    x, y = work.test if final else work.validation
    found = work.score(work.model(parameters, x), y)
    return found if math.isfinite(found) and vector.isfinite().all() else None


def _optimizer(name: str, vector: torch.Tensor, rate: float) -> torch.optim.Optimizer:
    if name == "SGD":
        return torch.optim.SGD([vector], lr=rate, momentum=0.9)
    return torch.optim.Adam([vector], lr=rate)


def shares(setting: Setting, work: Task, generator: torch.Generator) -> torch.Tensor:
    """The examples each worker draws from, ``[N, many]``: all, or two label-sorted pieces out of 2N if "skewed"."""
    labels = work.train[1]
    if setting.trouble != "skewed":
        return torch.arange(len(labels)).expand(setting.workers, -1)
    pieces = labels.argsort(stable=True)[: len(labels) // (2 * setting.workers) * 2 * setting.workers]
    mixed = pieces.view(2 * setting.workers, -1)[torch.randperm(2 * setting.workers, generator=generator)]
    return mixed.reshape(setting.workers, -1)


def draw(
    setting: Setting, work: Task, shards: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch for every worker. "noisy": 40% of all labels are random; "half noisy": 80% of every other worker's."""
    at = torch.randint(shards.shape[1], (setting.workers, setting.batch), generator=generator)
    chosen = shards.gather(1, at)
    x, y = work.train[0][chosen], work.train[1][chosen]
    if "noisy" in setting.trouble:
        wrong = torch.randint(int(y.max()) + 1, y.shape, generator=generator)
        share = torch.full((setting.workers, 1), 0.4)
        if setting.trouble == "half noisy":
            share = torch.tensor([0.0, 0.8]).repeat(setting.workers // 2)[:, None]
        y = torch.where(torch.rand(y.shape, generator=generator) < share, wrong, y)
    return x, y


def spoil(setting: Setting, rows: torch.Tensor, generator: torch.Generator) -> None:
    """ "corrupted": the last worker sends noise, ten times as long as the others' gradients; "badly", a hundred."""
    if "corrupted" in setting.trouble:
        noise = torch.randn(rows.shape[1], generator=generator)
        rows[-1] = (100 if "badly" in setting.trouble else 10) * rows[:-1].norm(dim=1).mean() * noise / noise.norm()
