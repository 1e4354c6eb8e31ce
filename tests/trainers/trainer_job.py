"""One small problem for every trainer, and the loop by hand that a trainer's result is held against. Runs on ranks.

The loop by hand is PyTorch's DDP with ``adacons_hvd.ddp.attach``, which ``tests/ddp`` holds against the oracle. A
trainer that takes the same batches must end with the same bits.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import harness
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import adacons_hvd.ddp
from adacons_hvd import AdaCons

ROWS, BATCH = 96, 4


def network() -> torch.nn.Sequential:
    """The same on every rank and in every call."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))


def dataset() -> torch.utils.data.TensorDataset:
    """Rows that ask for different things, so that an average is not the answer."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(ROWS, 6, generator=generator)
    y = 2 * x[:, :2] * torch.randn(ROWS, 2, generator=generator) + 1
    return torch.utils.data.TensorDataset(x, y)


def loss_of(model: Any, batch: Sequence[torch.Tensor]) -> torch.Tensor:
    x, y = batch
    return torch.nn.functional.mse_loss(model(x), y)


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


def overflowing_scaler() -> torch.amp.GradScaler:
    """One that scales so much that the first steps overflow in float16 and are left out."""
    return torch.amp.GradScaler("cpu", init_scale=2.0**20)


def rows_by_turns() -> list[Sequence[torch.Tensor]]:
    """This rank's batches where rows go round, as with PyTorch's DistributedSampler."""
    mine = torch.arange(harness.rank(), ROWS, harness.size())
    return [dataset()[part] for part in mine.split(BATCH)]


def batches_by_turns() -> list[Sequence[torch.Tensor]]:
    """This rank's batches where whole batches go round, as with Accelerate's."""
    return [dataset()[part] for part in torch.arange(ROWS).split(BATCH)][harness.rank() :: harness.size()]


def by_hand(
    batches: Iterable[Sequence[torch.Tensor]],
    *,
    aggregator: Any = "AdaCons",
    accumulate: int = 1,
    clip: float | None = None,
    dtype: torch.dtype | None = None,
    scaled: bool = False,
    **options: Any,
) -> torch.nn.Module:
    """Train over the batches; with a dtype under autocast, ``scaled`` with a loss scaler; options are DDP's."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    module = network()
    model = DistributedDataParallel(module, **options)
    optimizer = optimizer_of(model)
    aggregator = AdaCons() if aggregator == "AdaCons" else aggregator
    scaler = overflowing_scaler() if scaled else torch.amp.GradScaler("cpu", enabled=False)
    adacons_hvd.ddp.attach(model, optimizer, aggregator, grad_scaler=scaler)
    for number, batch in enumerate(batches, 1):
        last = number % accumulate == 0
        with nullcontext() if last else model.no_sync():
            with torch.autocast("cpu", dtype=dtype) if dtype else nullcontext():
                loss = loss_of(model, batch)
            scaler.scale(loss / accumulate).backward()
        if not last:
            continue
        scaler.unscale_(optimizer)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return module


def epochs(batches: list[Any], number: int) -> Iterable[Any]:
    return itertools.chain.from_iterable([batches] * number)


def bits(tensors: Any) -> str:
    """A digest of a module's parameters, or of any tensors."""
    tensors = tensors.parameters() if isinstance(tensors, torch.nn.Module) else tensors
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def bits_of_all_ranks(model: Any) -> str:
    """The digest, which must be every rank's."""
    everyone = harness.gather(bits(model))
    assert len(set(everyone)) == 1, f"the ranks hold different parameters: {everyone}"
    return everyone[0]


def assert_same(model: torch.nn.Module, batches: list[Any], **settings: Any) -> None:
    """The trainer's model is that of the loop by hand, bit for bit, and not that of averaging."""
    found = bits_of_all_ranks(model)
    assert found != bits(network()), "nothing was trained"
    assert found == bits(by_hand(batches, **settings)), "not what the loop by hand makes"
    assert found != bits(by_hand(batches, aggregator=None, **settings)), "no more than an average"
