"""The arguments that bindings have in common, checked in one place: one sentence for each mistake.

Every function raises an error that names the argument and the value. None imports a framework: what a parameter or a
process set is, the binding says.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable
from typing import Any

from ..aggregators import Aggregator
from ..costs import Network
from ..schedules import SCHEDULES

__all__ = [
    "BUCKET_BYTES",
    "check_aggregator",
    "check_compression",
    "check_count",
    "check_grad_scaler",
    "check_granularity",
    "check_groups",
    "check_members",
    "check_op",
    "check_predivide",
    "check_process_set",
    "check_replicas_interval",
    "check_schedule",
    "parameter_lists",
]

#: How much gradient travels together unless the user says otherwise: large enough to fill a fast
#: network, small enough to begin while backward still runs.
BUCKET_BYTES = 32 << 20

Key = Callable[[Any], Hashable]


def check_schedule(schedule: Any) -> None:
    """Refuse a schedule that is unknown; also where there is no aggregator that would use it.

    >>> check_schedule("one-pas")
    Traceback (most recent call last):
    ValueError: schedule must be one of auto, fast, two-pass, ..., or a Network, got 'one-pas'
    """
    if isinstance(schedule, Network):
        return
    choices = ["auto", "fast", *SCHEDULES]
    if not isinstance(schedule, str) or schedule not in choices:
        raise ValueError(f"schedule must be one of {', '.join(choices)}, or a Network, got {schedule!r}")


def check_aggregator(aggregator: Any, schedule: Any) -> None:
    """Refuse what is no aggregator, and a schedule that cannot serve it. None is no aggregator, and fine."""
    check_schedule(schedule)
    if aggregator is None:
        return
    if not isinstance(aggregator, Aggregator):
        raise TypeError(f"aggregator must be an Aggregator such as AdaCons(), got {aggregator!r}")
    if schedule in SCHEDULES and aggregator.needs_gramian and not SCHEDULES[schedule].gives_gramian:
        able = ", ".join(name for name, cls in SCHEDULES.items() if cls.gives_gramian)
        raise ValueError(
            f"{aggregator!r} needs the Gramian of all gradients, which schedule={schedule!r} "
            f"never sees; use one of {able}"
        )


def check_op(op: Any, hvd: Any) -> None:
    """Refuse an aggregator beside another way to combine gradients; ``hvd`` is Horovod's module."""
    if op != hvd.Average:
        name = {hvd.Sum: "Sum", hvd.Adasum: "Adasum"}.get(op, repr(op))
        raise ValueError(
            f"op={name} and an aggregator are two answers to one question, how gradients are "
            "combined. Leave op out, or leave the aggregator out."
        )


def check_count(argument: str, value: Any) -> None:
    """Refuse what is no whole number above zero.

    >>> check_count("backward_passes_per_step", 1.5)
    Traceback (most recent call last):
    ValueError: backward_passes_per_step must be a positive whole number, got 1.5
    """
    if not _is_whole(value) or value <= 0:
        raise ValueError(f"{argument} must be a positive whole number, got {value!r}")


def check_replicas_interval(value: Any) -> None:
    """Refuse an interval for comparing replicas that is no whole number; 0 means never."""
    if not _is_whole(value) or value < 0:
        raise ValueError(
            f"check_replicas must be a whole number of steps, or 0 to compare replicas never, got {value!r}"
        )


def check_predivide(factor: Any) -> None:
    """Refuse a ``gradient_predivide_factor`` that is no positive number."""
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not factor > 0:
        raise ValueError(f"gradient_predivide_factor must be a positive number, got {factor!r}")


def check_compression(compression: Any) -> None:
    """Refuse what cannot compress and decompress; None is no compression."""
    if compression is None:
        return
    if not callable(getattr(compression, "compress", None)) or not callable(getattr(compression, "decompress", None)):
        raise TypeError(
            "compression must be a compressor such as Compression.fp16, with compress() and decompress(), "
            f"got {compression!r}"
        )


def check_grad_scaler(scaler: Any) -> None:
    """Refuse what is no gradient scaler; None is none."""
    if scaler is None:
        return
    if not all(callable(getattr(scaler, name, None)) for name in ("is_enabled", "scale", "unscale_", "update")):
        raise TypeError(f"grad_scaler must be the torch.amp.GradScaler in use, got {scaler!r}")


def check_process_set(process_set: Any, kind: type) -> None:
    """Refuse what is no process set of Horovod's, or one that was not added yet; ``kind`` is Horovod's class."""
    if not isinstance(process_set, kind):
        raise TypeError(f"process_set must be a ProcessSet such as hvd.add_process_set([0, 1]), got {process_set!r}")


def check_granularity(granularity: Any, is_parameter: Callable[[Any], bool], key: Key = id) -> str | list[list[Any]]:
    """``granularity`` as the bindings keep it: a word, or lists of parameters."""
    if isinstance(granularity, str):
        if granularity not in ("model", "layer"):
            raise ValueError(f'granularity must be "model", "layer" or lists of parameters, got {granularity!r}')
        return granularity
    return parameter_lists("granularity", granularity, is_parameter, key)


def check_groups(groups: Any, is_parameter: Callable[[Any], bool], key: Key = id) -> int | list[list[Any]] | None:
    """Horovod's ``groups`` as the bindings keep it: a number of groups, lists of parameters, or None."""
    if groups is None:
        return None
    if _is_whole(groups):
        if groups < 0:
            raise ValueError(f"groups must not be negative, got {groups}")
        return int(groups)
    return parameter_lists("groups", groups, is_parameter, key)


def check_members(argument: str, lists: Any, known: Collection[Hashable], key: Key = id) -> None:
    """Refuse lists that name parameters which are none of the ``known`` ones; a word or a number is fine."""
    if not isinstance(lists, (list, tuple)):
        return
    foreign = [parameter for group in lists for parameter in group if key(parameter) not in known]
    if foreign:
        count, some = len(foreign), "parameter" if len(foreign) == 1 else "parameters"
        raise ValueError(
            f"{argument} names {count} {some} that this optimizer does not train, the first of shape "
            f"{tuple(foreign[0].shape)}"
        )


def parameter_lists(argument: str, lists: Any, is_parameter: Callable[[Any], bool], key: Key = id) -> list[list[Any]]:
    """Lists of parameters, none of them in two places."""
    if not isinstance(lists, Iterable) or isinstance(lists, (str, bytes)) or is_parameter(lists):
        raise ValueError(f"{argument} must be lists of parameters, got {lists!r}")
    result = []
    for group in lists:
        if not isinstance(group, Iterable) or isinstance(group, (str, bytes)) or is_parameter(group):
            raise ValueError(f"{argument} must be lists of parameters, found {type(group).__name__} in place of a list")
        result.append(list(group))
    seen: set[Hashable] = set()
    for parameter in (p for group in result for p in group):
        if not is_parameter(parameter):
            raise ValueError(f"{argument} must hold parameters, found {type(parameter).__name__}")
        if key(parameter) in seen:
            raise ValueError(f"a parameter of shape {tuple(parameter.shape)} is in {argument} twice")
        seen.add(key(parameter))
    return result


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
