"""The messages that ranks exchange at the start of a step, and the decision that follows from them.

Every rank sends one :class:`Message` and receives all of them, as rows of one small sum. :func:`decide` is the same
pure function of the same messages on every rank, so all ranks do the same next, and none waits for another in vain.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Message", "Recall", "Ruling", "Verdict", "decide"]


@dataclass(frozen=True)
class Message:
    """One rank's message to the others. Its row of numbers adds up with the zeros of others to itself.

    >>> message = Message(begun=True, digest=5, loss=0.25)
    >>> Message.from_row(message.row()) == message
    True
    >>> Message.from_row([0] * len(Message().row())) is None  # a rank that has left with join() adds zeros
    True
    """

    #: The rank has to lay out its buckets anew.
    new_layout: bool = False
    #: Its layout is the one for when some ranks have joined.
    joined_layout: bool = False
    #: It has begun to send.
    begun: bool = False
    #: A gradient has changed after it was sent.
    changed: bool = False
    #: It was about to step along gradients that were never aggregated.
    stray: bool = False
    #: Stands for its settings and parameters.
    digest: int = 0
    #: Stands for the values of its parameters, where those are compared; 0 where not.
    replicas: int = 0
    #: The loss that a closure returned, if there was one.
    loss: float | None = None

    def row(self) -> list[int]:
        """The message as whole numbers; the first one is 1, for a rank that is here."""
        # A loss travels as its 64 bits: adding zeros leaves them as they are.
        (bits,) = struct.unpack("<q", struct.pack("<d", 0.0 if self.loss is None else self.loss))
        signs = (self.new_layout, self.joined_layout, self.begun, self.changed, self.stray, self.loss is not None)
        return [1, *map(int, signs), self.digest, self.replicas, bits]

    @classmethod
    def from_row(cls, row: Sequence[int]) -> Message | None:
        """Undo :meth:`row`; None for a rank that has left with ``hvd.join()``."""
        here, new_layout, joined_layout, begun, changed, stray, has_loss, digest, replicas, bits = row
        if not here:
            return None
        loss = struct.unpack("<d", struct.pack("<q", bits))[0] if has_loss else None
        signs = (bool(new_layout), bool(joined_layout), bool(begun), bool(changed), bool(stray))
        return cls(*signs, digest, replicas, loss)


class Verdict(enum.Enum):
    """The next thing that all ranks do."""

    #: Take the step with what has been sent.
    PROCEED = enum.auto()
    #: Send everything again, because a gradient has changed on some rank.
    RESEND = enum.auto()
    #: Lay out anew together, for all ranks.
    RELAYOUT = enum.auto()
    #: Lay out anew for sums alone, which is all that is left once a rank has joined.
    ONLY_SUMS = enum.auto()
    #: Raise an error: settings or parameters differ.
    DISAGREE = enum.auto()
    #: Raise an error: a rank was about to step along gradients that were never aggregated.
    STRAY = enum.auto()
    #: Compare parameters one by one: their values differ.
    COMPARE = enum.auto()


class Recall(enum.Enum):
    """The buckets to bring to an end before that, because one rank at least has begun to send them."""

    NOTHING = enum.auto()
    #: The buckets of the present layout.
    PRESENT = enum.auto()
    #: The buckets of the layout for all ranks, by which a rank that comes back has begun.
    FOR_ALL = enum.auto()


@dataclass(frozen=True)
class Ruling:
    """The outcome of :func:`decide`."""

    verdict: Verdict
    #: The ranks that take part; the others have joined.
    present: tuple[int, ...]
    recall: Recall = Recall.NOTHING
    #: Ranks that stepped along gradients that were never aggregated.
    strays: tuple[int, ...] = ()
    #: The mean of the losses that ranks gave, if any did.
    loss: float | None = None


def decide(mine: Message, everyone: Sequence[Message | None]) -> Ruling:
    """Decide what all ranks do next, by all ranks' messages, of which one is this rank's own.

    >>> decide(Message(), [Message(), Message(changed=True, begun=True)]).verdict.name
    'RESEND'
    """
    here = {rank: message for rank, message in enumerate(everyone) if message is not None}
    messages, present = here.values(), tuple(here)
    if any(message.digest != mine.digest for message in messages):
        return Ruling(Verdict.DISAGREE, present)
    some_joined = len(here) < len(everyone)
    new_layout = any(message.new_layout or message.joined_layout != some_joined for message in messages)
    strays = tuple(rank for rank, message in here.items() if message.stray)
    losses = [message.loss for message in messages if message.loss is not None]
    if strays:
        verdict = Verdict.STRAY
    elif new_layout:
        # What a rank that lays out anew says of its parameters is of another step.
        verdict = Verdict.ONLY_SUMS if some_joined else Verdict.RELAYOUT
    elif len({message.replicas for message in messages}) > 1:
        verdict = Verdict.COMPARE
    else:
        verdict = Verdict.RESEND if any(message.changed for message in messages) else Verdict.PROCEED
    recall = Recall.NOTHING
    if verdict is not Verdict.PROCEED and any(message.begun for message in messages):
        came_back = mine.joined_layout and any(m.begun and not m.joined_layout for m in messages)
        recall = Recall.FOR_ALL if came_back else Recall.PRESENT
    return Ruling(verdict, present, recall, strays, sum(losses) / len(losses) if losses else None)
