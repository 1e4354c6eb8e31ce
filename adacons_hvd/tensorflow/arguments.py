"""The arguments TensorFlow's and Keras' bindings have in common, checked."""

from __future__ import annotations

import warnings
from typing import Any

import horovod.tensorflow as hvd
from horovod.tensorflow.mpi_ops import ProcessSet

from ..engine.settings import (
    check_aggregator,
    check_compression,
    check_count,
    check_granularity,
    check_groups,
    check_op,
    check_predivide,
    check_process_set,
    check_replicas_interval,
    parameter_lists,
)
from .settings import Named, Settings, is_variable, key_of

__all__ = ["checked_groups", "checked_settings"]


def checked_settings(**given: Any) -> Settings:
    """The settings, or an error that names the argument and the value."""
    aggregator, op, predivide = given["aggregator"], given["op"], given["gradient_predivide_factor"]
    check_aggregator(aggregator, given["schedule"])
    if aggregator is not None:
        check_op(op, hvd)
    check_compression(given["compression"])
    check_process_set(given["process_set"], ProcessSet)
    check_count("bucket_bytes", given["bucket_bytes"])
    check_predivide(predivide)
    if predivide != 1.0 and op != hvd.Average:
        raise ValueError("gradient_predivide_factor is for op=Average only")
    granularity = check_granularity(given["granularity"], is_variable, key_of)
    groups = check_groups(given["groups"], is_variable, key_of)
    if "check_replicas" in given:
        check_replicas_interval(given["check_replicas"])
    (may_differ,) = parameter_lists("may_differ", [given.pop("may_differ", ())], is_variable, key_of)
    return Settings(
        **{
            **given,
            "granularity": _named(granularity),
            "groups": _named(groups),
            "may_differ": frozenset(map(key_of, may_differ)),
        }
    )


def checked_groups(groups: Any, num_groups: int) -> int | list[list[Any]] | None:
    """Horovod's ``groups``, or its older name for them."""
    if num_groups != 0:
        warnings.warn("num_groups has been replaced by groups", DeprecationWarning, stacklevel=3)
        groups = num_groups if groups is None else groups
    return check_groups(groups, is_variable, key_of)


def _named(argument: Any) -> Any:
    if not isinstance(argument, list):
        return argument
    return tuple(tuple(map(Named.of, group)) for group in argument)
