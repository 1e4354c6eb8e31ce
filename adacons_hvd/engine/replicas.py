"""Noticing a rank that trains alone: the worst fault there is, because nothing else shows it.

Two guards, in every binding and on by default:

* a step along gradients that were never aggregated is a :class:`StrayStepError`;
* every :data:`CHECK_REPLICAS` steps ranks compare a digest of their parameters, a single number that travels with what
  they tell each other anyway. Where digests differ, parameters are compared one by one, and all ranks raise the same
  :class:`ReplicaError`.

A binding counts its steps from the last time that all ranks laid out their parameters together, so that all ranks
agree on which steps are compared.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from ..agreement import DisagreementError, by_ranks

__all__ = [
    "CHECK_REPLICAS",
    "ReplicaError",
    "StrayStepError",
    "compare_replicas",
    "is_due",
    "raise_stray_step",
    "stray_step",
]

#: How many seconds a rank that is about to raise a ``StrayStepError`` waits for the others to hear of it.
STRAY_SECONDS = 60.0

#: Every how many steps replicas are compared, unless the user says otherwise.
CHECK_REPLICAS = 100


class StrayStepError(DisagreementError):
    """A rank took an optimizer's step along gradients that were never aggregated. Raised on all ranks alike."""


class ReplicaError(DisagreementError):
    """Ranks hold different parameters, so some of them has trained alone. Raised on all ranks alike."""


def is_due(step: int, interval: int) -> bool:
    """Whether replicas are compared in this step, counted from 0 since ranks last agreed on their parameters.

    Never in the very first, since scripts may make parameters equal only after it; but in the second, where a script
    that never does so is found out.

    >>> [step for step in range(300) if is_due(step, 100)]
    [1, 100, 200]
    >>> any(is_due(step, 0) for step in range(300))
    False
    """
    return interval > 0 and step > 0 and (step == 1 or step % interval == 0)


def compare_replicas(digests: Mapping[int, Sequence[int]], names: Sequence[str], step: int) -> None:
    """Raise the error that says where replicas differ.

    ``digests`` has the ranks that took part, and for each of them one digest a parameter, in the order of ``names``.
    ``step`` is the one before which they were compared, counted from 1.

    >>> compare_replicas({0: [7, 8], 1: [7, 8], 2: [7, 9]}, ["weight", "bias"], 5)
    Traceback (most recent call last):
    adacons_hvd.engine.replicas.ReplicaError: the replicas have drifted apart: before step 5 ...
    """
    # The values that most ranks hold are taken for right; of equally many, those of the lowest rank.
    ranks = sorted(digests)
    rows = [tuple(digests[rank]) for rank in ranks]
    most = max(rows, key=lambda row: (rows.count(row), -rows.index(row)))
    others = [rank for rank, row in zip(ranks, rows, strict=True) if row != most]
    if not others:
        return
    differing = [i for i, name in enumerate(names) if any(row[i] != most[i] for row in rows)]
    shown = ", ".join(names[i] for i in differing[:3])
    more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
    raise ReplicaError(
        f"the replicas have drifted apart: before step {step} {by_ranks(others)} held other values than "
        f"{by_ranks([rank for rank in ranks if rank not in others])} in {len(differing)} of {len(names)} parameters: "
        f"{shown}{more}. Either ranks began with different values (broadcast them from one rank first), or one of "
        "them has changed parameters on its own: by a step that did not go through the distributed optimizer, or "
        "outside of any step. Parameters that are meant to differ can be left out with may_differ=; "
        "check_replicas=0 switches this check off."
    )


def stray_step(ranks: Sequence[int], how: str) -> StrayStepError:
    """The error for a step along gradients that were never aggregated, which these ranks took or tried to take."""
    error: StrayStepError = StrayStepError(
        f"{by_ranks(ranks)} took a step along gradients that were never aggregated: {how}. "
        "Every step of these parameters must be a step() of the distributed optimizer."
    )
    return error


def raise_stray_step(tell: Callable[[], NoReturn], rank: int, how: str) -> NoReturn:
    """Raise the error of a stray step on all ranks: ``tell`` tells the others and raises it.

    If the others take no more steps, this rank waits for :data:`STRAY_SECONDS` and then raises the error alone.
    """
    errors: list[Exception] = []

    def try_to_tell() -> None:
        try:
            tell()
        except Exception as error:
            errors.append(error)

    # In a thread of its own, because Horovod has no limit on how long it waits.
    thread = threading.Thread(target=try_to_tell, daemon=True)
    thread.start()
    thread.join(STRAY_SECONDS)
    # Another error, one of Horovod's own, means that it is shutting down, so the others have ended.
    if errors and isinstance(errors[0], DisagreementError):
        raise errors[0]
    raise stray_step([rank], how)
