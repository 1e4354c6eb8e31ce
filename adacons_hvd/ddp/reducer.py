"""From DDP's buckets to aggregated gradients.

DDP gathers gradients in buckets and, as soon as backward has filled one, hands it to a
communication hook, on all ranks in the same order. Each bucket starts on its way there and then;
with the last one comes the rest of the step, and DDP, which waits for all buckets at the end of
backward, finds the result.

Unlike Horovod, DDP itself makes sure that all ranks have the same parameters, in the same buckets,
in every step. So settings are compared once, in :meth:`Reducer.agree`, and a step costs no message
beyond the schedule's own.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from .. import __version__, agreement
from ..aggregators import Aggregator
from ..binding import BUCKET_BYTES, State, choose_schedule, group_parameters, unscale
from ..collectives import host_name
from ..collectives.distributed import TorchDistributed
from ..costs import Network
from ..report import Report
from ..schedules import SCHEDULES, Step
from .parts import DensePart, Part, SparsePart

__all__ = ["Reducer", "Settings"]


@dataclass(frozen=True)
class Settings:
    """What the user asked for; see ``attach``."""

    aggregator: Aggregator | None
    schedule: str | Network
    granularity: str | Sequence[Sequence[torch.Tensor]]
    grad_scaler: Any


class Taken(NamedTuple):
    """A bucket of the step under way: what becomes of it, and who waits for that."""

    part: Part
    future: torch.futures.Future[torch.Tensor]


class Reducer:
    """See the module docstring. One per model; calls :meth:`agree` when made."""

    def __init__(self, model: DistributedDataParallel, optimizer: torch.optim.Optimizer, settings: Settings) -> None:
        self.settings = settings
        self.state = State()
        # DDP keeps the reducer, where Python's garbage collector does not see it.
        self._model = weakref.ref(model)
        self._optimizer = weakref.ref(optimizer)
        names = _trainable(model)
        self._group_of, self._groups = group_parameters(settings.granularity, list(names))
        device = _only_device(names)
        self._collectives = TorchDistributed(model.process_group, device)
        hosts = self.agree(self._description(names))
        self._parts: list[Part] = []
        self._taken: list[Taken] = []
        if settings.aggregator is None:
            return
        sparse = _sparse(model)
        size = sum(p.numel() * p.element_size() for p in names if p not in sparse)
        self._choice = choose_schedule(
            settings.schedule,
            settings.aggregator,
            self._collectives,
            hosts,
            size,
            BUCKET_BYTES,
            torch.empty((), device=device),
            "adacons",
        )
        self._schedule = SCHEDULES[self._choice.schedule](self._collectives)
        self._step = Step(self._collectives, settings.aggregator, self._groups, "adacons")

    def __reduce__(self) -> Any:
        # A copied or unpickled model has a communication hook in its list but not in effect.
        return type(None), ()

    # --- before the first step ------------------------------------------------------------------

    def agree(self, description: dict[str, Any]) -> list[str]:
        """Make sure that all ranks have the same settings; returns every rank's host."""
        digest = agreement.digest(description)
        mine = json.dumps([digest, host_name()]).encode()
        answers = [json.loads(answer) for answer in self._collectives.allgather_bytes(mine, "adacons.plan")]
        if any(theirs != digest for theirs, _ in answers):
            agreement.confirm(self._collectives, description, "adacons")
        return [host for _, host in answers]

    def _description(self, names: dict[torch.Tensor, str]) -> dict[str, Any]:
        """What all ranks must have in common, in words that an error can show."""
        settings = self.settings
        aggregator, granularity = settings.aggregator, settings.granularity
        return {
            "adacons_hvd": __version__,
            "aggregator": "None (DDP's own average)" if aggregator is None else repr(aggregator),
            "schedule": str(settings.schedule),
            "granularity": granularity if isinstance(granularity, str) else "explicit groups",
            "grad_scaler": settings.grad_scaler is not None,
            "parameters": [
                [name, str(p.dtype), str(tuple(p.shape)), f"group {self._group_of[p]}"] for p, name in names.items()
            ],
        }

    # --- during backward ------------------------------------------------------------------------

    @torch.no_grad()
    def take(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Start a bucket on its way; with the step's last one, do the rest of the step."""
        gradient, parameters = bucket.buffer(), bucket.parameters()
        devices: list[Any] = [] if gradient.device.type == "cpu" else [gradient.device]
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future(devices=devices)
        if not self._taken:
            self._missing = len(self._group_of)
        part = self._part(gradient, parameters)
        part.load(gradient)
        self._taken.append(Taken(part, future))
        if part.bucket is not None and self._schedule.overlaps and self._step.may_begin_early:
            part.bucket.begin()
        self._missing -= len(parameters)
        # In the first step of a static graph, bucket.is_last() is false for all of them.
        if self._missing == 0:
            self._finish()
        return future

    def _part(self, gradient: torch.Tensor, parameters: list[torch.Tensor]) -> Part:
        """The part for the bucket that comes next; the one of the last step, if it still fits.

        DDP makes its buckets anew after the first step, when it knows the order in which backward
        fills them.
        """
        position = len(self._taken)
        if position < len(self._parts):
            if self._parts[position].fits(gradient, parameters):
                return self._parts[position]
            del self._parts[position:]
        kind = SparsePart if gradient.is_sparse else DensePart
        groups = [self._group_of[p] for p in parameters]
        self._parts.append(kind(f"adacons.{position}", gradient, parameters, groups, self._schedule))
        return self._parts[position]

    def _finish(self) -> None:
        taken, self._taken = self._taken, []
        buckets = [part.bucket for part, _ in taken if part.bucket is not None]
        if buckets:
            self._aggregate(buckets)
        for part, future in taken:
            future.set_result(part.result())

    def _aggregate(self, buckets: list[Any]) -> None:
        aggregator = self.settings.aggregator
        assert aggregator is not None
        reference = buckets[0].reference
        self.state.fit(aggregator, self._groups, self._collectives.size, reference)
        factor = unscale(self.settings.grad_scaler, reference)
        try:
            # Where backward() is called inside of an autocast, so is this; but here precision is
            # chosen with care.
            with torch.autocast(reference.device.type, enabled=False):
                decision, statistics = self._step.run(buckets, self.state.memory, factor, self._here())
        except FloatingPointError as error:
            # A rank that has run out of data goes on keeping the others company, as they may go on.
            if _in_backward():
                _raise_after_backward(error)
            self._parts = []
            return
        self.state.memory = decision.memory
        optimizer: Any = self._optimizer()
        if optimizer is not None:
            optimizer.report = Report(decision, statistics, self._choice)

    def _here(self) -> bool | None:
        """Under ``model.join()``, whether this rank still has data; otherwise None."""
        model = self._model()
        if model is None or not model._join_config.enable:
            return None
        # A rank without data hands its zeros to the hook from join() itself, not from backward.
        return _in_backward()


def _trainable(model: DistributedDataParallel) -> dict[torch.Tensor, str]:
    """The parameters that DDP takes care of, and their names."""
    ignored = model.parameters_to_ignore
    found = {p: name for name, p in model.module.named_parameters() if p.requires_grad and name not in ignored}
    count = model._get_ddp_logging_data()["num_parameter_tensors"]
    if count != len(found):
        raise ValueError(
            f"DistributedDataParallel looks after {count} parameters, but {len(found)} require a "
            "gradient now. It does not notice when that changes, so freeze parameters before wrapping"
        )
    return found


def _only_device(parameters: dict[torch.Tensor, str]) -> torch.device:
    devices = {p.device for p in parameters}
    if len(devices) > 1:
        raise ValueError(
            f"the model's parameters are on several devices ({', '.join(sorted(map(str, devices)))}); "
            "aggregation needs those of one process on one"
        )
    return devices.pop()


def _sparse(model: torch.nn.Module) -> set[torch.Tensor]:
    """Parameters for which DDP expects sparse gradients; it decides by the same classes."""
    kinds = (torch.nn.Embedding, torch.nn.EmbeddingBag)
    return {module.weight for module in model.modules() if isinstance(module, kinds) and module.sparse}


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


def _raise_after_backward(error: Exception) -> None:
    """Raise from ``backward()``, but only when DDP has finished.

    Raised in a communication hook, an error leaves DDP in the middle of a step, and its next
    backward fails with an internal assertion. A callback runs when backward is over, in the order
    of registration, and DDP registers its own after this one; hence a callback that registers
    another.
    """
    engine: Any = torch.autograd.Variable._execution_engine

    def last() -> None:
        raise error

    engine.queue_callback(lambda: engine.queue_callback(last))
