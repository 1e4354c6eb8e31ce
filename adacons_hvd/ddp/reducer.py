"""From DDP's buckets to aggregated gradients.

DDP gathers gradients in buckets and, as soon as backward has filled one, hands it to a
communication hook, on all ranks in the same order. Each bucket starts on its way there and then;
with the last one comes the rest of the step, and DDP, which waits for all buckets at the end of
backward, finds the result.

Unlike Horovod, DDP itself makes sure that all ranks have the same parameters, in the same buckets,
in every step. So settings are compared once, in :meth:`Reducer.agree`, and a step costs no message
beyond the schedule's own, but for two things that DDP does not see to:

**What the aggregator remembers** must be equal on all ranks, or each would weigh the gradients in its
own way. It is not where a state was loaded on some ranks only. A rank cannot tell the others so when
that happens, since they may be anywhere and would not listen; but all ranks meet in backward. At the
beginning of the first step after ``attach()`` they compare what they remember (:meth:`Reducer._share_memory`),
so a checkpoint that is loaded before training is set right before it matters. Later, a digest of the
memory goes with that of the parameters, below. Where memories differ, all ranks take what the rank
with the most steps remembers, and warn. Every rank comes to this by the same numbers in the same
place, so none waits alone.

**Parameters** must stay equal. In steps 1, 100, 200, ... (see :func:`adacons_hvd.engine.replicas.is_due`)
one small allgather of digests follows the step's own messages. It is read at the beginning of the next
step, where all ranks find the same: nothing; or that memories differ, and share them; or that
parameters differ, and compare them one by one, take the step to its end, and raise the same error
from ``backward()``. Ranks that have run out of data under ``model.join()`` take part in every message,
because they shadow every step; their parameters are not compared, and they raise the error too.

A rank alone can see that a step is **stray**: taken along gradients that backward has added to, on this
rank, since the last aggregation (:meth:`Reducer.check_step`). It refuses the step and leaves a note in
the group's store. The others find the note while they wait on the host, so on CPUs, for a message of
the aggregation. Where they wait in an accelerator's queue, or for a message of DDP's own (buffers
before a forward pass, the order of buckets in the second), it is the launcher, or the communication
library's own time limit, that ends them.
"""

from __future__ import annotations

import contextlib
import json
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from .. import agreement
from ..aggregators import Aggregator
from ..collectives import host_name
from ..collectives.distributed import TorchDistributed
from ..collectives.hosts import Hosts
from ..engine.history import Place, intervals_of
from ..engine.hosts import choose_hosts, names_of
from ..engine.memory import State, holders, share_memory
from ..engine.replicas import ReplicaError, is_due, stray_step
from ..engine.session import Arrival, Parameter, agree, choose_schedule, describe, describe_average
from ..engine.settings import Settings
from ..ops.torch import arithmetic
from ..report import Report
from ..schedules import SCHEDULES, HostPass, Schedule, Step
from ..torch_amp import WITHOUT_SCALER, other_scaler, unscale
from ..torch_gradients import numbers
from .hooks import raise_after_backward
from .notes import PATIENCE, Notes, Stop
from .parts import DensePart, Part, SparsePart
from .replicas import Replicas

__all__ = ["Reducer", "looked_after"]


class Taken(NamedTuple):
    """A bucket of the step under way: what becomes of it, and who waits for that."""

    part: Part
    future: torch.futures.Future[torch.Tensor]


