"""Training on a GPU beside the oracle. Runs on the ranks; test modules take their marks from here, too.

Several ranks share one GPU. Gloo can do that: it takes what is on the GPU through the host. NCCL refuses two ranks on
one GPU of one host, so each rank gives itself out for a host of its own (`NCCL_HOSTID`); NCCL then goes through the
loopback network, with the same kernels as between hosts.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import harness
import numpy as np
import oracle
import torch

#: Where tensors are. With `GPU_TEST_DEVICE=cpu` the same lines run on a machine without a GPU, as far as that goes.
DEVICE = os.environ.get("GPU_TEST_DEVICE", "cuda")

#: How far a result may be from the oracle's: what its element type keeps of a number, and a little.
TOLERANCES = {"float64": 1e-10, "float32": 2e-5, "float16": 2e-3, "bfloat16": 1.5e-2}

#: NCCL's settings: it talks through the loopback network alone.
LOOPBACK = {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}


@cache
def why_not() -> str:
    """Why tests on a GPU cannot run here; empty if they can."""
    if DEVICE != "cuda" or torch.cuda.is_available():
        return ""
    return f"PyTorch {torch.__version__} sees no GPU"


def be_a_host() -> None:
    """Let NCCL take this rank for a host of its own. Before NCCL starts."""
    os.environ.update(LOOPBACK, NCCL_HOSTID=f"rank{harness.rank()}")


def horovod() -> Any:
    """`adacons_hvd.torch`, initialised, for ranks that share the GPU."""
    import adacons_hvd.torch as hvd

    be_a_host()
    hvd.init()
    return hvd


# --- models and data --------------------------------------------------------------------------------------------------


def network(dtype: torch.dtype = torch.float32, width: int = 11) -> torch.nn.Sequential:
    """The same on every rank; layers of unlike sizes, few of them a multiple of anything."""
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, width),
        torch.nn.Tanh(),
        torch.nn.Linear(width, 7),
        torch.nn.Tanh(),
        torch.nn.Linear(7, 3),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model.to(DEVICE, dtype)


class Embedding(torch.nn.Module):
    """A table of which each batch needs a few rows, and a layer."""

    def __init__(self, dense: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.nn.Embedding(50, 6, sparse=True, device=DEVICE)
        self.layer = torch.nn.Linear(6, 3, device=DEVICE)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        self.layer.requires_grad_(dense)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Inputs are numbers as for other models; here they say which rows.
        return self.layer(self.table((x.abs() * 1000).long() % 50).mean(1))


def batch(step: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random inputs that differ between ranks and steps, and are the same when asked for again."""
    generator = torch.Generator().manual_seed(100 * step + harness.rank())
    return torch.randn(8, 6, generator=generator).to(DEVICE, dtype)


def loss_of(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A loss whose gradients differ between ranks in direction and in length, yet have a mean."""
    target = 4 + x.float().sum(1, keepdim=True) * (1 + 0.3 * harness.rank())
    return (model(x).float() - target).square().mean()


# --- the oracle -------------------------------------------------------------------------------------------------------


class Record:
    """Every step's gradients before and after they were aggregated."""

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self.parameters = list(parameters)
        self.raw: list[list[np.ndarray]] = []
        self.found: list[list[np.ndarray]] = []

    def before(self, gradients: Sequence[torch.Tensor | None], scale: float = 1.0) -> None:
        """This rank's own gradients, `scale` times as large as they are."""
        self.raw.append(self._arrays(gradients, scale))

    def after(self, gradients: Sequence[torch.Tensor | None], scale: float = 1.0) -> None:
        """The aggregated gradients."""
        self.found.append(self._arrays(gradients, scale))

    def _arrays(self, gradients: Sequence[torch.Tensor | None], scale: float) -> list[np.ndarray]:
        return [_array(g, p) / scale for g, p in zip(gradients, self.parameters, strict=True)]

    def errors(self, groups: Sequence[Sequence[int]] | None = None, **settings: Any) -> list[float]:
        """How far each step was from what the oracle makes of all ranks' gradients."""
        everyone = harness.gather(self.raw)
        judge = oracle.Grouped(groups or [list(range(len(self.parameters)))], **settings)
        expected = [judge([worker[step] for worker in everyone]) for step in range(len(self.found))]
        return [oracle.error(found, right) for found, right in zip(self.found, expected, strict=True)]


def _array(gradient: torch.Tensor | None, like: torch.Tensor) -> np.ndarray:
    gradient = torch.zeros_like(like) if gradient is None else gradient
    gradient = gradient.detach()
    gradient = gradient.to_dense() if gradient.is_sparse else gradient
    return gradient.double().cpu().numpy().copy()


def gradients_of(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    return [p.grad for p in parameters]


def assert_equal_bits(tensors: Sequence[torch.Tensor]) -> None:
    """All ranks must hold the same bits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    everyone = harness.gather(digest.hexdigest())
    assert len(set(everyone)) == 1, f"the ranks hold different parameters: {everyone}"


# --- streams and waiting ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def not_waiting() -> Iterator[None]:
    """Make every operation an error that lets the host wait for the GPU, in whichever thread."""
    if DEVICE != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def side_stream() -> Iterator[None]:
    """All work in here goes to another stream than the default one."""
    if DEVICE != "cuda":
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def wait_for_nobody(optimizer: torch.optim.Optimizer, backward: Callable[[int], Any], steps: int = 4) -> None:
    """Whole training steps, the last of them without waiting for the GPU.

    The first steps set things up. Replicas are compared in steps 1, 100, 200, ..., which reads a number.
    """
    for step in range(steps):
        optimizer.zero_grad()
        backward(step)
        optimizer.step()
    with not_waiting():
        for step in range(steps, 2 * steps):
            optimizer.zero_grad()
            backward(step)
            optimizer.step()
