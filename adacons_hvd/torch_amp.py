"""``torch.amp.GradScaler`` meets gradients only once they are aggregated.

A scaler divides gradients by the loss scale and looks for infinity among them, in ``unscale_()`` or in ``step()``. Done
to the gradients of one worker, the aggregator would be given gradients of unknown length, and a rank with an infinity
would leave the step out alone. So an optimizer that has a method ``_adacons_unscaling`` is told just before, in the
one function through which a scaler touches gradients.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

__all__ = ["WITHOUT_SCALER", "aggregate_before_unscaling", "other_scaler", "unscale"]

WITHOUT_SCALER = (
    "attach() was given a grad_scaler, but step() was called without it, along scaled gradients: call "
    "scaler.step(optimizer), or leave grad_scaler= out if the loss is not scaled"
)


def other_scaler(given: Any) -> str:
    """The sentence for a loss scaler that is not the one ``given`` to ``attach()``."""
    which = "no grad_scaler" if given is None else "another grad_scaler"
    return (
        f"a GradScaler unscales the gradients, but attach() was given {which}, so scaled gradients were "
        "aggregated as if they were not: give attach() that one, as grad_scaler="
    )


@functools.cache
def aggregate_before_unscaling() -> None:
    """Have every ``GradScaler`` tell optimizers that have ``_adacons_unscaling`` before it touches their gradients."""
    # torch.amp has the class since PyTorch 2.3; before, it was CUDA's alone.
    cls: Any = getattr(torch.amp, "GradScaler", None) or torch.cuda.amp.GradScaler
    original = cls._unscale_grads_

    @functools.wraps(original)
    def unscale_grads(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        tell = getattr(optimizer, "_adacons_unscaling", None)
        if tell is not None:
            tell(self)
        return original(self, optimizer, *args, **kwargs)

    cls._unscale_grads_ = unscale_grads


def unscale(grad_scaler: Any, reference: torch.Tensor) -> torch.Tensor | float:
    """The factor by which gradients have to be multiplied to undo the loss scale in force."""
    if grad_scaler is None or not grad_scaler.is_enabled():
        return 1.0
    # Scaling a one gives the scale without asking the device for its value.
    one = torch.ones((), dtype=torch.float64, device=reference.device)
    scale: torch.Tensor = grad_scaler.scale(one)
    return 1 / scale
