"""The binding trains as the paper's Algorithm 1 does, step for step.

The algorithm is written out here with plain ``torch.distributed``, one worker's view, and shares
nothing with the package; both trainings run freely, side by side, from the same parameters.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist


class Algorithm1:
    """Adaptive consensus aggregation of this worker's gradients with those of the others."""

    def __init__(self, beta: float = 0.99, normalize: bool = True) -> None:
        self.beta = beta
        self.normalize = normalize
        self.m: torch.Tensor | None = None

    def __call__(self, model: Any) -> None:
        workers, rank = dist.get_world_size(), dist.get_rank()
        gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters()]).double()

        mean = gradient.clone()
        dist.all_reduce(mean)
        mean /= workers

        own = torch.stack([gradient @ mean, gradient.norm()])
        everyone = [torch.empty_like(own) for _ in range(workers)]
        dist.all_gather(everyone, own)
        dots, norms = torch.stack(everyone).unbind(1)

        alpha = dots / norms
        if self.beta > 0:
            a, p = torch.sort(alpha)
            self.m = a if self.m is None else self.beta * self.m + (1 - self.beta) * a
            alpha = torch.empty_like(a)
            alpha[p] = self.m
        if self.normalize:
            alpha = alpha / alpha.sum()
        gamma = alpha / norms

        psi = gamma[rank] * gradient
        dist.all_reduce(psi)

        for parameter, part in zip(model.parameters(), psi.split([p.numel() for p in model.parameters()]), strict=True):
            parameter.grad = part.view(parameter.shape).to(parameter.dtype)


def side_by_side(
    steps: int, tolerance: float, dtype_name: str, schedules: list[str], beta: float, normalize: bool, adam: bool
) -> tuple[float, list[tuple[str, int]]]:
    """Train by the algorithm, and a copy by the package with each schedule."""
    from ddp_job import assert_equal_bits, loss_of, network, wrap

    import adacons_hvd.ddp
    from adacons_hvd import AdaCons

    def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
        if adam:
            return torch.optim.Adam(model.parameters(), lr=0.01)
        return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)

    plain = network(7, getattr(torch, dtype_name))
    plain_optimizer = optimizer_of(plain)
    algorithm = Algorithm1(beta, normalize)

    models = [wrap(copy.deepcopy(plain)) for _ in schedules]
    optimizers: list[Any] = [optimizer_of(model) for model in models]
    for model, optimizer, schedule in zip(models, optimizers, schedules, strict=True):
        adacons_hvd.ddp.attach(model, optimizer, AdaCons(momentum=beta, normalize=normalize), schedule=schedule)

    first = last = 0.0
    for step in range(steps):
        plain_optimizer.zero_grad()
        loss = loss_of(plain, step)
        loss.backward()
        algorithm(plain)
        plain_optimizer.step()
        expected = torch.cat([p.detach().reshape(-1) for p in plain.parameters()])

        for model, optimizer, schedule in zip(models, optimizers, schedules, strict=True):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
            found = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
            off = float((found - expected).norm() / expected.norm())
            assert off <= tolerance, f"{schedule}: parameters are off by {off:.2e} after step {step}"
        first, last = (loss.item() if step == 0 else first), loss.item()
    for model in models:
        assert_equal_bits(model.parameters())
    return last / first, [(optimizer.report.schedule, optimizer.report.steps) for optimizer in optimizers]


@pytest.mark.ranks(2, 3, 4, launcher="torchrun")
@pytest.mark.time_limit(240)
def test_fifty_steps_are_those_of_algorithm_1(cluster):
    schedules = ["two-pass", "one-pass", "gather"]
    for progress, done in cluster.run(side_by_side, 50, 1e-10, "float64", schedules, 0.99, True, False):
        assert done == [(schedule, 50) for schedule in schedules]
        assert progress < 0.9  # it is training, not standing still
    for progress, ((_, steps),) in cluster.run(side_by_side, 50, 1e-4, "float32", ["auto"], 0.99, True, False):
        assert steps == 50
        assert progress < 0.9


@pytest.mark.ranks(3, launcher="torchrun")
@pytest.mark.time_limit(240)
@pytest.mark.parametrize(("beta", "normalize", "adam"), [(0.0, False, True), (0.99, False, True), (0.0, True, False)])
def test_so_are_those_of_the_ablation(cluster, beta, normalize, adam):
    cluster.run(side_by_side, 50, 1e-10, "float64", ["one-pass"], beta, normalize, adam)
