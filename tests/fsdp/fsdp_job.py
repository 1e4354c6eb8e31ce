"""Training a sharded model on every rank, beside the oracle. Runs on the ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import oracle
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import adacons_hvd.fsdp
from adacons_hvd import AdaCons


def start(replicas: int = 0) -> Any:
    """The mesh of all ranks: of one dimension, or of so many replicas of shards."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    if not replicas:
        return dist.init_device_mesh("cpu", (dist.get_world_size(),))
    shape = replicas, dist.get_world_size() // replicas
    return dist.init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))


def network(seed: int = 0, dtype: torch.dtype = torch.float64, width: int = 11) -> torch.nn.Sequential:
    """The same on every rank; layers of unlike sizes, few of them a multiple of anything."""
    generator = torch.Generator().manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, width), torch.nn.Tanh(), torch.nn.Linear(width, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)
    ).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


#: The parameters of each unit of :func:`sharded`, by their place in the network, in the order of the units.
UNITS = [[4, 5], [0, 1], [2, 3]]


def sharded(model: torch.nn.Sequential, mesh: Any = None, **options: Any) -> torch.nn.Sequential:
    """The network with its first two layers as a unit each, and the last in the root's own."""
    mesh = start() if mesh is None else mesh
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def inputs(step: int, dtype: torch.dtype) -> torch.Tensor:
    """Random inputs that differ between ranks and steps, and are the same when asked for again."""
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    return torch.randn(8, 6, generator=generator, dtype=torch.float64).to(dtype)


def loss_of(model: Any, step: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A loss whose gradients differ between ranks in direction and in length, yet have a mean."""
    x = inputs(step, dtype)
    target = 4 + x.sum(1, keepdim=True) * (1 + 0.3 * dist.get_rank())
    loss: torch.Tensor = (model(x).to(dtype) - target).square().mean()
    return loss


def whole(tensors: Any) -> list[torch.Tensor]:
    """Sharded tensors, gathered."""
    return [t.detach().full_tensor() for t in tensors]


def everyone(value: Any) -> list[Any]:
    """Every rank's value, by PyTorch alone."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def off(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """How far apart two lists are, relative to the second."""
    return oracle.error([f.double().numpy() for f in found], [e.double().numpy() for e in expected])


Optimizer = Callable[[Any], torch.optim.Optimizer]


class Twin:
    """The same training of an unsharded model, which knows nothing of FSDP or the package.

    Its gradients are this rank's own, and what it steps along is the oracle's aggregate of everyone's.
    """

    def __init__(self, model: torch.nn.Module, make_optimizer: Optimizer, together: int = 1, **settings: Any) -> None:
        #: How many ranks in a row make one worker, whose gradient is the mean of theirs.
        self.together = together
        self.model = copy.deepcopy(model)
        self.optimizer = make_optimizer(self.model.parameters())
        self.judge = oracle.Grouped(UNITS, **settings)

    def step(self, losses: Callable[[torch.nn.Module], Sequence[torch.Tensor]], clip: float = 0) -> None:
        parameters = list(self.model.parameters())
        self.optimizer.zero_grad()
        for loss in losses(self.model):
            loss.backward()
        ranks = everyone([p.grad.double().numpy() for p in parameters])
        replicas = [ranks[first : first + self.together] for first in range(0, len(ranks), self.together)]
        rows = [[sum(same) / self.together for same in zip(*replica, strict=True)] for replica in replicas]
        for p, gradient in zip(parameters, self.judge(rows), strict=True):
            p.grad = torch.from_numpy(gradient).to(p.dtype)
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        self.optimizer.step()


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9)


def attached(
    model: torch.nn.Module, make_optimizer: Optimizer = momentum, aggregator: Any = None, **options: Any
) -> Any:
    """An optimizer of a sharded model, with an aggregator."""
    optimizer = make_optimizer(model.parameters())
    adacons_hvd.fsdp.attach(model, optimizer, AdaCons() if aggregator is None else aggregator, **options)
    return optimizer


def assert_same_everywhere(tensors: Sequence[torch.Tensor]) -> None:
    """All ranks must have gathered the same bits."""
    rows = everyone([t.numpy().tobytes() for t in tensors])
    assert all(row == rows[0] for row in rows)
