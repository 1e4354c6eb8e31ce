"""Hooks on optimizers and on the end of a backward pass, for DDP and FSDP alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from ..aggregators import Aggregator

__all__ = ["check_steps", "introduce", "raise_after_backward", "unwrapped"]


class Checking(Protocol):
    """A reducer, as far as optimizers meet it."""

    def check_step(self) -> None:
        """Refuse a step of the optimizer that must not be taken."""
        ...

    def unscaling(self, scaler: Any) -> None:
        """Refuse a loss scaler, about to divide gradients, that was not known when they were aggregated."""
        ...


def unwrapped(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The optimizer and, if it wraps another, that one, and so on; the last takes the steps."""
    found = [optimizer]
    while isinstance(inner := getattr(found[-1], "optimizer", None), torch.optim.Optimizer):
        if any(inner is known for known in found):
            break
        found.append(inner)
    if not isinstance(found[-1], torch.optim.Optimizer) or not hasattr(optimizer, "param_groups"):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {optimizer!r}")
    return found


def introduce(
    optimizer: torch.optim.Optimizer,
    aggregator: Aggregator,
    reducer: Checking,
    save: Callable[..., None],
    load: Callable[..., None],
) -> bool:
    """Tell an optimizer of its aggregator, and have what it remembers saved and loaded with the optimizer's state.

    Returns whether that can be. An optimizer that only wraps another, and asks it for its state, can lack what hooks
    need.
    """
    told: Any = optimizer
    told.aggregator = aggregator
    told.report = None
    told._adacons_unscaling = reducer.unscaling
    if not hasattr(optimizer, "_optimizer_state_dict_post_hooks"):
        return False
    optimizer.register_state_dict_post_hook(save)
    optimizer.register_load_state_dict_pre_hook(load)
    return True


def check_steps(optimizer: torch.optim.Optimizer, reducer: Checking) -> None:
    """Have the reducer asked about every step of an optimizer."""
    optimizer.register_step_pre_hook(_BeforeStep(reducer))
    optimizer.register_step_post_hook(_AfterStep(reducer))


class _BeforeStep:
    def __init__(self, reducer: Checking) -> None:
        self.reducer = reducer

    def __call__(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A closure makes the gradients that the step uses only now, so they are looked at afterwards.
        if not _has_closure(args, kwargs):
            _check_step(self.reducer)


class _AfterStep(_BeforeStep):
    def __call__(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _has_closure(args, kwargs):
            _check_step(self.reducer)


# A compiled step must look every time, too.
@torch.compiler.disable
def _check_step(reducer: Checking) -> None:
    reducer.check_step()


def _has_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    # The first argument is the optimizer itself.
    return any(callable(argument) for argument in [*args[1:], *kwargs.values()])


def raise_after_backward(error: Exception) -> None:
    """Raise from ``backward()``, but only when DDP or FSDP has finished.

    Raised while they reduce gradients, an error leaves them in the middle of a step, and the next backward fails with
    an internal assertion. A callback runs when backward is over, in the order of registration, and they register their
    own after this one; hence a callback that registers another.
    """
    engine: Any = torch.autograd.Variable._execution_engine

    def last() -> None:
        raise error

    engine.queue_callback(lambda: engine.queue_callback(last))
