"""Messages straight from rank to rank, beside Horovod.

Whatever Horovod is given waits for its thread, which wakes once a millisecond. Memory that ranks share, or MPI, carries
a small message in a hundredth of that. So what every rank tells all others in a step (flags, statistics, gradients)
takes this way: through shared memory where all ranks are on one host (:mod:`.shared`), else by mpi4py where Horovod
runs over MPI and all ranks have it, if the message is small. It knows nothing of ranks that have left with
``hvd.join()``; of those Horovod tells, which :mod:`adacons_hvd.torch.reducer` asks in every step.

A :class:`Link` belongs to one layout of one optimizer. Its messages carry a mark of their own, so whatever was under
way when ranks lay out anew can be forgotten: nobody takes it for something else.
"""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Protocol

import torch

from . import Pending, ready
from .shared import SharedChannel, can_spare

__all__ = ["MOST_RANKS", "Channel", "Link", "Meeting", "links_made", "pause", "world_rank"]

# Seconds. What comes at once is looked for without sleeping; the shortest sleep is a tenth of a millisecond. But where
# ranks outnumber processors, one that never sleeps keeps another from running, so not for longer than that.
_SHORT = 2e-4
# MPI moves messages only while somebody looks for them, so for so long a rank sleeps as briefly as it can; then between
# looks, for an eighth of the time it has waited, a millisecond at most.
_SPIN = 3e-3
_LONGEST_SLEEP = 1e-3

#: From how many ranks on a message to each other one is no longer small.
MOST_RANKS = 64

# Bytes of all workers' messages together, up to which it pays to send each of them to everyone by MPI.
_MOST_BYTES = 1 << 20

# How a message is marked: by its link and its channel, of which a link has so many.
_CHANNELS = 1 << 10

# Bytes of the length before rows.
_LENGTH = 8

# Channels for what every step sends beside gradients, such as flags.
_KEPT_FREE = 8

# MPI's groups of ranks. They live as long as MPI does: making one takes all its ranks, and so would freeing it.
_groups: dict[tuple[int, ...], Any] = {}

_links = 0


def links_made() -> int:
    """The number of the last link that this process has made."""
    return _links


def world_rank() -> int:
    """This process's rank in MPI's world, or -1 if there is no direct way from here.

    Call it only while Horovod runs over MPI.
    """
    try:
        import mpi4py

        starts = mpi4py.rc.initialize
        mpi4py.rc.initialize = False  # an MPI that Horovod has not started is not the one it uses
        try:
            from mpi4py import MPI
        finally:
            mpi4py.rc.initialize = starts
    except (ImportError, RuntimeError):  # not installed, or no MPI library that it can load
        return -1
    # Horovod's own thread sends, too.
    usable = MPI.Is_initialized() and not MPI.Is_finalized() and MPI.Query_thread() == MPI.THREAD_MULTIPLE
    return int(MPI.COMM_WORLD.Get_rank()) if usable else -1


class Channel(Protocol):
    """One message from every rank to every other, again and again."""

    @property
    def rows(self) -> torch.Tensor:
        """Everyone's message by rank, this rank's own among them; valid until this rank sends the next one."""
        ...

    @property
    def own(self) -> torch.Tensor:
        """The row in which this rank's next message may be written."""
        ...

    def start(self) -> None:
        """Send what is in this rank's own row to all others, and begin to receive theirs."""
        ...

    def arrived(self) -> bool:
        """Whether everyone's message is here, and this rank's own is on its way to all."""
        ...

    def drop(self) -> None:
        """Forget it, whatever is under way."""
        ...


