"""What the bindings have in common: names, groups and the choice of a schedule, and what an optimizer remembers.

No framework and no communication library is imported here.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .aggregators import Aggregator, Memory, pack_memory, unpack_memory
from .calibration import measured_rates
from .collectives import Collectives
from .costs import Choice, Network, Rates, choose
from .ops import Tensor, ops_for
from .schedules import SCHEDULES

__all__ = [
    "BUCKET_BYTES",
    "ONLY_SUMS",
    "STATE_KEY",
    "State",
    "choose_schedule",
    "group_parameters",
    "unscale",
]

#: Where an optimizer's ``state_dict`` keeps the aggregator's state.
STATE_KEY = "adacons"

#: How much gradient travels together unless the user says otherwise: large enough to fill a fast
#: network, small enough to begin while backward still runs.
BUCKET_BYTES = 32 << 20

#: From how many bytes of gradient on one host is measured before a schedule is chosen. For less the
#: default figures are good enough; but not between hosts, whose networks differ a thousandfold.
MEASURED_FROM = 256 << 10

#: What is left once a rank has called ``hvd.join()``.
ONLY_SUMS = Choice("two-pass", "a rank has joined: only sums are left")

Parameter = TypeVar("Parameter", bound=Hashable)


def group_parameters(
    granularity: str | Sequence[Sequence[Parameter]], parameters: Sequence[Parameter]
) -> tuple[dict[Parameter, int], int]:
    """The group of every parameter, and the number of groups.

    >>> group_parameters("layer", ["weight", "bias"])
    ({'weight': 0, 'bias': 1}, 2)
    >>> group_parameters([["bias"]], ["weight", "bias"])
    ({'weight': 1, 'bias': 0}, 2)
    """
    if granularity == "model":
        return dict.fromkeys(parameters, 0), 1
    if granularity == "layer":
        return {p: i for i, p in enumerate(parameters)}, max(len(parameters), 1)
    assert not isinstance(granularity, str)
    group_of = {p: i for i, group in enumerate(granularity) for p in group}
    rest = len(granularity)
    has_rest = any(p not in group_of for p in parameters)
    return {p: group_of.get(p, rest) for p in parameters}, rest + has_rest


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


def choose_schedule(
    wanted: str | Network,
    aggregator: Aggregator,
    collectives: Collectives,
    hosts: Sequence[str],
    size: float,
    bucket_bytes: float,
    reference: Tensor,
    name: str,
) -> Choice:
    """The schedule to use, for ``size`` bytes of dense gradient per worker.

    All workers call this together, with every worker's host; ``name`` is a prefix for the names of
    collectives.
    """
    if isinstance(wanted, str) and wanted in SCHEDULES:
        return Choice(wanted, "asked for")
    workers, per_host = collectives.size, max(Counter(hosts).values())
    approximate = wanted == "fast"
    if isinstance(wanted, Network):
        rates, approximate = Rates.of(wanted, workers, per_host), wanted.approximate
    elif workers == 1 or (per_host == workers and size < MEASURED_FROM):
        rates = Rates.of(Network(), workers, per_host)
    else:
        rates = measured_rates(collectives, hosts, size, reference, f"{name}.calibration")
    return choose(rates, size, bucket_bytes, gramian=aggregator.needs_gramian, approximate=approximate)


def unscale(grad_scaler: Any, reference: Tensor) -> Tensor | float:
    """What gradients have to be multiplied by to undo the loss scale in force."""
    if grad_scaler is None or not grad_scaler.is_enabled():
        return 1.0
    # Scaling a one gives the scale without asking the device for its value.
    return 1 / grad_scaler.scale(ops_for(reference).zeros((), reference) + 1)


# --- what an optimizer remembers ----------------------------------------------------------------


@dataclass
class State:
    """An aggregator's memory on behalf of one optimizer, and the number of workers it is for."""

    memory: Memory = field(default_factory=dict)
    workers: int = 0

    def fit(self, aggregator: Aggregator, groups: int, workers: int, reference: Tensor) -> None:
        """Make a loaded memory fit the groups and workers there are, on ``reference``'s device."""
        ops = ops_for(reference)
        known = ops.shape(self.memory["steps"])[0] if self.memory else groups
        if known != groups:
            warnings.warn(
                f"the aggregator's state is for {known} groups of parameters and there are {groups} now, "
                "so it starts afresh",
                stacklevel=2,
            )
            self.memory = {}
        if self.memory and self.workers != workers:
            self.memory = aggregator.resized(self.memory, workers)
        self.memory = {name: ops.beside(value, reference) for name, value in self.memory.items()}
        self.workers = workers

    def state_dict(self) -> dict[str, Any]:
        return pack_memory(self.memory, self.workers)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.memory, self.workers = unpack_memory(state)
