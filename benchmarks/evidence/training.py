"""One training run with simulated workers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.func import grad, vmap

from .contenders import CONTENDERS
from .tasks import Parameters, Task, task

#: The rate's factor, by the share of training that is over.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda over: 1 - over,
    "cosine": lambda over: (1 + math.cos(math.pi * over)) / 2,
    "constant": lambda over: 1.0,
}
#: From so many parameters on, memory decides what is fast: one worker after the other, into the same rows.
LARGE = 500_000


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
    #: How the rate falls to zero, "linear" or as a "cosine"; or "constant".
    schedule: str = "linear"
    #: The share that Adam's average of squares keeps of its past.
    beta2: float = 0.999
    #: The weight decay of AdamW and Muon.
    decay: float = 0.0

    def __str__(self) -> str:
        words = [self.task, self.contender, self.optimizer, f"{self.workers} x {self.batch}", f"{self.steps} steps"]
        words += [self.trouble, f"clipped {self.clip} at {self.threshold:g}" if self.clip else ""]
        words += ["" if self.schedule == "linear" else f"{self.schedule} rate"]
        words += ["" if self.beta2 == 0.999 else f"beta2 {self.beta2:g}"]
        words += [f"decay {self.decay:g}" if self.decay else ""]
        return ", ".join(word for word in words if word)

    @property
    def large(self) -> bool:
        """Whether an accelerator would train it faster."""
        return self.task.endswith("M")

    @property
    def choice(self) -> str:
        """What was tuned of it beside the rate."""
        if self.clip:
            return f"clipped at {self.threshold:g}"
        return f"decay {self.decay:g}" if self.optimizer in ("AdamW", "Muon") else f"beta2 {self.beta2:g}"


def train(setting: Setting, rate: float, seed: int, final: bool, device: str = "cpu") -> float | None:
    """Train; the score, or None if parameters became infinite.

    The same seed gives every contender the same start and the same batches, because all that is random is drawn on the
    host. ``final`` measures on the test data, otherwise on those where rates are chosen.
    """
    work = task(setting.task)
    generator = torch.Generator().manual_seed(seed)
    vector = work.start(generator).to(device)
    parameters = work.named(vector)
    gradients = gradients_of(work, vector)
    aggregator = CONTENDERS[setting.contender].make()
    optimizers = optimizers_of(setting, work, vector, parameters)
    shards = shares(setting, work, generator)
    for step in range(setting.steps):
        x, y = (part.to(device) for part in draw(setting, work, shards, generator))
        rows = gradients(parameters, x, y)
        spoil(setting, rows, generator)
        if setting.clip == "before":
            rows *= (setting.threshold / rows.norm(dim=1, keepdim=True)).clamp(max=1)
        direction = aggregator(rows)
        if setting.clip == "after":
            direction *= (setting.threshold / direction.norm()).clamp(max=1)
        vector.grad = direction
        for name, piece in work.named(direction).items():
            parameters[name].grad = piece
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate * SCHEDULES[setting.schedule](step / setting.steps)
            optimizer.step()
        if step % 20 == 0 and not vector.isfinite().all():
            return None
    x, y = (part.to(device) for part in (work.test if final else work.validation))
    found = work.score(work.model(parameters, x), y)
    return found if math.isfinite(found) and vector.isfinite().all() else None


def gradients_of(work: Task, vector: torch.Tensor) -> Callable[[Parameters, torch.Tensor, torch.Tensor], torch.Tensor]:
    """The function that computes the gradients of all workers, ``[N, size]``, each for a batch of its own."""
    rows = vector.new_empty(0)

    def one_by_one(parameters: Parameters, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        rows.resize_(len(x), len(vector))
        leaves = {name: piece.detach().requires_grad_() for name, piece in parameters.items()}
        for row, inputs, targets in zip(rows, x, y, strict=True):
            found = torch.autograd.grad(work.loss(work.model(leaves, inputs), targets), list(leaves.values()))
            torch.cat([piece.flatten() for piece in found], out=row)
        return rows

    def together(parameters: Parameters, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cat([piece.flatten(1) for piece in slopes(parameters, x, y).values()], 1)

    slopes = vmap(grad(lambda p, x, y: work.loss(work.model(p, x), y)), (None, 0, 0))
    return one_by_one if len(vector) >= LARGE else together


def optimizers_of(
    setting: Setting, work: Task, vector: torch.Tensor, parameters: Parameters
) -> list[torch.optim.Optimizer]:
    """All of the model in one vector, but for Muon, which takes hidden matrices and leaves AdamW the rest."""
    if setting.optimizer == "SGD":
        return [torch.optim.SGD([vector], momentum=0.9)]
    adam: dict[str, Any] = {"betas": (0.9, setting.beta2), "fused": len(vector) >= LARGE}
    if setting.optimizer == "Adam":
        return [torch.optim.Adam([vector], **adam)]
    adam["weight_decay"] = setting.decay
    if setting.optimizer == "AdamW":
        return [torch.optim.AdamW([vector], **adam)]
    hidden = [parameters[name] for name in work.hidden]
    others = [piece for name, piece in parameters.items() if name not in work.hidden]
    # With steps as long as AdamW's, one rate suits both.
    muon = torch.optim.Muon(hidden, weight_decay=setting.decay, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, **adam)]


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
        noise = torch.randn(rows.shape[1], generator=generator).to(rows.device)
        rows[-1] = (100 if "badly" in setting.trouble else 10) * rows[:-1].norm(dim=1).mean() * noise / noise.norm()