class Reducer:
    """See the module docstring. One per model; :meth:`agree` comes before the first step."""

    def __init__(
        self,
        model: DistributedDataParallel,
        optimizers: Sequence[torch.optim.Optimizer],
        settings: Settings,
        notes: Notes,
    ) -> None:
        self.settings = settings
        self.state = State()
        # DDP keeps the reducer, where Python's garbage collector does not see it.
        self._model = weakref.ref(model)
        self._optimizers = [weakref.ref(optimizer) for optimizer in optimizers]
        self._notes = notes
        self._names = _trainable(model)
        self._group_of, self._groups = settings.group_parameters(list(map(id, self._names)))
        self._sparse = _sparse(model)
        self._collectives = TorchDistributed(model.process_group, _only_device(self._names))
        differing = settings.differing
        compared = {p: name for p, name in looked_after(model).items() if id(p) not in differing}
        self._replicas = Replicas(self._collectives, notes.ranks, compared)
        self._parts: list[Part] = []
        self._taken: list[Taken] = []
        #: Whether parts, or what is remembered, are new in the step under way. They then are on all ranks.
        self._is_new = False
        #: How many steps have been aggregated: equal on all ranks.
        self._steps = 0
        #: Whether to compare what ranks remember at the beginning of the next step.
        self._share = True
        #: The error to raise at the end of the step under way.
        self._error: Exception | None = None
        #: Whether backward has added to a gradient since the last aggregation.
        self._stray = False
        #: Whether the loss scaler has come to the gradients since then.
        self._scaler_came = False

    def __reduce__(self) -> Any:
        # A copied or unpickled model has a communication hook in its list but not in effect.
        return type(None), ()

    # --- before the first step ------------------------------------------------------------------

    def agree(self) -> None:
        """Make sure that all ranks have the same settings, and choose a schedule together."""
        description = self._description()
        mine = Arrival(agreement.digest(description), host_name(), place=_place())
        arrivals = agree(self._collectives, mine, description, "adacons")
        aggregator = self.settings.aggregator
        if aggregator is None:
            return
        hosts = choose_hosts(arrivals, self._notes.ranks) if self.settings.workers == "host" else None
        if hosts is not None and self._sparse:
            raise NotImplementedError(
                'workers="host" averages no sparse gradients, as those of an embedding with sparse=True; leave that out'
            )
        self._choice = hosts or choose_schedule(
            self.settings,
            self._collectives,
            [arrival.host for arrival in arrivals],
            sum(p.numel() * p.element_size() for p in self._names if p not in self._sparse),
            torch.empty((), device=self._collectives.device),
            "adacons",
        )
        self._schedule: Schedule = (
            SCHEDULES[self._choice.schedule](self._collectives, history=aggregator.history)
            if hosts is None
            else HostPass(Hosts(self._collectives, hosts.hosts), history=aggregator.history)
        )
        names = names_of(self._choice.hosts)
        self._step = Step(self._schedule.collectives, aggregator, self._groups, "adacons", names)

    def _description(self) -> dict[str, Any]:
        if self.settings.aggregator is None:
            return describe_average("DDP's own average")
        parameters = [
            Parameter(id(p), name, str(p.dtype), p.shape, self._group_of[id(p)]) for p, name in self._names.items()
        ]
        kind = arithmetic(self._collectives.device)
        more = {"arithmetic": kind, "compared parameters": self._replicas.names}
        return describe(self.settings, parameters, **more)

    # --- during backward ------------------------------------------------------------------------

    @torch.no_grad()
    def take(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Start a bucket on its way; with the step's last one, do the rest of the step."""
        gradient, parameters = bucket.buffer(), bucket.parameters()
        devices: list[Any] = [] if gradient.device.type == "cpu" else [gradient.device]
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future(devices=devices)
        if not self._taken:
            self._missing = len(self._group_of)
            self._settle()
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
            self.state.history.suspend()
            del self._parts[position:]
        kind = SparsePart if gradient.is_sparse else DensePart
        groups = [self._group_of[id(p)] for p in parameters]
        self._parts.append(kind(f"adacons.{position}", gradient, parameters, groups, self._schedule))
        self._is_new = True
        return self._parts[position]

    def _settle(self) -> None:
        """Before anything of a step is sent: act on what ranks have told each other in the last one."""
        if self._choice.hosts and self._here() is not None:
            self._error = RuntimeError('workers="host" takes gradients of all ranks of a host, so not model.join()')
        found = self._replicas.end()
        if found.parameters_differ:
            try:
                self._replicas.compare(self._here() is not False, self._steps + 1)
            except ReplicaError as error:
                self._error = error
        if found.memories_differ or self._share:
            self._share = False
            self._share_memory()
            self._is_new = True

    def _share_memory(self) -> None:
        """Let all ranks remember the same, which is what the rank with the most steps does."""
        mine = json.dumps([self.state.digest(), self.state.steps]).encode()
        answers = [json.loads(answer) for answer in self._collectives.allgather_bytes(mine, "adacons.memories")]
        reference = torch.empty((), device=self._collectives.device)
        share_memory(self.state, answers, self._collectives, "adacons", reference=reference, ranks=self._notes.ranks)

    def _finish(self) -> None:
        taken, self._taken = self._taken, []
        buckets = [part.bucket for part, _ in taken if part.bucket is not None]
        if not buckets or self._aggregate(buckets):
            self._stray = False
        self._scaler_came = False
        for part, future in taken:
            future.set_result(part.result())
        if is_due(self._steps, self.settings.check_replicas):
            self._replicas.begin(self.state.tensors().values(), self._here() is not False)
        self._steps += 1
        error, self._error = self._error, None
        if error is not None:
            if not _in_backward():
                raise error
            raise_after_backward(error)

    def _aggregate(self, buckets: list[Any]) -> bool:
        """Do the rest of the step; returns whether gradients are aggregated now."""
        aggregator = self.settings.aggregator
        assert aggregator is not None
        reference = buckets[0].reference
        self.state.fit(aggregator, self._groups, self._schedule.collectives.size, reference)
        if self._is_new and aggregator.history:
            self._resume_history(aggregator)
        self._is_new = False
        factor = unscale(self.settings.grad_scaler, reference)
        try:
            # Where backward() is called inside of an autocast, so is this; but here precision is
            # chosen with care.
            with torch.autocast(reference.device.type, enabled=False):
                decision, statistics = self._step.run(buckets, self.state.memory, factor, self._here())
        except FloatingPointError as error:
            # A rank that has run out of data goes on keeping the others company, as they may go on.
            if _in_backward():
                raise_after_backward(error)
            self._forget_parts()
            return False
        self.state.memory = decision.memory
        self.state.history.step_taken()
        report = Report(decision, statistics, self._choice, self.state.history.bytes)
        for optimizer in self._alive():
            optimizer.report = report  # type: ignore[attr-defined]
        return True

    # --- the mean gradients of earlier steps ----------------------------------------------------

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Remember what was saved. This rank may be alone in this."""
        self.state.load_state_dict(state)
        aggregator = self.settings.aggregator
        if self._parts and aggregator is not None and aggregator.history:
            self.state.refill_history(aggregator, self._places(), self._lengths())

    def gather_history(self) -> None:
        """Hold the mean gradients of earlier steps of all ranks, until the next step. All ranks call this together."""
        self.state.history.gather(self._collectives, "adacons")

    def _resume_history(self, aggregator: Aggregator) -> None:
        """Bring what ranks have kept in other buckets into those of the step under way."""
        held = self.state.history.held(self._lengths(), aggregator.history)
        mine = json.dumps([self.state.digest(), self.state.steps, held]).encode()
        answers = [json.loads(answer) for answer in self._collectives.allgather_bytes(mine, "adacons.held")]
        everyone = holders(
            [(digest, steps) for digest, steps, _ in answers], [intervals for _, _, intervals in answers]
        )
        self.state.resume_history(aggregator, self._places(), everyone, self._collectives, "adacons")

    def _lengths(self) -> list[int]:
        return [numbers(p) for p in self._names]

    def _places(self) -> list[Place]:
        """Where in the whole gradient the elements of each bucket lie."""
        intervals = dict(zip(map(id, self._names), intervals_of(self._lengths()), strict=True))
        parts = [(part.bucket, part.parameters) for part in self._parts if isinstance(part, DensePart)]
        return [Place(bucket, [intervals[id(p)] for p in found]) for bucket, found in parts if bucket is not None]

    def _forget_parts(self) -> None:
        self.state.history.suspend()
        self._parts = []

    def _here(self) -> bool | None:
        """Under ``model.join()``, whether this rank still has data; otherwise None."""
        model = self._model()
        if model is None or not model._join_config.enable:
            return None
        # A rank without data hands its zeros to the hook from join() itself, not from backward.
        return _in_backward()

    # --- steps along gradients that are not aggregated ------------------------------------------

    def watch(self) -> None:
        """Begin to notice gradients that are not aggregated, and other ranks that have stopped."""
        self._collectives.interrupt = _calling(weakref.WeakMethod(self._stop_with_others))
        self._collectives.seconds_between_interrupts = PATIENCE
        owned = {p for optimizer in self._alive() for group in optimizer.param_groups for p in group["params"]}
        hook = _calling(weakref.WeakMethod(self._added))
        differing = self.settings.differing
        self._watched = [p for p in self._names if p in owned and id(p) not in differing]
        for parameter in self._watched:
            parameter.register_post_accumulate_grad_hook(hook)

    def _alive(self) -> list[torch.optim.Optimizer]:
        return [optimizer for ref in self._optimizers if (optimizer := ref()) is not None]

    def _added(self, parameter: torch.Tensor) -> None:
        """Backward has added to this parameter's gradient. The end of a synchronised backward makes up for it."""
        self._stray = True

    def check_step(self) -> None:
        """Refuse a step of the optimizer that must not be taken, and tell the other ranks."""
        if all(p.grad is None for p in self._watched):
            return  # nothing that backward has left
        scaler = self.settings.grad_scaler
        if scaler is not None and scaler.is_enabled() and not self._scaler_came:
            _raise_for(self._notes.stop(False, WITHOUT_SCALER))
        if self._stray:
            _raise_for(self._notes.stop(True, _NOT_AGGREGATED))

    def unscaling(self, scaler: Any) -> None:
        """Refuse a loss scaler, about to divide gradients, that was not known when they were aggregated."""
        given = self.settings.grad_scaler
        if scaler is not given:
            _raise_for(self._notes.stop(False, other_scaler(given)))
        self._scaler_came = True

    def _stop_with_others(self) -> None:
        """Raise the error of ranks that have stopped, for which this one waits in vain."""
        stop = None
        with contextlib.suppress(RuntimeError):  # the store is gone if its rank is; the message then fails, too
            stop = self._notes.stopped()
        if stop is not None:
            self._taken = []
            self._forget_parts()
            _raise_for(stop)


_NOT_AGGREGATED = (
    "the last backward() failed, ran under no_sync(), or went through the module inside of DistributedDataParallel, "
    "and none that aggregates followed before the optimizer's step"
)


def _place() -> tuple[int, int]:
    """Which of its host's processes this is, and how many there are, as torchrun tells it; zeros if nobody does."""
    rank, size = (os.environ.get(name, "") for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    return (int(rank), int(size)) if rank.isdigit() and size.isdigit() else (0, 0)


def _raise_for(stop: Stop) -> NoReturn:
    if stop.stray:
        raise stray_step(stop.ranks, stop.why) from None
    raise agreement.DisagreementError(f"{agreement.by_ranks(stop.ranks)} cannot go on: {stop.why}") from None


def _calling(method: weakref.WeakMethod[Callable[..., None]]) -> Callable[..., None]:
    """A function that calls a method and does not keep its object alive."""

    def call(*args: Any) -> None:
        function = method()
        if function is not None:
            function(*args)

    return call


def looked_after(model: DistributedDataParallel) -> dict[torch.Tensor, str]:
    """The parameters that DDP has made equal on all ranks, and their names."""
    return {p: name for name, p in model.module.named_parameters() if name not in model.parameters_to_ignore}


def _trainable(model: DistributedDataParallel) -> dict[torch.Tensor, str]:
    """The parameters that DDP takes care of, and their names."""
    found = {p: name for p, name in looked_after(model).items() if p.requires_grad}
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
