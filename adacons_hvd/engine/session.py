"""What ranks agree on once, before their first step together: how parameters are called, and which schedule to take."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from ..aggregators import Aggregator
from ..calibration import measured_rates
from ..collectives import Collectives
from ..costs import Choice, Network, Rates, choose
from ..ops import Tensor
from ..schedules import SCHEDULES

__all__ = ["ONLY_SUMS", "canonical_names", "choose_schedule"]

#: From how many bytes of gradient on one host is measured before a schedule is chosen. For less the
#: default figures are good enough; but not between hosts, whose networks differ a thousandfold.
MEASURED_FROM = 256 << 10

#: What is left once a rank has called ``hvd.join()``.
ONLY_SUMS = Choice("two-pass", "a rank has joined: only sums are left")


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
