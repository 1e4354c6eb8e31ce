"""Whether a loss scaler and an optimizer's step go together.

DDP aggregates in backward, when gradients are scaled. So the scale has to be known by then, and a scaler that shows up
only in the optimizer's step comes too late: all that is left is to say so.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch

__all__ = ["misuse_of_scaler"]

# torch.amp has the class since PyTorch 2.3; before, it was CUDA's alone.
_GradScaler: Any = getattr(torch.amp, "GradScaler", None) or torch.cuda.amp.GradScaler
_STEP = inspect.unwrap(_GradScaler.step).__code__


def misuse_of_scaler(given: Any, optimizers: Sequence[torch.optim.Optimizer]) -> str:
    """What is wrong with the step that begins now, or nothing. ``given`` is the scaler that attach() was given."""
    scaler = _stepping_scaler()
    expected = given is not None and given.is_enabled()
    if scaler is not None and scaler.is_enabled() and scaler is not given:
        which = "no grad_scaler" if given is None else "another grad_scaler"
        return (
            f"the optimizer steps under a GradScaler, but attach() was given {which}, so scaled gradients were "
            "aggregated as if they were not: give attach() that one, as grad_scaler="
        )
    if expected and scaler is None and not _unscaled(given, optimizers):
        return (
            "attach() was given a grad_scaler, but step() was called without it, along scaled gradients: call "
            "scaler.step(optimizer), or leave grad_scaler= out if the loss is not scaled"
        )
    return ""


def _stepping_scaler() -> Any:
    """The scaler whose ``step()`` calls the function that asks, if there is one."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _STEP:
        frame = frame.f_back
    return None if frame is None else frame.f_locals["self"]


def _unscaled(scaler: Any, optimizers: Sequence[torch.optim.Optimizer]) -> bool:
    """Whether ``scaler.unscale_()`` was called for one of these since the last ``update()``."""
    states = scaler._per_optimizer_states
    return any(states[id(o)]["stage"].name != "READY" for o in optimizers if id(o) in states)
