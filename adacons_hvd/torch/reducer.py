"""From gradients on parameters to aggregated gradients on parameters, over Horovod.

The reducer watches an optimizer's parameters. Backward fills packings; each starts on its way as
soon as it is full; :meth:`Reducer.synchronize` does the rest. What could make ranks wait for each
other in vain is settled at the start of every ``synchronize`` by one small sum (:class:`Message`):

* whether some rank's settings or parameters differ - then all raise the same error;
* whether some rank has to lay out its packings anew (the first step; parameters frozen, unfrozen
  or added since) - then all do;
* whether on some rank a gradient changed after it had left (several backward passes, reentrant
  checkpointing) - then all send again;
* whether some rank has left with ``hvd.join()`` - then only sums are available, and all use the
  schedule that needs nothing else;
* whether some rank is about to step along gradients that were never aggregated, or holds other
  parameters than the rest - then all raise the same error (see :mod:`adacons_hvd.engine.replicas`).

Whether a rank has joined must be known before anything but a sum leaves during backward, because that
would crash the rank which has left. So one more small sum, of who is here, starts with backward,
and packings that are full wait for its result. It takes no time from backward.

Packings that were not full by then leave together with the flags, whose round trip so costs nothing.
Those of a schedule that sends nothing during backward (``gather``) do, too; and without asking where
its first collective is a sum, which may leave whoever is here.
"""

from __future__ import annotations

import secrets
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import horovod.torch as hvd
import torch
from horovod.torch.mpi_ops import HorovodInternalError, mpi_enabled, mpi_lib

from .. import agreement
from ..collectives import Pending, host_name, ready
from ..collectives.direct import MOST_RANKS, Link, Meeting, links_made, pause, world_rank
from ..collectives.horovod_torch import HorovodTorch
from ..collectives.hosts import Hosts
from ..collectives.shared import memory_device
from ..costs import Choice
from ..engine.history import Place, intervals_of
from ..engine.hosts import choose_hosts, names_of
from ..engine.memory import State, holders, share_memory
from ..engine.protocol import Message, Recall, Verdict, decide
from ..engine.replicas import ReplicaError, compare_replicas, is_due, stray_step
from ..engine.session import ONLY_SUMS, Arrival, Parameter, agree, choose_schedule, describe
from ..engine.settings import Settings
from ..ops.torch import arithmetic
from ..ops.torch import digest as digest_of
from ..report import Report
from ..schedules import SCHEDULES, HostPass, Schedule, Step
from ..torch_amp import unscale
from ..torch_host import OnItsWay
from .numbering import numbering
from .packing import DensePacking, Packing, Slot, pack

__all__ = ["Reducer", "end_what_is_carried", "exchange", "reducer_of"]


