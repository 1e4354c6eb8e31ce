"""Trainings by an optimizer of PyTorch, whatever aggregates. Runs on the ranks."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from cases import GIVEN, given_gradients

#: What is remembered under another rank's lead is told by a warning.
SAYS_WHO_LEADS = True


class Given(torch.nn.Module):
    """Parameters whose gradients can be chosen."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        super().__init__()
        self.all = torch.nn.ParameterList(parameters)

    def forward(self) -> list[torch.Tensor]:
        return [p.clone() for p in self.all]


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
        options = {"momentum": 0.9} if self.kind == "SGD" else {}
        return getattr(torch.optim, self.kind)(parameters, lr=0.01, **options)

    def forward(self) -> list[torch.Tensor]:
        return [p.clone() for p in self.parameters]

    def step(self, number: int) -> None:
        self.optimizer.zero_grad()
        self.backward(number, self.forward())
        self.optimizer.step()

    def backward(self, number: int, outputs: list[torch.Tensor]) -> None:
        torch.autograd.backward(outputs, given_gradients(number))

    def values(self) -> list[np.ndarray]:
        return [p.detach().numpy().copy() for p in self.parameters]

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
        with torch.no_grad():
            for p, value in zip(self.parameters, saved["values"], strict=True):
                p.copy_(value)

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
