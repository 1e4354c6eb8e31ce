"""AdaCons under mpirun, any number of ranks: real training against an oracle fed through mpi4py."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import oracle
import pytest
import torch
from mpi4py import MPI

SETTINGS = [
    {},
    {"scale": "average"},
    {"momentum": 0.0},
    {"normalize": False},
    {"momentum": 0.0, "normalize": False},
]


@pytest.fixture(scope="module")
def ours(hvd: ModuleType) -> ModuleType:
    import adacons_hvd.torch

    return adacons_hvd.torch


def gradients(parameters: list[torch.nn.Parameter]) -> list[np.ndarray]:
    return [np.array(p.grad.tolist()) for p in parameters if p.grad is not None]


def train(ours: ModuleType, comm: MPI.Intracomm, settings: dict[str, object], schedule: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 20), torch.nn.Tanh(), torch.nn.Linear(20, 1))
    parameters = list(model.parameters())
    optimizer = ours.DistributedOptimizer(
        torch.optim.SGD(parameters, lr=0.02),
        model.named_parameters(),
        aggregator=ours.AdaCons(**settings),
        schedule=schedule,
    )
    judge = oracle.Grouped([list(range(len(parameters)))], **settings)
    draw = torch.Generator().manual_seed(comm.rank)
    for _ in range(8):
        optimizer.zero_grad()
        x = torch.randn(8, 6, generator=draw)
        noise = torch.randn(8, 1, generator=draw)
        (model(x) - x.sum(1, keepdim=True) - 3 - 0.5 * noise).square().mean().backward()
        raw = comm.allgather(gradients(parameters))
        optimizer.synchronize()
        found = gradients(parameters)
        assert oracle.error(found, judge(raw)) < 1e-5
        with optimizer.skip_synchronize():
            optimizer.step()
    for rank, theirs in enumerate(comm.allgather([p.detach().numpy() for p in parameters])):
        for mine, other in zip(parameters, theirs, strict=True):
            assert np.array_equal(mine.detach().numpy(), other), f"rank {rank} differs"


@pytest.mark.parametrize("schedule", ["auto", "two-pass", "one-pass", "gather"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_training_agrees_with_the_oracle(ours, comm, settings, schedule):
    train(ours, comm, settings, schedule)
