"""The arguments TensorFlow's and Keras' bindings have in common, checked."""

from __future__ import annotations

import warnings
from typing import Any

import horovod.tensorflow as hvd

from ..engine.settings import check_aggregator, check_op, check_predivide
from .reducer import Settings, key_of

__all__ = ["checked_groups", "checked_settings"]


def checked_settings(**given: Any) -> Settings:
    """The settings, or an error that names the argument and the value."""
    aggregator, op, schedule = given["aggregator"], given["op"], given["schedule"]
    if aggregator is not None:
        check_aggregator(aggregator, schedule)
        check_op(op, hvd)
    predivide = given["gradient_predivide_factor"]
    check_predivide(predivide)
    if predivide != 1.0 and op != hvd.Average:
        raise ValueError("gradient_predivide_factor is for op=Average only")
    granularity = given["granularity"]
    if isinstance(granularity, str):
        if granularity not in ("model", "layer"):
            raise ValueError(f'granularity must be "model", "layer" or lists of variables, got {granularity!r}')
    else:
        given["granularity"] = _variable_lists("granularity", granularity)
    return Settings(**given)


def checked_groups(groups: Any, num_groups: int) -> int | list[list[Any]] | None:
    """Horovod's ``groups``, or its older name for them."""
    if num_groups != 0:
        warnings.warn("num_groups has been replaced by groups", DeprecationWarning, stacklevel=3)
        groups = num_groups if groups is None else groups
    if groups is None:
        return None
    if isinstance(groups, int):
        if groups < 0:
            raise ValueError(f"groups must not be negative, got {groups}")
        return groups
    return _variable_lists("groups", groups)


def _variable_lists(argument: str, lists: Any) -> list[list[Any]]:
    result = [list(group) for group in lists]
    seen = set()
    for variable in (v for group in result for v in group):
        if not hasattr(variable, "shape"):
            raise ValueError(f"{argument} must hold variables, found {type(variable).__name__}")
        if key_of(variable) in seen:
            raise ValueError(f"a variable of shape {tuple(variable.shape)} is in {argument} twice")
        seen.add(key_of(variable))
    return result
