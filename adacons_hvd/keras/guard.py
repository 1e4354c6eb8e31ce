"""Noticing steps along gradients that were never aggregated, where a distributed optimizer is in use.

Every step of an optimizer of Keras comes past :func:`check_step`, whichever way it was reached. A step is fine if a
distributed optimizer is taking it, with what it has just aggregated. It is an error, on all ranks, if it goes around
the distributed optimizer it is of, or if a plain optimizer takes it for variables that a distributed one trains.

Of other variables a plain optimizer may take steps, since a rank may well train a model of its own. But it is warned
of once, because it may as well have been forgotten.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

from ..engine.replicas import stray_step

if TYPE_CHECKING:
    from .binding import Binding

__all__ = ["check_step", "claim", "forget_saved", "mark_saved"]

#: The mark of a plain optimizer that was saved as a distributed one, among its attributes.
_SAVED = "_adacons_saved"
#: The mark of a plain optimizer that was warned of.
_WARNED = "_adacons_warned"

# Which distributed optimizer trains a variable; None if variables of this kind are each rank's own.
_owners: dict[Hashable, weakref.ref[Binding] | None] = {}


def claim(binding: Binding, variables: Sequence[Any]) -> None:
    """Note that a distributed optimizer trains these variables, and which of them are each rank's own all the same."""
    key_of, reference = binding.backend.key_of, weakref.ref(binding)
    own = binding.local | binding.different
    for variable in variables:
        key = key_of(variable)
        if key not in _owners:
            weakref.finalize(binding.backend.native(variable), _owners.pop, key, None)
        _owners[key] = None if key in own else reference


def check_step(backend: Any, optimizer: Any, binding: Binding | None, variables: Sequence[Any]) -> None:
    """Raise an error if this step's gradients were never aggregated, and had to be.

    ``binding`` is that of the optimizer, if it is a distributed one.
    """
    hvd = backend.hvd
    if not hvd.is_initialized() or hvd.size() == 1:
        return
    if binding is not None:
        if not binding.stepping and not binding.trains_alone:
            binding.stray(
                f"something called the step of {type(optimizer).__name__} instead of the distributed optimizer's own",
                variables,
            )
        return
    found = [_owners[key] for key in map(backend.key_of, variables) if key in _owners]
    owners = [owner() for owner in found if owner is not None]
    if any(owner is not None and (owner.stepping or owner.trains_alone) for owner in owners):
        return
    if backend.is_aggregated_elsewhere(variables):
        return
    name = type(optimizer).__name__
    if owners:
        how = f"{name}, an optimizer that is not distributed, was used for variables of the distributed one"
        for owner in owners:
            if owner is not None:
                owner.stray(how, variables)
        raise stray_step([hvd.rank()], how)
    if _SAVED in vars(optimizer):
        raise stray_step(
            [hvd.rank()],
            f"{name} was a distributed optimizer when its model was saved, and is none since Keras has loaded it. "
            "Load the model with load_model of adacons_hvd, or pass its optimizer to DistributedOptimizer; where this "
            "rank is meant to train alone, compile the model with a new optimizer",
        )
    if not found and _WARNED not in vars(optimizer):
        vars(optimizer)[_WARNED] = True
        warnings.warn(
            f"{name} is not distributed, so its steps use gradients of rank {hvd.rank()} alone. If this model is meant "
            "to be trained by all ranks together, pass the optimizer to DistributedOptimizer",
            stacklevel=2,
        )


def mark_saved(optimizer: Any) -> None:
    """Note that this plain optimizer was a distributed one when it was saved."""
    vars(optimizer)[_SAVED] = True


def forget_saved(optimizer: Any) -> None:
    """This optimizer is about to be distributed again."""
    vars(optimizer).pop(_SAVED, None)
