"""Ranks agree once, before their first step together: on their settings and parameters, on names, on a schedule.

A rank describes what it was given (:func:`describe`) and tells the others of it (:class:`Arrival`); where descriptions
differ, all raise the same error (:func:`agree`). Then all choose the same schedule (:func:`choose_schedule`).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from .. import __version__, agreement
from ..calibration import assumed_rates, measured_rates
from ..collectives import Collectives
from ..costs import Choice, Network, Rates, choose
from ..ops import Tensor
from ..schedules import SCHEDULES
from .settings import Settings
from .trials import is_short, trial

__all__ = [
    "ONLY_SUMS",
    "Arrival",
    "Numbering",
    "Parameter",
    "agree",
    "canonical_names",
    "choose_schedule",
    "describe",
    "describe_average",
]

#: From how many bytes of gradient on one host is measured before a schedule is chosen. For less the
#: default figures are good enough; but not between hosts, whose networks differ a thousandfold.
MEASURED_FROM = 256 << 10

#: The choice that is left once a rank has called ``hvd.join()``.
ONLY_SUMS = Choice("two-pass", "a rank has joined: only sums are left")

#: The choice where there is no aggregator to choose for.
NO_AGGREGATOR = Choice("allreduce", "no aggregator")


def canonical_names(names: Sequence[str]) -> list[str]:
    """Keras' names of variables, as far as they are the same on ranks that have the same model.

    A rank that has made another model before has ``dense_3`` where others have ``dense_1``; so
    automatic numbers are given anew, in order of appearance. One that has loaded its model has
    ``dense/kernel`` where others have ``sequential/dense/kernel``; so outer scopes are left out.

    >>> canonical_names(["net/dense_7/kernel", "net/dense_7/bias", "dense_9/kernel", "head/kernel"])
    ['dense#0/kernel', 'dense#0/bias', 'dense#1/kernel', 'head#0/kernel']
    """
    seen: dict[str, list[str]] = {}

    def renumber(scope: str) -> str:
        stem = re.sub(r"_\d+$", "", scope)
        scopes = seen.setdefault(stem, [])
        if scope not in scopes:
            scopes.append(scope)
        return f"{stem}#{scopes.index(scope)}"

    return ["/".join([*map(renumber, name.split("/")[-2:-1]), name.split("/")[-1]]) for name in names]


class Numbering:
    """Numbers optimizers in the order of their first step, on each process set.

    The number is part of the names of an optimizer's collectives, and a name must be the same on every rank. An elastic
    job begins to number afresh whenever workers come or go; then optimizers that have been in use and those of a worker
    that has just started are numbered together.

    >>> numbering = Numbering()
    >>> [numbering.take(0), numbering.take(0), numbering.take(7)]
    [0, 1, 0]
    """

    def __init__(self) -> None:
        #: Changes when numbers, and all that ranks have agreed on, are void. Differs between ranks.
        self.generation = 0
        self._taken: Counter[int] = Counter()

    def restart(self) -> None:
        """Number afresh."""
        self.generation += 1
        self._taken.clear()

    def take(self, process_set_id: int) -> int:
        """The number of the optimizer whose first step on this process set it is."""
        number = self._taken[process_set_id]
        self._taken[process_set_id] += 1
        return number


# --- agreeing -----------------------------------------------------------------------------------


class Parameter(NamedTuple):
    """A parameter, as far as ranks have to agree on it."""

    key: Hashable
    name: str
    dtype: str
    shape: Sequence[int]
    group: int


def describe(settings: Settings, parameters: Sequence[Parameter], **more: Any) -> dict[str, Any]:
    """Everything that ranks must have in common, in words that an error can show."""
    names = {parameter.key: parameter.name for parameter in parameters}
    together = settings.shared_buckets([parameter.key for parameter in parameters])
    groups = None if together is None else [[names.get(key, "not trained") for key in group] for group in together]
    compression, granularity, differing = settings.compression, settings.granularity, settings.differing
    return {
        "adacons_hvd": __version__,
        "aggregator": repr(settings.aggregator),
        "schedule": str(settings.schedule),
        "workers": settings.workers,
        "granularity": granularity if isinstance(granularity, str) else "explicit groups",
        # A class, as Horovod's are, or an object whose text would differ between ranks.
        "compression": getattr(compression, "__name__", type(compression).__name__),
        "gradient_predivide_factor": settings.gradient_predivide_factor,
        "groups": groups,
        "sparse_as_dense": settings.sparse_as_dense,
        "bucket_bytes": settings.bucket_bytes,
        "overlap": settings.overlap,
        "grad_scaler": settings.grad_scaler is not None,
        "check_replicas": settings.check_replicas,
        "may_differ": [parameter.name for parameter in parameters if parameter.key in differing],
        **more,
        "parameters": [[p.name, p.dtype, str(tuple(p.shape)), f"group {p.group}"] for p in parameters],
    }


def describe_average(how: str) -> dict[str, Any]:
    """The description of a rank that leaves gradients to the library underneath, in which nothing else counts."""
    return {"adacons_hvd": __version__, "aggregator": f"None ({how})"}


@dataclass(frozen=True)
class Arrival:
    """One rank's message to the others when all lay out their parameters."""

    #: Stands for its settings and parameters.
    digest: int
    #: Its host.
    host: str
    #: By its launcher: which of the host's ranks it is, and how many there are; zeros where no launcher says so.
    place: tuple[int, int] = (0, 0)
    #: The places of parameters whose gradients are sparse.
    sparse: Sequence[int] = ()
    #: The places of parameters that have a gradient.
    active: Sequence[int] = ()
    #: Its aggregator's memory: a digest, and how many steps.
    memory: tuple[int, int] = (0, 0)
    #: It has taken steps without ranks that had joined.
    was_without_some: bool = False
    #: The intervals of the whole gradient whose means of earlier steps it holds.
    held: Sequence[tuple[int, int]] = ()
    #: Its rank in MPI's world, if it can send messages directly; else -1.
    world_rank: int = -1
    #: How many such ways it has made.
    links: int = 0
    #: A number that ranks of one host have in common if they can share memory; -1 if this one cannot.
    memory_device: int = -1
    #: A name for the memory that ranks share, if this is the first of them.
    token: str = ""