class Link:
    """The direct ways between all ranks of a process set, for one layout of one optimizer.

    All ranks make it together, by :meth:`by_memory` or :meth:`by_mpi`. ``watch`` begins a collective of Horovod's: it
    fails if a rank leaves, and Horovod warns of a rank that does not begin it. A rank begins one for each kind of
    message, which is the end of its name, when it has sent all of that kind and waits for the first one of others. What
    was sent before the step needs none: with the flags, it is there.
    """

    #: The last of these collectives, while it is under way.
    watched: Pending | None = None
    #: The kinds of message that are watched for in this step; None outside of one. A link is made in the course of one.
    _kinds: set[str] | None

    def __init__(
        self, size: int, rank: int, make: Callable[..., Channel], watch: Callable[[str], Pending], in_memory: bool
    ) -> None:
        self.size, self.rank, self.in_memory = size, rank, in_memory
        self._make = make
        self._channels: dict[str, Channel] = {}
        #: What :meth:`prepare` has answered.
        self._prepared: dict[str, bool] = {}
        #: For how many bytes of rows from each rank there is room, by name.
        self._rooms: dict[str, int] = {}
        self._watch, self._kinds = watch, set()
        self._numbers = 0
        self._is_dropped = False

    @classmethod
    def by_memory(cls, token: str, size: int, rank: int, watch: Callable[[str], Pending]) -> Link:
        """A link through memory, for ranks of one host. ``token`` is the same on all of them, and of this link only."""

        def make(number: int, like: torch.Tensor, buffers: int) -> Channel:
            return SharedChannel(f"{token}-{number}", size, rank, like, buffers)

        return cls(size, rank, make, watch, in_memory=True)

    @classmethod
    def by_mpi(cls, ranks: Sequence[int], rank: int, number: int, watch: Callable[[str], Pending]) -> Link:
        """A link by MPI. ``ranks`` are all ranks in MPI's world, and ``number`` is the same on all of them, and larger
        than that of every link that one of them has made before."""
        global _links
        from mpi4py import MPI

        world = tuple(ranks)
        if world not in _groups:
            _groups[world] = MPI.COMM_WORLD.Create_group(MPI.COMM_WORLD.Get_group().Incl(world))
        communicator = _groups[world]
        _links = number
        marks: Any = MPI.COMM_WORLD.Get_attr(MPI.TAG_UB)
        # Those of a link come again only once so many others have been made that its messages are long gone.
        mark = number % (marks // _CHANNELS) * _CHANNELS

        def make(number: int, like: torch.Tensor, buffers: int) -> Channel:
            return MessageChannel(len(world), rank, communicator, mark + number, like)

        return cls(len(world), rank, make, watch, in_memory=False)

    def begin_step(self) -> None:
        """Say that all ranks are here and take another step; what was watched in the last one has ended."""
        self.watched, self._kinds = None, set()

    def end_step(self) -> None:
        """Say that the step is over."""
        self._kinds = None

    def prepare(self, tensor: torch.Tensor, name: str, buffers: int = 2) -> bool:
        """Make the channel for flat tensors like this one, unless it is there; False if they must take another way, as
        where there are too many channels, too little memory on some rank, or by MPI too much to send.

        All ranks ask for a link's channels in the same order. With one buffer, what a rank has received is
        overwritten when another one sends anew, so ranks must know in another way that all have read it.
        """
        if name not in self._prepared:
            self._prepared[name] = self._prepare(tensor, name, buffers)
        return self._prepared[name]

    def _prepare(self, tensor: torch.Tensor, name: str, buffers: int) -> bool:
        if self._numbers >= _CHANNELS - _KEPT_FREE:
            return False
        if not self.in_memory:
            if self.size * tensor.numel() * tensor.element_size() > _MOST_BYTES:
                return False
            self.channel(name, tensor)
            return True
        made = 0
        if can_spare(self.size, tensor, buffers):
            with contextlib.suppress(OSError):
                self.channel(name, tensor, buffers)
                made = 1
        if int(self.sum(torch.tensor([made]), "made")) == self.size:
            return True
        if made:
            self._channels.pop(name).drop()
        return False

    def forget(self, prefix: str) -> None:
        """Make no more use of channels whose names begin so, on all ranks, once their messages have arrived."""
        for name in [name for name in self._channels if name.startswith(prefix)]:
            self._channels.pop(name).drop()
        self._prepared = {name: answer for name, answer in self._prepared.items() if not name.startswith(prefix)}

    def channel(self, name: str, like: torch.Tensor, buffers: int = 2) -> Channel:
        """The channel of that name, made when it is asked for first."""
        if name not in self._channels:
            self._numbers += 1
            self._channels[name] = self._make(self._numbers, like, buffers)
        return self._channels[name]

    def wait(self, channel: Channel) -> torch.Tensor:
        """Wait for everyone's message, and return them as rows."""
        self.wait_until(channel.arrived)
        return channel.rows

    def wait_until(self, done: Callable[[], bool]) -> None:
        """Wait as long as all ranks are alive."""
        started = time.perf_counter()
        while not done():
            if self.watched is not None and self.watched.done():
                watched, self.watched = self.watched, None
                try:
                    watched.wait()
                except Exception:
                    # A rank has gone, maybe just after it had sent what is awaited.
                    if not done():
                        raise
            pause(started)

    def send(self, name: str, tensor: torch.Tensor) -> Channel:
        """Send everyone this flat tensor through the channel of that name, and begin to receive theirs."""
        channel = self.channel(name, tensor)
        self.wait(channel)  # the message before it, which all ranks have sent
        own = channel.own
        if tensor.data_ptr() != own.data_ptr():
            own.copy_(tensor)
        channel.start()
        return channel

    def _watch_for(self, name: str) -> None:
        """Begin to watch for ranks that leave, while messages of this name's kind are awaited."""
        kind = name.rpartition(".")[2]
        if self._kinds is not None and kind not in self._kinds:
            self._kinds.add(kind)
            self.watched = self._watch(kind)

    def sum(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """The sum of everyone's tensor, the same bits on every rank."""
        channel = self.send(name, tensor)
        self._watch_for(name)
        first, *others = self.wait(channel)
        result: torch.Tensor = first.clone()
        for other in others:
            result += other
        return result

    def gather(self, tensor: torch.Tensor, name: str, out: torch.Tensor | None = None) -> Pending:
        """Everyone's flat tensor, concatenated in rank order; without ``out``, until this rank sends the next one."""
        if self._is_dropped:
            # A rank that has come back has begun by this link, and is told so with the flags.
            return ready(lambda: tensor)
        channel = self.send(name, tensor)
        in_step = self._kinds is not None

        def finish() -> torch.Tensor:
            if in_step:
                self._watch_for(name)
            everything = self.wait(channel).view(-1)
            return everything if out is None else out.copy_(everything)

        return ready(finish, channel.arrived)

    def gather_rows(self, rows: torch.Tensor, name: str, otherwise: Callable[[torch.Tensor, str], Pending]) -> Pending:
        """Everyone's rows in rank order, however many each has; by ``otherwise`` while there is no room for them.

        How much room it takes is known once they have all been seen. A message begins with its length, so all ranks
        know when that of one did not fit.
        """
        if self._is_dropped:
            return ready(lambda: rows)
        room = self._rooms.get(name, 0)
        if not room:
            pending = otherwise(rows, name)
            return ready(lambda: self._with_room_for(pending.wait(), name))
        data, in_step = rows.reshape(-1).view(torch.uint8), self._kinds is not None
        channel = self._channels[_rows(name, room)]
        self.wait(channel)  # the message before it, which all ranks have sent
        channel.own[:_LENGTH].view(torch.int64)[0] = len(data)
        if len(data) <= room:
            channel.own[_LENGTH : _LENGTH + len(data)] = data
        channel.start()

        def finish() -> torch.Tensor:
            if in_step:
                self._watch_for(_rows(name, room))
            messages = self.wait(channel)
            lengths = messages[:, :_LENGTH].contiguous().view(torch.int64)[:, 0].tolist()
            if max(lengths) > room:
                self.forget(_rows(name, room))
                return self._with_room_for(otherwise(rows, name).wait(), name)
            parts = [message[_LENGTH : _LENGTH + n] for message, n in zip(messages, lengths, strict=True)]
            return torch.cat(parts).view(rows.dtype).view(-1, *rows.shape[1:])

        return ready(finish, channel.arrived)

    def _with_room_for(self, everything: torch.Tensor, name: str) -> torch.Tensor:
        """Everyone's rows, once there is room for as much from each rank as has now come from all, if memory allows."""
        if self.in_memory:
            room = 1 << max(10, (everything.numel() * everything.element_size() - 1).bit_length())
            like = torch.empty(_LENGTH + room, dtype=torch.uint8)
            self._rooms[name] = room if self.prepare(like, _rows(name, room)) else 0
        return everything

    def own(self, name: str) -> torch.Tensor:
        """Where what this rank is to :meth:`gather` next by that name may be written, to save a copy."""
        return self._channels[name].own

    def meeting(self, name: str, like: torch.Tensor) -> Meeting:
        """Make a meeting of all ranks at which each tells the others a flat tensor like this one."""
        return Meeting(self, name, like)

    def drop(self) -> None:
        """Forget all messages under way."""
        self._is_dropped = True
        for channel in self._channels.values():
            channel.drop()
        self._channels.clear()


class Meeting:
    """Everyone's message, and the certainty that everyone has sent it in this very step.

    A message alone may be an old one: sent in a step that its receiver had left with ``hvd.join()``, and found by it
    when it comes back. So every rank confirms that it has all messages, and only ranks that take part in a step can.
    """

    def __init__(self, link: Link, name: str, like: torch.Tensor) -> None:
        self._link, self._name, self._like = link, name, like
        #: Nothing is awaited, or messages are, or confirmations.
        self._awaited: Channel | None = None

    # Made when they are first needed: what is never used would keep its file.

    @cached_property
    def _messages(self) -> Channel:
        return self._link.channel(self._name, self._like)

    @cached_property
    def _confirmations(self) -> Channel:
        return self._link.channel(f"{self._name}.confirmed", self._like.new_zeros(1))

    @property
    def rows(self) -> torch.Tensor:
        """Everyone's message, once it is :meth:`over`."""
        return self._messages.rows

    def begin(self, message: torch.Tensor) -> None:
        """Tell the others."""
        self.end()  # the meeting before it, at which all ranks were
        self._messages.own.copy_(message)
        self._messages.start()
        self._awaited = self._messages

    def over(self) -> bool:
        """Whether everything is known. Whoever waits for it has to ask again and again, for the others' sake too."""
        if self._awaited is None:
            return True
        if self._awaited is self._messages and self._messages.arrived():
            self._confirmations.start()
            self._awaited = self._confirmations
        if self._awaited is self._confirmations and self._confirmations.arrived():
            self._awaited = None
        return self._awaited is None

    def end(self) -> None:
        """Wait until it is over."""
        self._link.wait_until(self.over)


class MessageChannel:
    """A channel by MPI."""

    #: Everyone's message by rank, this rank's own among them.
    rows: torch.Tensor

    def __init__(self, size: int, rank: int, communicator: Any, mark: int, like: torch.Tensor) -> None:
        from mpi4py import MPI

        self._prequest, self._request = MPI.Prequest, MPI.Request
        self.rows = like.new_zeros((size, like.numel()))
        self.own = self.rows[rank]
        data = self.rows.view(torch.uint8)
        others = [other for other in range(size) if other != rank]
        receive = [communicator.Recv_init([data[other], MPI.BYTE], other, mark) for other in others]
        send = [communicator.Send_init([data[rank], MPI.BYTE], other, mark) for other in others]
        self._requests = [*receive, *send]
        self._finalizer = weakref.finalize(self, _free, receive, send, os.getpid())
        self._finalizer.atexit = False
        self._under_way = False

    def start(self) -> None:
        self._prequest.Startall(self._requests)
        self._under_way = True

    def arrived(self) -> bool:
        if self._under_way and self._request.Testall(self._requests):
            self._under_way = False
        return not self._under_way

    def drop(self) -> None:
        self._finalizer()
        self._under_way = False


def _rows(name: str, room: int) -> str:
    """The name of the channel for rows, of which each rank may send so many bytes."""
    return f"{name}.{room}.rows"


def _free(receive: Sequence[Any], send: Sequence[Any], process: int) -> None:
    from mpi4py import MPI

    # A process that was forked, as a DataLoader's workers are, has no MPI.
    if os.getpid() != process or MPI.Is_finalized():
        return
    for request in receive:
        if not request.Test():
            request.Cancel()
            request.Wait()
        request.Free()
    for request in send:
        # A message that nobody takes is as small as flags are, and has left already; a larger one is never sent
        # before it is known that all ranks are here.
        with contextlib.suppress(MPI.Exception):
            request.Free()


def pause(started: float) -> None:
    """Let others run, between two looks for what may be there at once."""
    waited = time.perf_counter() - started
    if waited < _SHORT:
        os.sched_yield()
    else:
        time.sleep(0 if waited < _SPIN else min(waited / 8, _LONGEST_SLEEP))
