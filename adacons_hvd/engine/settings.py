"""The arguments that bindings have in common: one frozen object for all, checked in one place.

Every check raises an error of one sentence that names the argument and the value. No framework is imported: what a
parameter is, the binding says by a :class:`Parameters`.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..aggregators import Aggregator
from ..costs import Network
from ..schedules import SCHEDULES
from .plan import group_parameters, shared_buckets
from .replicas import CHECK_REPLICAS

__all__ = [
    "BUCKET_BYTES",
    "Lists",
    "Named",
    "Parameters",
    "Settings",
    "check_count",
    "check_members",
    "check_schedule",
    "groups_or_number",
    "parameter_lists",
]

#: How much gradient travels together unless the user says otherwise: large enough to fill a fast
#: network, small enough to begin while backward still runs.
BUCKET_BYTES = 32 << 20


class Parameters(NamedTuple):
    """How a binding tells parameters from other things, and from each other."""

    is_parameter: Callable[[Any], bool]
    key_of: Callable[[Any], Hashable]


@dataclass(frozen=True)
class Named:
    """A parameter that an argument names. It is known by its key, so that the argument keeps no model alive."""

    key: Hashable
    _reference: weakref.ref[Any] = field(compare=False, repr=False)

    @property
    def parameter(self) -> Any:
        """The parameter, or None if it is gone."""
        return self._reference()


#: Lists of parameters, as :class:`Settings` hold them.
Lists = tuple[tuple[Named, ...], ...]


@dataclass(frozen=True)
class Settings:
    """The arguments a user gave to a wrapper. Equal settings are equal objects, so they can be a key.

    Not every binding takes every argument; those that it does not take have their defaults.
    """

    #: None is the average of the library underneath.
    aggregator: Aggregator | None
    schedule: str | Network = "auto"
    granularity: str | Lists = "model"
    # Left out of the hash, but not of the comparison: a compressor of the user's own need not have a hash.
    compression: Any = field(default=None, hash=False)
    gradient_predivide_factor: float = 1.0
    groups: int | Lists | None = None
    sparse_as_dense: bool = False
    #: Horovod's; None over torch.distributed, where a model has its process group.
    process_set: Any = None
    bucket_bytes: int = BUCKET_BYTES
    overlap: bool = True
    grad_scaler: Any = None
    #: Horovod's way to combine gradients, which an aggregator replaces.
    op: Any = None
    device_dense: str = ""
    device_sparse: str = ""
    check_replicas: int = CHECK_REPLICAS
    #: "rank" or "host": what is a worker.
    workers: str = "rank"
    #: Parameters that are meant to differ between ranks.
    may_differ: frozenset[Named] = frozenset()

    @classmethod
    def checked(cls, parameters: Parameters, horovod: Any = None, *, hosts: bool = False, **given: Any) -> Settings:
        """Settings of arguments as the user gave them, or an error that names the argument and the value.

        ``horovod`` is its module for the framework, or None over torch.distributed. ``hosts`` says whether the binding
        can make hosts workers.

        >>> Settings.checked(Parameters(lambda thing: False, id), aggregator=None, granularity="tensor")
        Traceback (most recent call last):
        ValueError: granularity must be "model", "layer" or lists of parameters, got 'tensor'
        """
        granularity = _check_granularity(given.pop("granularity", "model"), parameters)
        groups = _check_groups(given.pop("groups", None), parameters)
        (may_differ,) = parameter_lists("may_differ", [given.pop("may_differ", ())], parameters)
        settings = cls(
            granularity=granularity if isinstance(granularity, str) else _named(granularity, parameters),
            groups=_named(groups, parameters) if isinstance(groups, list) else groups,
            may_differ=frozenset(_named([may_differ], parameters)[0]),
            **given,
        )
        _check_aggregator(settings.aggregator, settings.schedule)
        _check_workers(settings, hosts)
        check_count("bucket_bytes", settings.bucket_bytes)
        _check_predivide(settings.gradient_predivide_factor)
        _check_compression(settings.compression)
        _check_grad_scaler(settings.grad_scaler)
        _check_replicas_interval(settings.check_replicas)
        if horovod is not None:
            _check_process_set(settings.process_set, horovod.ProcessSet)
            if settings.aggregator is not None:
                _check_op(settings.op, horovod)
            if settings.gradient_predivide_factor != 1.0 and settings.op != horovod.Average:
                raise ValueError("gradient_predivide_factor is for op=Average only")
        return settings

    def check_members(self, known: Collection[Hashable]) -> None:
        """Refuse arguments that name parameters which are none of the ``known`` ones."""
        for argument, lists in (("granularity", self.granularity), ("groups", self.groups)):
            if isinstance(lists, tuple):
                check_members(argument, [named for group in lists for named in group], known)
        check_members("may_differ", self.may_differ, known)

    def group_parameters(self, keys: Sequence[Hashable]) -> tuple[dict[Hashable, int], int]:
        """The group of every parameter by ``granularity``, and the number of groups."""
        return group_parameters(_keys(self.granularity), keys)

    @property
    def differing(self) -> frozenset[Hashable]:
        """The keys of parameters that are meant to differ between ranks."""
        return frozenset(named.key for named in self.may_differ)

    def shared_buckets(self, keys: Sequence[Hashable]) -> list[list[Hashable]] | None:
        """The parameters that share a bucket by ``groups``; None where buckets are filled by their size."""
        return shared_buckets(_keys(self.groups), keys)


def _named(lists: Sequence[Sequence[Any]], parameters: Parameters) -> Lists:
    return tuple(tuple(Named(parameters.key_of(p), weakref.ref(p)) for p in group) for group in lists)


def _keys(argument: Any) -> Any:
    return [[named.key for named in group] for group in argument] if isinstance(argument, tuple) else argument


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


def _check_aggregator(aggregator: Any, schedule: Any) -> None:
    """Refuse what is no aggregator, and a schedule that cannot serve it. None is no aggregator, and fine."""
    check_schedule(schedule)
    if aggregator is None:
        return
    if not isinstance(aggregator, Aggregator):
        raise TypeError(f"aggregator must be an Aggregator such as AdaCons(), got {aggregator!r}")
    if schedule in SCHEDULES and aggregator.needs and not SCHEDULES[schedule].sees_all:
        able = ", ".join(name for name, cls in SCHEDULES.items() if cls.sees_all)
        raise ValueError(
            f"{aggregator!r} needs {aggregator.needs}, which schedule={schedule!r} never sees; use one of {able}"
        )


def _check_workers(settings: Settings, hosts: bool) -> None:
    """Refuse what is no worker, and what goes with ranks alone."""
    if settings.workers not in ("rank", "host"):
        raise ValueError(f'workers must be "rank" or "host", got {settings.workers!r}')
    if settings.workers == "rank":
        return
    if not hosts:
        raise ValueError('workers="host" is for PyTorch over Horovod and for DDP; leave workers out here')
    if settings.aggregator is None:
        return
    if settings.schedule != "auto":
        raise ValueError(
            f'workers="host" has a schedule of its own, so schedule must stay "auto", got {settings.schedule!r}'
        )
    if settings.aggregator.nonfinite == "exclude":
        raise ValueError('nonfinite="exclude" is for workers="rank": no rank sees the whole gradient of its host')


def _check_op(op: Any, hvd: Any) -> None:
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


def _check_replicas_interval(value: Any) -> None:
    """Refuse an interval for comparing replicas that is no whole number; 0 means never."""
    if not _is_whole(value) or value < 0:
        raise ValueError(
            f"check_replicas must be a whole number of steps, or 0 to compare replicas never, got {value!r}"
        )


def _check_predivide(factor: Any) -> None:
    """Refuse a ``gradient_predivide_factor`` that is no positive number."""
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not factor > 0:
        raise ValueError(f"gradient_predivide_factor must be a positive number, got {factor!r}")


def _check_compression(compression: Any) -> None:
    """Refuse what cannot compress and decompress; None is no compression."""
    if compression is None:
        return
    if not callable(getattr(compression, "compress", None)) or not callable(getattr(compression, "decompress", None)):
        raise TypeError(
            "compression must be a compressor such as Compression.fp16, with compress() and decompress(), "
            f"got {compression!r}"
        )


def _check_grad_scaler(scaler: Any) -> None:
    """Refuse what is no gradient scaler; None is none."""
    if scaler is None:
        return
    if not all(callable(getattr(scaler, name, None)) for name in ("is_enabled", "scale", "unscale_", "update")):
        raise TypeError(f"grad_scaler must be the torch.amp.GradScaler in use, got {scaler!r}")


def _check_process_set(process_set: Any, kind: type) -> None:
    """Refuse what is no process set of Horovod's, or one that was not added yet; ``kind`` is Horovod's class."""
    if not isinstance(process_set, kind):
        raise TypeError(f"process_set must be a ProcessSet such as hvd.add_process_set([0, 1]), got {process_set!r}")


def _check_granularity(granularity: Any, parameters: Parameters) -> str | list[list[Any]]:
    if isinstance(granularity, str):
        if granularity not in ("model", "layer"):
            raise ValueError(f'granularity must be "model", "layer" or lists of parameters, got {granularity!r}')
        return granularity
    return parameter_lists("granularity", granularity, parameters)


def _check_groups(groups: Any, parameters: Parameters) -> int | list[list[Any]] | None:
    if groups is None:
        return None
    if _is_whole(groups):
        if groups < 0:
            raise ValueError(f"groups must not be negative, got {groups}")
        return int(groups)
    return parameter_lists("groups", groups, parameters)


def groups_or_number(groups: Any, num_groups: int) -> Any:
    """Horovod's ``groups``, or else its older name for a number of them."""
    if num_groups == 0:
        return groups
    warnings.warn("num_groups has been replaced by groups", DeprecationWarning, stacklevel=3)
    return num_groups if groups is None else groups


def check_members(argument: str, named: Iterable[Named], known: Collection[Hashable]) -> None:
    """Refuse an argument that names parameters which are none of the ``known`` ones."""
    foreign = [each for each in named if each.key not in known]
    if foreign:
        count, some = len(foreign), "parameter" if len(foreign) == 1 else "parameters"
        raise ValueError(
            f"{argument} names {count} {some} that this optimizer does not train, the first of shape "
            f"{tuple(foreign[0].parameter.shape)}"
        )


def parameter_lists(argument: str, lists: Any, parameters: Parameters) -> list[list[Any]]:
    """Lists of parameters, none of them in two places."""
    is_parameter, key_of = parameters
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
        if key_of(parameter) in seen:
            raise ValueError(f"a parameter of shape {tuple(parameter.shape)} is in {argument} twice")
        seen.add(key_of(parameter))
    return result


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
