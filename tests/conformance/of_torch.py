"""Trainings by an optimizer of PyTorch, whatever aggregates. Runs on the ranks."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from string import ascii_lowercase
from typing import Any

import harness
import numpy as np
import pytest
import torch
import torch.distributed as dist
from cases import GIVEN, given_gradients
from guards import TOGETHER, Stray

#: What is remembered under another rank's lead is told by a warning.
SAYS_WHO_LEADS = True


class Given(torch.nn.Module):
    """Parameters whose gradients can be chosen."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        super().__init__()
        for name, p in zip(ascii_lowercase, parameters, strict=False):
            self.register_parameter(name, p)

    def forward(self) -> list[torch.Tensor]:
        return [p.clone() for p in self.parameters()]


def meet() -> None:
    """Begin to use torch.distributed, in the first training."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")


class Training:
    """Steps along given gradients; a binding adds the model and the distributed optimizer."""

    optimizer: Any

    def __init__(self, optimizer: str) -> None:
        self.parameters = [torch.nn.Parameter(torch.ones(s, dtype=torch.float64)) for s in GIVEN.shapes]
        self.kind = optimizer

    def plain(self, parameters: list[Any]) -> Any:
        """An optimizer that is not distributed."""
        options = {"momentum": 0.9} if self.kind == "MomentumSGD" else {}
        return getattr(torch.optim, self.kind.removeprefix("Momentum"))(parameters, lr=0.01, **options)

    def forward(self) -> list[torch.Tensor]:
        return [p.clone() for p in self.parameters]

    def step(self, number: int) -> None:
        self.backward(number)
        self.optimizer.step()

    def backward(self, number: int, through: Any = None, factor: float = 1.0) -> None:
        """Make the gradients of this step, which are given, times a factor."""
        self.optimizer.zero_grad()
        outputs = (through or self.forward)()
        torch.autograd.backward(outputs, [factor * gradient for gradient in given_gradients(number)])

    def values(self) -> list[np.ndarray]:
        return [p.detach().numpy().copy() for p in self.parameters]

    def assign(self, values: Sequence[Any]) -> None:
        with torch.no_grad():
            for p, value in zip(self.parameters, values, strict=True):
                p.copy_(torch.as_tensor(value))

    @property
    def report(self) -> Any:
        return self.optimizer.report

    def save(self) -> dict[str, Any]:
        """All there is, and by itself what the aggregator remembers."""
        file = io.BytesIO()
        torch.save({"values": self.parameters, "optimizer": self.optimizer.state_dict()}, file)
        file.seek(0)
        saved: dict[str, Any] = torch.load(file, weights_only=True)
        memory = saved["optimizer"].pop("adacons")
        return {**saved, "memory": {k: v.numpy() if torch.is_tensor(v) else v for k, v in memory.items()}}

    def load(self, saved: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(self.with_memory(saved))
        self.assign(saved["values"])

    def with_memory(self, saved: dict[str, Any]) -> dict[str, Any]:
        """The optimizer's state; a copy, because optimizers share what they load."""
        state: dict[str, Any] = copy.deepcopy(saved["optimizer"])
        if saved["memory"]:
            memory = {k: torch.as_tensor(v) if isinstance(v, np.ndarray) else v for k, v in saved["memory"].items()}
            state["adacons"] = memory
        return state

    def through_plain(self, saved: dict[str, Any]) -> dict[str, Any]:
        """The state of a plain optimizer that has loaded this one."""
        plain = self.plain(saved["values"])
        plain.load_state_dict(self.with_memory(saved))
        return {**saved, "optimizer": plain.state_dict(), "memory": {}}


class ModelTraining(Training):
    """A training of a model whose ranks meet by torch.distributed."""

    model: Any

    def __init__(self, optimizer: str) -> None:
        super().__init__(optimizer)
        meet()

    def forward(self) -> list[torch.Tensor]:
        outputs: list[torch.Tensor] = self.model()
        return outputs


def along_refused_gradients(training: Any, number: int) -> None:
    """The aggregator has refused them, so they are not aggregated."""
    with pytest.raises(FloatingPointError, match="the gradient of rank 1 holds NaN or infinity"):
        training.backward(number, factor=float("inf") if harness.rank() == 1 else 1.0)
    training.optimizer.step()


REFUSED = Stray(along_refused_gradients, "the last backward() failed", (TOGETHER,))
