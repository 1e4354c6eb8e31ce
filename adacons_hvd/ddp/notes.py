"""Notes that ranks leave for each other in the process group's store, outside of collectives.

A collective needs every rank at the same point; a rank that is elsewhere makes the others wait. A note needs nobody.
Two things are told by notes:

* that a rank has come to ``attach()``, or that it failed there, so that the others need not wait for ever;
* that a rank has stopped in its optimizer's step, while the others wait for it in a collective.

In both, the first rank that knows enough decides for all, so all raise the same error.
"""

from __future__ import annotations

import contextlib
import json
import time
import weakref
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from ..agreement import DisagreementError, by_ranks

__all__ = ["PATIENCE", "Notes", "Stop"]

#: For how many seconds a rank that stops waits for others that stop for the same reason, and after how many of waiting
#: for a message a rank looks whether another has stopped.
PATIENCE = 2.0

#: How many times attach() was called for a group. The same on all of its ranks, since all call it together.
_calls: weakref.WeakKeyDictionary[dist.ProcessGroup, int] = weakref.WeakKeyDictionary()


class Stop(NamedTuple):
    """These ranks have stopped, and this is why."""

    ranks: list[int]
    stray: bool
    why: str


class Notes:
    """The notes of one ``attach()``. Ranks are named as in the whole job, even if the model has a group of its own.

    Args:
        group: the process group of the ranks.
        call: how errors name the function that all ranks have to call.
    """

    def __init__(self, group: dist.ProcessGroup, call: str) -> None:
        self.ranks: list[int] = dist.get_process_group_ranks(group)
        self._group = group
        self._call = call
        self._me = self.ranks[dist.get_rank(group)]
        number = _calls.get(group, 0)
        _calls[group] = number + 1
        self._store = _store_of(group, f"adacons_hvd/{group.group_name}/{number}")
        #: How many times this rank has raised an error for ranks that have stopped.
        self._stops = 0

    # --- coming to attach() ---------------------------------------------------------------------

    def meet(self, timeout: float) -> None:
        """Wait until every rank has come, or raise an error on all that have."""
        if self._store is None:
            self._meet_without_store(timeout)
            return
        verdict = self._gather("attach", "", timeout)
        if "failed" in verdict:
            raise DisagreementError(f"attach() failed on {by_ranks([verdict['failed']])}: {verdict['why']}")
        if verdict["missing"]:
            raise DisagreementError(
                f"{by_ranks(verdict['missing'])} did not call {self._call} within {verdict['waited']:g} "
                "seconds of another; every rank of the model's process group has to, and timeout= says how long the "
                "others wait"
            )

    def fail(self, error: Exception) -> None:
        """Tell the others that this rank will not come, because of an error that it is about to raise."""
        if self._store is not None:
            self._decide("attach", {"failed": self._me, "why": f"{type(error).__name__}: {error}"})

    def _meet_without_store(self, timeout: float) -> None:
        """MPI's process groups have no store, but operations that can be asked whether they are done."""
        work = dist.all_reduce(torch.ones(1), group=self._group, async_op=True)
        deadline = time.monotonic() + timeout
        while not work.is_completed():
            if time.monotonic() > deadline:
                raise DisagreementError(
                    f"some rank did not call {self._call} within {timeout:g} seconds of another, and "
                    f"{dist.get_backend(self._group)} cannot tell which; every rank of the model's process group has to"
                )
            time.sleep(0.001)
        work.wait()

    def clear(self) -> None:
        """Take down the notes about attach(), once all ranks have read them.

        A store may outlive the process group, and a later group of the same name must not find them.
        """
        if self._store is None:
            return
        with contextlib.suppress(NotImplementedError, RuntimeError):  # some stores cannot delete
            self._store.delete_key(f"attach/{self._me}")
            if self._me == self.ranks[0]:
                for name in ("count", "decided", "verdict"):
                    self._store.delete_key(f"attach/{name}")

    # --- stopping in a step ---------------------------------------------------------------------

    def stop(self, stray: bool, why: str) -> Stop:
        """Tell the others that this rank stops. Waits a moment to learn which of them stop with it."""
        if self._store is None:
            return Stop([self._me], stray, why)
        verdict = self._gather(self._stop_topic, json.dumps([stray, why]), PATIENCE)
        self._stops += 1
        return Stop(sorted({self._me, *self._came(verdict)}), stray, why)

    def stopped(self) -> Stop | None:
        """The note of a rank that has stopped, if one has. Told once."""
        topic = self._stop_topic
        if self._store is None or not self._store.check([f"{topic}/verdict"]):
            return None
        ranks = self._came(json.loads(self._store.get(f"{topic}/verdict")))
        self._stops += 1
        return Stop(ranks, *json.loads(self._store.get(f"{topic}/{ranks[0]}")))

    @property
    def _stop_topic(self) -> str:
        # After an error that all ranks have raised, training may go on.
        return f"stop{self._stops}"

    def _came(self, verdict: Mapping[str, Any]) -> list[int]:
        return [rank for rank in self.ranks if rank not in verdict["missing"]]

    # --- deciding together ----------------------------------------------------------------------

    def _gather(self, topic: str, note: str, patience: float) -> dict[str, Any]:
        """Leave a note and wait for everyone's; the verdict says whose are missing."""
        store = self._store
        assert store is not None
        store.set(f"{topic}/{self._me}", note)
        if store.add(f"{topic}/count", 1) == len(self.ranks):
            return self._decide(topic, {"missing": []})
        try:
            store.wait([f"{topic}/verdict"], timedelta(seconds=patience))
        except RuntimeError:
            missing = [rank for rank in self.ranks if not store.check([f"{topic}/{rank}"])]
            return self._decide(topic, {"missing": missing, "waited": patience})
        verdict: dict[str, Any] = json.loads(store.get(f"{topic}/verdict"))
        return verdict

    def _decide(self, topic: str, verdict: dict[str, Any]) -> dict[str, Any]:
        """Give a verdict; the first one given is everybody's."""
        store = self._store
        assert store is not None
        if store.add(f"{topic}/decided", 1) == 1:
            store.set(f"{topic}/verdict", json.dumps(verdict))
            return verdict
        first: dict[str, Any] = json.loads(store.get(f"{topic}/verdict"))
        return first


def _store_of(group: dist.ProcessGroup, prefix: str) -> dist.Store | None:
    if dist.get_backend(group) == "mpi":
        return None
    return dist.PrefixStore(prefix, _get_default_store())