class Reducer:
    """See the module docstring. One per optimizer."""

    #: Packings that could leave once it is known that all ranks are here.
    _full: list[Packing]
    #: The count of ranks under way, and whether it came to all with the same layout.
    _rank_count: Pending | None
    #: Where flags go the direct way.
    _flags_meeting: Meeting | None
    _unanimous: bool | None
    #: Whether packings may leave during backward, and whether that takes a count of ranks.
    _overlaps: bool
    _counts_ranks: bool
    #: Whether packings leave together with the flags, at once or if all ranks are known to be here.
    _begins_with_flags: bool
    _begins_if_all_here: bool
    #: While some rank is away: the packings for when none is, by which it will begin once it is back.
    _packings_for_all: list[Packing]
    #: Whether to lay out anew though the parameters have not changed.
    _stale: bool
    #: How many steps have been taken since all ranks laid out together, and so the same number on all.
    _age: int
    #: The digest of the parameters as they were in the step before, if replicas are to be compared.
    _taken_digest: OnItsWay | None

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        names: Mapping[torch.Tensor, str],
        backward_passes_per_step: int,
        settings: Settings,
    ) -> None:
        assert settings.aggregator is not None
        self.settings = settings
        self._aggregator = settings.aggregator
        self.passes = backward_passes_per_step
        self.state = State()
        self.report: Report | None = None
        #: Whether backward has run since the last synchronize.
        self.pending = False
        self._optimizer = weakref.ref(optimizer)
        self._names = dict(names)
        self._start()
        self._hooks: dict[torch.Tensor, Any] = {}
        self._forget_layout()
        self._watch()
        _reducers.add(self)

    def _start(self) -> None:
        """Get to know the workers there are."""
        self._collectives = HorovodTorch(self.settings.process_set)
        self._generation = numbering.generation
        #: Taken in the first step.
        self._number: int | None = None

    def _keep_up(self) -> None:
        """Start again if Horovod has been initialised anew: an elastic job's workers have changed."""
        if self._generation != numbering.generation:
            self.reset()
            self._start()

    # --- during backward ------------------------------------------------------------------------

    def _watch(self) -> None:
        """Put a hook on every parameter that can have a gradient and has none yet."""
        for parameter in self._parameters():
            if parameter.requires_grad and parameter not in self._hooks:
                hook = torch.compiler.disable(_calling(weakref.WeakMethod(self._added)))
                self._hooks[parameter] = parameter.register_post_accumulate_grad_hook(hook)

    def _added(self, parameter: torch.Tensor) -> None:
        """Backward has added to this parameter's gradient."""
        if not self.pending:
            self._keep_up()
            self.pending = True
            self._current = self._layout_is_current()
            self._count_ranks()
        slot = self._slots.get(parameter)
        if slot is None or slot.packing is None:
            return
        slot.additions += 1
        if not (self._current and self._overlaps):
            return
        if slot.additions == slot.expected:
            slot.packing.waiting -= 1
            if slot.packing.waiting == 0 and not slot.packing.bucket.begun:
                self._full.append(slot.packing)
        if self._full and self._all_are_here():
            self._send(self._full)
            self._full.clear()

    def _count_ranks(self) -> None:
        """Start a count of the ranks that take this step, unless it makes no difference.

        All ranks that have a layout ask, or all do not: in backward, or else in synchronize.
        """
        if self._counts_ranks and self._rank_count is None:
            counts = torch.tensor([1, self._joined], dtype=torch.int64)
            self._unanimous = None
            self._rank_count = self._collectives.allreduce(counts, f"{self.name}.here", out=counts)

    def _all_are_here(self, wait: bool = False) -> bool:
        """Whether all who take this step have this rank's layout; False while that is not known."""
        if self._rank_count is not None and self._unanimous is None and (wait or self._rank_count.done()):
            here, apart = self._rank_count.wait().tolist()
            self._unanimous = here == (apart if self._joined else self._collectives.size - apart)
        return bool(self._unanimous) or not self._counts_ranks

    # --- before the optimizer's step ------------------------------------------------------------

    # Where a user's step or training loop is compiled, nothing of this may be: it depends on what other ranks do.
    @torch.compiler.disable
    @torch.no_grad()
    def synchronize(self, factor: torch.Tensor | float = 1.0, loss: float | None = None) -> float | None:
        """Replace every gradient by the aggregated one; returns the mean of the losses that ranks give.

        ``factor`` is what gradients have to be multiplied by to be true gradients, beside what the
        loss scaler tells.
        """
        mean_loss = self._settle(loss)
        for packing in self._packings:
            if not packing.bucket.begun:
                packing.load()
        if self._packings:
            buckets = [packing.bucket for packing in self._packings]
            factor = factor * unscale(self.settings.grad_scaler, buckets[0].reference)
            # step() may be called inside of an autocast, but here precision is chosen with care.
            try:
                with torch.autocast(buckets[0].reference.device.type, enabled=False):
                    decision, statistics = self._step.run(buckets, self.state.memory, factor)
            except FloatingPointError:
                # All ranks raise it, in the middle of a step, and may go on with the next one.
                self.reset()
                raise
            self.state.memory = decision.memory
            self.state.history.step_taken()
            self.report = Report(decision, statistics, self._choice, self.state.history.bytes)
            for packing in self._packings:
                packing.deliver()
                packing.expect(self.passes)
        if self._collectives.direct is not None:
            self._collectives.direct.end_step()
        self.pending = False
        return mean_loss

    @torch.compiler.disable
    @torch.no_grad()
    def stray(self, how: str) -> NoReturn:
        """Tell the other ranks of a step along gradients that were never aggregated, and raise the error on all."""
        self._settle(stray=how)
        raise AssertionError("_settle() raises an error for a stray step")

    def trains(self, parameter: torch.Tensor) -> bool:
        """Whether this reducer looks after the parameter."""
        return parameter in self._hooks

    def _settle(self, loss: float | None = None, stray: str = "") -> float | None:
        """Exchange flags, and do what they ask for until all ranks can take the same step."""
        self._keep_up()
        if self._number is None:
            self._number = numbering.take(self.settings.process_set.process_set_id)
        self._full.clear()
        self._count_ranks()
        all_are_here = self._all_are_here(wait=True)
        self._rank_count = None
        current = self._layout_is_current()
        if current and (self._begins_with_flags or (self._begins_if_all_here and all_are_here)):
            self._send(self._packings)
        slots = list(self._slots.values()) if current else self._draft()
        digest = self._digest if current else agreement.digest(self._description(slots))
        mine = Message(
            new_layout=not current,
            joined_layout=self._joined,
            begun=any(packing.bucket.begun for packing in self._packings),
            changed=any(packing.bucket.begun and packing.outdated() for packing in self._packings),
            stray=bool(stray),
            digest=digest,
            # 0 stands for no digest.
            replicas=int(self._taken_digest.read()) or 1 if current and self._taken_digest is not None else 0,
            loss=loss,
        )
        ruling = decide(mine, self._exchange(mine))
        if ruling.verdict is Verdict.DISAGREE:
            try:
                agreement.confirm(self._collectives, self._description(slots), self.name)
            except agreement.DisagreementError:
                self.reset()
                raise
        if ruling.recall is not Recall.NOTHING:
            self._recall(self._packings_for_all if ruling.recall is Recall.FOR_ALL else self._packings)
        if ruling.verdict is Verdict.STRAY:
            joined = len(ruling.present) < self._collectives.size
            hows = [stray] if joined else self._everyones(stray)
            self.reset()
            raise stray_step(ruling.strays, next(filter(None, hows), "see the error of those ranks"))
        if ruling.verdict is Verdict.COMPARE:
            self._compare_replicas(ruling.present)
        new_layout = ruling.verdict in (Verdict.RELAYOUT, Verdict.ONLY_SUMS)
        if new_layout:
            self._lay_out(self._draft() if current else slots, digest, ruling.verdict is Verdict.ONLY_SUMS)
        if self._collectives.direct is not None:
            self._rely_on(self._collectives.direct)
        self._age = 0 if new_layout else self._age + 1
        self._taken_digest = self._take_digest() if is_due(self._age, self.settings.check_replicas) else None
        return ruling.loss

    def _exchange(self, mine: Message) -> list[Message | None]:
        """:func:`exchange`, the direct way if that is open.

        Of ranks that have left with ``hvd.join()`` it knows nothing. So messages go both ways, and what comes first
        counts.
        """
        name = f"{self.name}.flags"
        _end(name)
        flags = _begin_exchange(self._collectives, mine, name)
        meeting = self._flags_meeting
        if meeting is not None:
            meeting.begin(torch.tensor(mine.row()))
            started = time.perf_counter()
            while not flags.done():
                if meeting.over():
                    _carried[numbering.generation, name] = flags
                    return _messages(meeting.rows)
                pause(started)
        return _messages(flags.wait())

    def _rely_on(self, link: Link) -> None:
        """Prepare to send all else in this step the direct way: all ranks are here, and take it."""
        if self._flags_meeting is not None:
            # In this step, because a rank may leave after it.
            self._flags_meeting.end()
        for generation, name in list(_carried):
            if generation == numbering.generation and name.startswith(f"{self.name}.alive."):
                _end(name)
        link.begin_step()

    def _watch_ranks(self, kind: str) -> Pending:
        """Begin what tells whether all ranks are alive, while they wait for messages of this kind."""
        name, one = f"{self.name}.alive.{kind}", torch.ones(1)
        key = numbering.generation, name
        _carried[key] = alive = self._collectives.allreduce(one, name, out=one)
        return ready(lambda: _end(name), lambda: key not in _carried or alive.done())

    def _everyones(self, text: str) -> list[str]:
        return [data.decode() for data in self._collectives.allgather_bytes(text.encode(), f"{self.name}.how")]

    # --- comparing replicas ---------------------------------------------------------------------

    def _compared(self) -> list[Slot]:
        differing = self.settings.differing
        return [slot for slot in self._slots.values() if id(slot.parameter) not in differing]

    def _take_digest(self) -> OnItsWay:
        """Start to compute a digest of the parameters. Other ranks are told it in the next step."""
        return OnItsWay(digest_of(slot.parameter for slot in self._compared()))

    def _compare_replicas(self, present: Sequence[int]) -> None:
        """Raise the error that names what differs, on all ranks."""
        compared = self._compared()
        table = torch.zeros((self._collectives.size, len(compared)), dtype=torch.int64)
        for place, slot in enumerate(compared):
            table[self._collectives.rank, place] = digest_of([slot.parameter])
        # A sum, because that is all there is once a rank has joined.
        table = self._collectives.allreduce(table, f"{self.name}.replicas", out=table).wait()
        digests, step = {rank: table[rank].tolist() for rank in present}, self.state.steps + 1
        try:
            compare_replicas(digests, [slot.name for slot in compared], step)
        except ReplicaError:
            self.reset()
            raise

    @property
    def name(self) -> str:
        return f"adacons.{self._number}"

    def _send(self, packings: Sequence[Packing]) -> None:
        """Begin with those that have not begun."""
        for packing in packings:
            if not packing.bucket.begun:
                packing.load()
                packing.bucket.begin()

    def _recall(self, packings: Sequence[Packing]) -> None:
        """Bring everything under way to an end, and forget it.

        What one rank has begun, all must begin, or it would wait for them for ever.
        """
        self._send(packings)
        for packing in packings:
            try:
                packing.bucket.abandon()
            except HorovodInternalError:
                # Horovod refuses all but sums once a rank has joined; a lost connection will show
                # again in the next collective.
                packing.bucket.begun = False

    # --- the layout -----------------------------------------------------------------------------

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer whose gradients these are."""
        optimizer = self._optimizer()
        assert optimizer is not None
        return optimizer

    def _parameters(self) -> list[torch.Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _trainable(self) -> list[torch.Tensor]:
        return [parameter for parameter in self._parameters() if parameter.requires_grad]

    def _layout_is_current(self) -> bool:
        if self._stale:
            return False
        trainable = self._trainable()
        return len(trainable) == len(self._slots) and all(p in self._slots for p in trainable)

    def _forget_layout(self) -> None:
        self._slots: dict[torch.Tensor, Slot] = {}
        self._packings: list[Packing] = []
        self._digest = 0
        self._joined = False
        self._current = False
        self._overlaps = False
        self._begins_with_flags = False
        self._begins_if_all_here = False
        self._packings_for_all = []
        self._stale = False
        self._full = []
        self._counts_ranks = False
        self._rank_count = None
        self._unanimous = None
        self._unlink()
        self._age = 0
        self._taken_digest = None

    def _unlink(self) -> None:
        """Take the direct way no more, and forget what is on it."""
        link, self._collectives.direct = self._collectives.direct, None
        self._flags_meeting = None
        if link is not None:
            link.drop()

    def _link(self, arrivals: Sequence[Arrival]) -> None:
        """Take the direct way if all ranks have it, for gradients on the host."""
        watch = _calling(weakref.WeakMethod(self._watch_ranks))
        ranks, size, rank = [a.world_rank for a in arrivals], len(arrivals), self._collectives.rank
        memory = {(arrival.host, arrival.memory_device) for arrival in arrivals}
        if 1 < size <= MOST_RANKS and len(memory) == 1 and arrivals[0].memory_device >= 0:
            link = Link.by_memory(arrivals[0].token, size, rank, watch)
        elif min(ranks) >= 0 and size <= MOST_RANKS:
            link = Link.by_mpi(ranks, rank, 1 + max(arrival.links for arrival in arrivals), watch)
        else:
            return
        self._collectives.direct = link
        self._flags_meeting = link.meeting("flags", torch.tensor(Message().row()))

    def _draft(self) -> list[Slot]:
        """Slots for the parameters as they are now."""
        self._watch()
        # Groups are numbered over all parameters, so that the memory of a layer stays its own
        # when another is frozen.
        group_of, self._groups = self.settings.group_parameters(list(map(id, self._parameters())))
        return [Slot(self._name_of(p), p, group_of[id(p)], expected=self.passes) for p in self._trainable()]

    def _lay_out(self, slots: list[Slot], digest: int, joined: bool) -> None:
        """Make packings of slots that all ranks have alike."""
        arrivals: list[Arrival] = []
        self._unlink()
        if joined:
            self._choice = self._only_sums()
        else:
            self._choice, arrivals = self._agree(slots, digest)
        history, schedule = self._aggregator.history, self._schedule()
        if not joined:
            self._packings_for_all = []
        elif not self._joined and not self._counts_ranks:
            self._packings_for_all = self._packings
        self._slots = {slot.parameter: slot for slot in slots}
        self._packings = pack(
            f"{self.name}.{schedule.name}",
            slots,
            schedule,
            bucket_bytes=self.settings.bucket_bytes,
            together=self.settings.shared_buckets(list(map(id, self._slots))),
            compression=self.settings.compression,
        )
        workers = schedule.collectives
        self._step = Step(workers, self._aggregator, self._groups, self.name, names_of(self._choice.hosts))
        self._overlaps = self.settings.overlap and schedule.overlaps and self._step.may_begin_early
        needs_all = any(packing.bucket.needs_all for packing in self._packings)
        # What does not overlap leaves at the start of synchronize, with the flags.
        together = not (schedule.overlaps or joined) and self._step.may_begin_early
        self._begins_with_flags = together and not needs_all
        if not joined:
            # What goes the direct way is too quick to gain by leaving before the flags have told that all are here.
            together = together and not all(packing.bucket.direct for packing in self._packings)
            self._counts_ranks = (self._overlaps or together) and needs_all
            self._begins_if_all_here = self._overlaps or (together and needs_all)
        else:
            # A rank that has left and comes back still has the layout for all, or none. So those
            # that went on without it keep asking as they did, and send nothing early unasked.
            self._overlaps = self._begins_if_all_here = self._overlaps and self._counts_ranks
        self._digest, self._joined, self._stale = digest, joined, False
        if self._packings:
            reference = self._packings[0].bucket.reference
            self.state.fit(self._aggregator, self._groups, workers.size, reference)
        if history:
            held = holders([arrival.memory for arrival in arrivals], [arrival.held for arrival in arrivals])
            self.state.resume_history(self._aggregator, self._places(slots), held, self._collectives, self.name)

    def _schedule(self) -> Schedule:
        """The schedule of the choice that all ranks have made."""
        history, predivide = self._aggregator.history, self.settings.gradient_predivide_factor
        if self._choice.hosts:
            return HostPass(Hosts(self._collectives, self._choice.hosts), predivide, history)
        return SCHEDULES[self._choice.schedule](self._collectives, predivide, history)

    def _places(self, slots: Sequence[Slot]) -> list[Place]:
        """Where in the whole gradient the elements of each bucket lie."""
        intervals = dict(zip(slots, intervals_of([slot.length for slot in slots]), strict=True))
        dense = [packing for packing in self._packings if isinstance(packing, DensePacking)]
        return [Place(packing.bucket, [intervals[slot] for slot in packing.slots]) for packing in dense]

    def _agree(self, slots: Sequence[Slot], digest: int) -> tuple[Choice, list[Arrival]]:
        """Learn from all ranks which slots are sparse, remember what they remember, and choose a schedule with them."""
        on_host = all(slot.parameter.device.type == "cpu" for slot in slots)
        mine = Arrival(
            digest,
            host_name(),
            place=(hvd.local_rank(), hvd.local_size()),
            sparse=[i for i, slot in enumerate(slots) if self._is_sparse(slot)],
            memory=(self.state.digest(), self.state.steps),
            was_without_some=self._joined,
            held=self.state.history.held([slot.length for slot in slots], self._aggregator.history),
            world_rank=world_rank() if on_host and mpi_enabled() else -1,
            links=links_made(),
            memory_device=memory_device() if on_host else -1,
            token=secrets.token_hex(8),
        )
        arrivals = agree(self._collectives, mine, self._description(slots), self.name)
        self._link(arrivals)
        # A parameter may have a sparse gradient on one rank and none yet on another.
        for index in {i for arrival in arrivals for i in arrival.sparse}:
            slots[index].sparse = True
        ranks = self.settings.process_set.ranks
        hosts = choose_hosts(arrivals, ranks) if self.settings.workers == "host" else None
        if hosts is not None and (sparse := [slot.name for slot in slots if slot.sparse]):
            raise NotImplementedError(
                f'workers="host" averages no sparse gradients, as that of {sparse[0]}; make them dense with '
                "sparse_as_dense=True, or Embedding(sparse=False)"
            )
        reference = slots[0].parameter if slots else torch.zeros(())
        share_memory(
            self.state,
            [arrival.memory for arrival in arrivals],
            self._collectives,
            self.name,
            reference=reference,
            ranks=ranks,
            expected=any(arrival.was_without_some for arrival in arrivals),
        )
        choice = hosts or choose_schedule(
            self.settings,
            self._collectives,
            [arrival.host for arrival in arrivals],
            sum(s.length * s.parameter.element_size() for s in slots if not s.sparse),
            reference,
            self.name,
        )
        return choice, arrivals

    def _only_sums(self) -> Choice:
        if self.settings.workers == "host":
            raise RuntimeError('workers="host" goes on only while no rank has called hvd.join(), and one has')
        if self._aggregator.needs:
            raise RuntimeError(
                f"{self._aggregator!r} needs {self._aggregator.needs}, which cannot be had once a rank has called "
                "hvd.join()"
            )
        return ONLY_SUMS

    def _is_sparse(self, slot: Slot) -> bool:
        gradient = slot.parameter.grad
        if gradient is None or not gradient.is_sparse or self.settings.sparse_as_dense:
            return False
        return gradient.sparse_dim() == 1

    def _name_of(self, parameter: torch.Tensor) -> str:
        if parameter not in self._names:  # added to the optimizer after it was wrapped
            self._names[parameter] = f"adacons.noname.{len(self._names)}"
        return self._names[parameter]

    def _description(self, slots: Sequence[Slot]) -> dict[str, Any]:
        parameters = [
            Parameter(id(s.parameter), s.name, str(s.parameter.dtype), s.parameter.shape, s.group) for s in slots
        ]
        devices = sorted({arithmetic(slot.parameter.device) for slot in slots})
        return describe(self.settings, parameters, arithmetic=devices)

    # --- state ----------------------------------------------------------------------------------

    def set_passes(self, passes: int) -> None:
        self.passes = passes
        for packing in self._packings:
            packing.expect(passes)

    def renew(self) -> None:
        """Agree anew in the next step, as after a state was loaded.

        What is left of this layout is kept until then: other ranks, whose state was not, begin by it.
        """
        self._stale = True
        self.pending = False

    def gather_history(self) -> None:
        """Hold the mean gradients of earlier steps of all ranks, until the next step. All ranks call this together."""
        self.state.history.gather(self._collectives, self.name)

    def reset(self) -> None:
        """Forget everything under way, without waiting for it: the workers may be gone."""
        self.state.history.suspend()
        self._forget_layout()
        self.pending = False


# All there are, to find the one that looks after a parameter.
_reducers: weakref.WeakSet[Reducer] = weakref.WeakSet()


#: What Horovod still carries, though nobody needs it, by the count of its initialisations and by name: flags that have
#: come the direct way, and what tells whether ranks are alive. It must have ended before another of its name begins.
_carried: dict[tuple[int, str], Pending] = {}


def _end(name: str) -> None:
    """Wait for what Horovod carries by that name, if it does."""
    pending = _carried.pop((numbering.generation, name), None)
    if pending is not None:
        pending.wait()


def end_what_is_carried() -> None:
    """Wait for all that Horovod carries though nobody needs it."""
    for generation, name in list(_carried):
        if generation == numbering.generation:
            _end(name)
    _carried.clear()


def _ending_before(join: Callable[..., int]) -> Callable[..., int]:
    """Horovod's ``join``, called when nothing is under way.

    Once a rank has joined, Horovod adds zeros for it even to what it had begun before, and never ends that: the others
    would take it for absent in its last step, and it would wait for ever when it comes back.
    """

    def joining(*arguments: Any) -> int:
        end_what_is_carried()
        return join(*arguments)

    return joining


# Below hvd.join(), which scripts import from wherever they like.
mpi_lib.horovod_torch_join = _ending_before(mpi_lib.horovod_torch_join)


def reducer_of(parameters: Iterable[torch.Tensor]) -> Reducer | None:
    """The reducer that looks after one of these parameters and has gradients that it did not aggregate, if any."""
    waiting = [reducer for reducer in list(_reducers) if reducer.pending]
    if not waiting:
        return None
    return next((reducer for p in parameters for reducer in waiting if reducer.trains(p)), None)


def exchange(collectives: HorovodTorch, mine: Message, name: str) -> list[Message | None]:
    """Everyone's message by rank; None for a rank that has left with ``hvd.join()``.

    A sum, because that is the one collective which goes on working after a ``join``; and on the
    host, so that an accelerator is never waited for.
    """
    return _messages(_begin_exchange(collectives, mine, f"{name}.flags").wait())


def _begin_exchange(collectives: HorovodTorch, mine: Message, name: str) -> Pending:
    row = torch.tensor(mine.row())
    table = row.new_zeros((collectives.size, len(row)))
    table[collectives.rank] = row
    return collectives.allreduce(table, name, out=table)


def _messages(table: torch.Tensor) -> list[Message | None]:
    return [Message.from_row(row) for row in table.tolist()]


def _calling(method: weakref.WeakMethod[Callable[..., Any]]) -> Any:
    """The method, in a form that does not keep its object alive; without effect once that is gone."""

    def call(*arguments: Any) -> Any:
        function = method()
        return None if function is None else function(*arguments)

    return call
