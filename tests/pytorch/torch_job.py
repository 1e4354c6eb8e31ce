"""Training a PyTorch model on every rank, beside the oracle. Runs on the ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import harness
import numpy as np
import oracle
import torch


def array(tensor: torch.Tensor | None, like: torch.Tensor) -> np.ndarray:
    """A gradient as float64 (or complex128), zeros where there is none."""
    if tensor is None:
        tensor = torch.zeros_like(like)
    tensor = tensor.detach()
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    return tensor.to(wide).resolve_conj().contiguous().numpy().copy()


def assert_equal_bits(tensors: Sequence[torch.Tensor], ranks: Sequence[int] | None = None) -> None:
    """These ranks (by default all) must hold the same bits."""
    flat = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in tensors if t.numel()]
    bits = b"".join(bytes(t.tolist()) for t in flat)
    everyone = harness.gather(hashlib.sha256(bits).hexdigest())
    for rank in range(len(everyone)) if ranks is None else ranks:
        assert everyone[rank] == everyone[ranks[0] if ranks else 0], (
            f"rank {rank} holds other parameters than the rest: {everyone}"
        )


def compare(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[torch.Tensor],
    backward: Callable[[int], Any],
    *,
    steps: int = 6,
    settings: dict[str, Any] | None = None,
    groups: Sequence[Sequence[int]] | None = None,
    tolerance: float = 1e-5,
    transform: Callable[[np.ndarray], np.ndarray] | None = None,
    ranks: Sequence[int] | None = None,
    after: Callable[[int], None] | None = None,
    by_step: bool = False,
) -> None:
    """Train, hold every aggregated gradient against the oracle, and compare parameters.

    ``backward(step)`` computes gradients. The oracle is given what they are just before
    ``synchronize()``, through ``transform``; ``groups`` as in :class:`oracle.Grouped`. ``ranks``
    says which ranks work together, if not all. With ``by_step``, ``step()`` does it all, as in most
    scripts, and what is held against the oracle is how far it moved parameters (plain SGD).
    """
    raw, found = [], []
    for step in range(steps):
        optimizer.zero_grad()
        backward(step)
        mine = [array(p.grad, p) for p in parameters]
        raw.append([transform(x) for x in mine] if transform is not None else mine)
        if by_step:
            before = [array(p, p) for p in parameters]
            optimizer.step()
            rate = optimizer.param_groups[0]["lr"]
            found.append([(old - array(p, p)) / rate for old, p in zip(before, parameters, strict=True)])
        else:
            optimizer.synchronize()
            found.append([array(p.grad, p) for p in parameters])
            with optimizer.skip_synchronize():
                optimizer.step()
        if after is not None:
            after(step)
    everyone = harness.gather(raw)
    workers = range(len(everyone)) if ranks is None else ranks
    if harness.rank() == workers[0]:
        judge = oracle.Grouped(groups or [list(range(len(parameters)))], **(settings or {}))
        for step in range(steps):
            expected = judge([everyone[worker][step] for worker in workers])
            off = oracle.error(found[step], expected)
            assert off <= tolerance, f"step {step} is off by {off:.2e}, more than {tolerance:.0e}"
    assert_equal_bits(parameters, workers)


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A small network that is the same on every rank, with layers of unlike sizes."""
    generator = torch.Generator().manual_seed(seed)
    widths = [int(w) for w in torch.randint(3, 12, (3,), generator=generator)]
    model = torch.nn.Sequential(
        torch.nn.Linear(6, widths[0]),
        torch.nn.Tanh(),
        torch.nn.Linear(widths[0], widths[1]),
        torch.nn.Tanh(),
        torch.nn.Linear(widths[1], widths[2]),
    ).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


class Batches:
    """Random inputs and targets, different on every rank."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        self.generator = torch.Generator().manual_seed(1000 * seed + harness.rank())
        self.dtype = dtype

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype)


def loss_of(model: torch.nn.Module, batches: Batches) -> torch.Tensor:
    """A loss whose gradients differ between ranks in direction and in length, yet have a mean.

    Gradients that cancel have statistics with few correct digits in any single precision; what
    happens to those has tests of its own.
    """
    x = batches(8, 6)
    target = 4 + x.sum(1, keepdim=True) + (1 + harness.rank()) * 0.2 * batches(8, 1)
    return (model(x) - target).square().mean()
