"""Training a DDP model on every rank, beside the oracle. Runs on the ranks."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import harness
import numpy as np
import oracle
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import adacons_hvd.ddp
from adacons_hvd import AdaCons

#: Buckets of some hundred bytes, so that small models have several.
SMALL_BUCKETS = 0.0004


def start() -> None:
    if not dist.is_initialized():
        dist.init_process_group("gloo")


def wrap(module: torch.nn.Module, **options: Any) -> Any:
    start()
    return DistributedDataParallel(module, **{"bucket_cap_mb": SMALL_BUCKETS, **options})


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """The same on every rank; layers of unlike sizes, few of them a multiple of anything."""
    generator = torch.Generator().manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 11),
        torch.nn.Tanh(),
        torch.nn.Linear(11, 7),
        torch.nn.Tanh(),
        torch.nn.Linear(7, 3),
    ).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def batch(step: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random inputs that differ between ranks and steps, and are the same when asked for again."""
    generator = torch.Generator().manual_seed(100_000 * seed + 100 * step + harness.rank())
    return torch.randn(8, 6, generator=generator, dtype=torch.float64).to(dtype)


def loss_of(model: torch.nn.Module, step: int, seed: int = 0) -> torch.Tensor:
    """A loss whose gradients differ between ranks in direction and in length, yet have a mean."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    x = batch(step, seed, dtype)
    target = 4 + x.sum(1, keepdim=True) * (1 + 0.3 * harness.rank())
    loss: torch.Tensor = (model(x) - target).square().mean()
    return loss


Loss = Callable[[torch.nn.Module, int], torch.Tensor]


def train(
    module: torch.nn.Module,
    loss: Loss = loss_of,
    *,
    steps: int = 4,
    aggregator: Any = None,
    options: dict[str, Any] | None = None,
    groups: Callable[[list[str]], list[list[int]]] | None = None,
    ranks: Sequence[int] | None = None,
    tolerance: float = 2e-5,
    make_optimizer: Callable[[Any], torch.optim.Optimizer] = lambda ps: torch.optim.SGD(ps, lr=0.02),
    passes: int = 1,
    oracle_settings: dict[str, Any] | None = None,
    **attached: Any,
) -> Any:
    """Train, hold every aggregated gradient against the oracle, and compare parameters.

    A twin of the module that knows nothing of DDP computes each rank's own gradient on the same
    data. ``groups`` maps the names of the parameters to lists of their numbers, for granularity;
    ``ranks`` are those that work together, if not all; ``passes`` backward passes make a step, all
    but the last under ``no_sync()``. Returns the optimizer.
    """
    twin = copy.deepcopy(module)
    model = wrap(module, **(options or {}))
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(list(named.values()))
    adacons_hvd.ddp.attach(model, optimizer, AdaCons() if aggregator is None else aggregator, **attached)
    raw, found = [], []
    for step in range(steps):
        optimizer.zero_grad()
        twin.zero_grad()
        for number in range(passes):
            with model.no_sync() if number < passes - 1 else nullcontext():
                loss(model, step * passes + number).backward()
            loss(twin, step * passes + number).backward()
        others = dict(twin.named_parameters())
        raw.append([array(others[name].grad, p) for name, p in named.items()])
        found.append([array(p.grad, p) for p in named.values()])
        optimizer.step()
        with torch.no_grad():
            for name, p in named.items():
                others[name].copy_(p)
    assert_equal_bits(named.values(), ranks)
    everyone = harness.gather(raw)
    workers = list(ranks or range(len(everyone)))
    if harness.rank() == workers[0]:  # what the others found has led them to the same bits
        members = groups(list(named)) if groups else [list(range(len(named)))]
        judge = oracle.Grouped(members, **(oracle_settings or {}))
        for step in range(steps):
            expected = judge([everyone[worker][step] for worker in workers])
            off = oracle.error(found[step], expected)
            assert off <= tolerance, f"step {step} is off by {off:.2e}, more than {tolerance:.0e}"
    return optimizer


def array(tensor: torch.Tensor | None, like: torch.Tensor) -> np.ndarray:
    """A gradient as float64 or complex128, zeros where there is none."""
    tensor = torch.zeros_like(like) if tensor is None else tensor
    tensor = tensor.detach()
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    return tensor.to(wide).contiguous().numpy().copy()


def assert_equal_bits(tensors: Iterable[torch.Tensor], ranks: Sequence[int] | None = None) -> None:
    """These ranks, by default all, must hold the same bits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    everyone = harness.gather(digest.hexdigest())
    held = {everyone[rank] for rank in (ranks or range(len(everyone)))}
    assert len(held) == 1, f"the ranks hold different parameters: {everyone}"