def agree(collectives: Collectives, mine: Arrival, description: Mapping[str, Any], name: str) -> list[Arrival]:
    """Everyone's arrival by rank; the same error on all ranks if descriptions differ."""
    sent = json.dumps(asdict(mine)).encode()
    arrivals = [Arrival(**json.loads(data)) for data in collectives.allgather_bytes(sent, f"{name}.plan")]
    if any(arrival.digest != mine.digest for arrival in arrivals):
        agreement.confirm(collectives, description, name)
    return arrivals


# --- choosing -----------------------------------------------------------------------------------


def choose_schedule(
    settings: Settings,
    collectives: Collectives,
    hosts: Sequence[str],
    size: float,
    reference: Tensor,
    name: str,
) -> Choice:
    """The schedule to use, for ``size`` bytes of dense gradient per worker.

    All workers call this together, with every worker's host; ``name`` is a prefix for the names of
    collectives.
    """
    wanted, aggregator = settings.schedule, settings.aggregator
    if aggregator is None:
        return NO_AGGREGATOR
    if isinstance(wanted, str) and wanted in SCHEDULES:
        return Choice(wanted, "asked for")
    workers, per_host = collectives.size, max(Counter(hosts).values())
    bucket = settings.bucket_bytes
    if isinstance(wanted, Network):
        rates = Rates.of(wanted, workers, per_host)
        return choose(rates, size, bucket, aggregator=aggregator, approximate=wanted.approximate)
    measured = workers > 1 and (per_host < workers or size >= MEASURED_FROM)
    if measured:
        rates = measured_rates(collectives, hosts, size, reference, f"{name}.calibration")
    else:
        rates = assumed_rates(collectives, per_host, reference)
    choice = choose(rates, size, bucket, aggregator=aggregator, approximate=wanted == "fast")
    if aggregator.needs or not is_short(choice.expected, workers, size, bucket, reference):
        return choice
    seconds = trial(choice.expected, collectives, size, bucket, reference, f"{name}.trial")
    # What is chosen for little on one host depends on nothing that differs from run to run.
    return choice.after_trial(seconds, may_change=measured)
