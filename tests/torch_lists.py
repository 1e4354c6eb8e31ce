"""The lists name every optimizer and every learning-rate scheduler of PyTorch. A new one is a line here.

The tests of all bindings for PyTorch go through these lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

LR = torch.optim.lr_scheduler


def names_of(module: Any, base: type, without: Sequence[str] = ()) -> list[str]:
    """The public classes of a module of PyTorch's that derive from ``base``."""
    found = [name for name, cls in vars(module).items() if isinstance(cls, type) and issubclass(cls, base)]
    return sorted(name for name in found if name[0] != "_" and name not in without)


#: Every optimizer for dense gradients.
OPTIMIZERS = names_of(torch.optim, torch.optim.Optimizer, without=("Optimizer", "SparseAdam"))

#: Every scheduler and its arguments; None for those made of others.
SCHEDULERS = {
    "LambdaLR": {"lr_lambda": lambda step: 0.9**step},
    "MultiplicativeLR": {"lr_lambda": lambda step: 0.9},
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [1, 3]},
    "ConstantLR": {},
    "LinearLR": {},
    "ExponentialLR": {"gamma": 0.9},
    "CosineAnnealingLR": {"T_max": 5},
    "PolynomialLR": {"total_iters": 5},
    "CyclicLR": {"base_lr": 0.001, "max_lr": 0.02, "step_size_up": 2},
    "OneCycleLR": {"max_lr": 0.02, "total_steps": 10},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "ReduceLROnPlateau": {"patience": 0},
    "ChainedScheduler": None,
    "SequentialLR": None,
}


def trained_by(name: str, model: torch.nn.Module) -> list[torch.Tensor]:
    """The parameters that an optimizer of this name can train."""
    return [p for p in model.parameters() if p.ndim == 2 or name != "Muon"]


def scheduler_for(name: str, optimizer: torch.optim.Optimizer) -> Any:
    """The scheduler of this name for an optimizer."""
    if SCHEDULERS[name] is not None:
        return getattr(LR, name)(optimizer, **SCHEDULERS[name])
    parts = [LR.ConstantLR(optimizer), LR.ExponentialLR(optimizer, 0.9)]
    return LR.ChainedScheduler(parts) if name == "ChainedScheduler" else LR.SequentialLR(optimizer, parts, [2])


def advance(scheduler: Any) -> None:
    """Take a scheduler's step; one that watches the loss is shown one that does not fall."""
    scheduler.step(*([1.0] if isinstance(scheduler, LR.ReduceLROnPlateau) else []))
