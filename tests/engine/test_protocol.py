"""`decide` rules on the messages of all ranks, case by case. No process is started."""

from __future__ import annotations

import math

import pytest

from adacons_hvd.engine.protocol import Message, Recall, Verdict, decide
from adacons_hvd.engine.replicas import ReplicaError, compare_replicas

HERE = Message(digest=1)
JOINED = Message(digest=1, joined_layout=True)


def but(message: Message, **changes: object) -> Message:
    return Message(**{**vars(message), **changes})


#: name: (every rank's message, the verdict, what is recalled). The first message is this rank's own.
CASES = {
    "all is as before": ([HERE, HERE], Verdict.PROCEED, Recall.NOTHING),
    "all have begun": ([but(HERE, begun=True)] * 2, Verdict.PROCEED, Recall.NOTHING),
    "a gradient changed after it was sent": (
        [HERE, but(HERE, begun=True, changed=True)],
        Verdict.RESEND,
        Recall.PRESENT,
    ),
    "settings differ": ([HERE, but(HERE, digest=2)], Verdict.DISAGREE, Recall.NOTHING),
    "settings differ, and one strays": ([HERE, but(HERE, digest=2, stray=True)], Verdict.DISAGREE, Recall.NOTHING),
    "one lays out anew": ([HERE, but(HERE, new_layout=True)], Verdict.RELAYOUT, Recall.NOTHING),
    "one lays out anew, another has begun": (
        [but(HERE, begun=True), but(HERE, new_layout=True)],
        Verdict.RELAYOUT,
        Recall.PRESENT,
    ),
    "one has joined": ([HERE, None], Verdict.ONLY_SUMS, Recall.NOTHING),
    "one has joined, as in the step before": ([JOINED, None], Verdict.PROCEED, Recall.NOTHING),
    "one has come back": ([JOINED, HERE], Verdict.RELAYOUT, Recall.NOTHING),
    "one has come back, and has begun": ([JOINED, but(HERE, begun=True)], Verdict.RELAYOUT, Recall.FOR_ALL),
    "one comes back, seen by itself": ([but(HERE, begun=True), JOINED], Verdict.RELAYOUT, Recall.PRESENT),
    "one has come back, another joined": ([JOINED, HERE, None], Verdict.ONLY_SUMS, Recall.NOTHING),
    "one strays": ([HERE, but(HERE, stray=True)], Verdict.STRAY, Recall.NOTHING),
    "one strays, another has begun": ([but(HERE, begun=True), but(HERE, stray=True)], Verdict.STRAY, Recall.PRESENT),
    "one strays, another lays out anew": (
        [but(HERE, new_layout=True), but(HERE, stray=True)],
        Verdict.STRAY,
        Recall.NOTHING,
    ),
    "parameters are the same": ([but(HERE, replicas=7)] * 3, Verdict.PROCEED, Recall.NOTHING),
    "parameters differ": ([but(HERE, replicas=7), but(HERE, replicas=8)], Verdict.COMPARE, Recall.NOTHING),
    "parameters differ, and all have begun": (
        [but(HERE, replicas=7, begun=True), but(HERE, replicas=8, begun=True)],
        Verdict.COMPARE,
        Recall.PRESENT,
    ),
    "parameters differ, and one lays out anew": (
        [but(HERE, replicas=7), but(HERE, new_layout=True)],
        Verdict.RELAYOUT,
        Recall.NOTHING,
    ),
    "parameters of those that are here are the same": (
        [but(JOINED, replicas=7), None, but(JOINED, replicas=7)],
        Verdict.PROCEED,
        Recall.NOTHING,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_case(name):
    messages, verdict, recall = CASES[name]
    ruling = decide(messages[0], messages)
    assert (ruling.verdict, ruling.recall) == (verdict, recall)
    assert ruling.present == tuple(rank for rank, message in enumerate(messages) if message is not None)


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_reach_the_same_verdict(name):
    messages, verdict, _ = CASES[name]
    assert {decide(mine, messages).verdict for mine in messages if mine is not None} == {verdict}


@pytest.mark.parametrize("loss", [None, 0.0, -1.5, 1e300, math.inf])
def test_a_message_survives_the_sum(loss):
    message = Message(new_layout=True, begun=True, digest=(1 << 62) - 1, replicas=3, loss=loss)
    zeros = [0] * len(message.row())
    assert Message.from_row([a + b for a, b in zip(message.row(), zeros, strict=True)]) == message
    assert Message.from_row(zeros) is None


def test_the_loss_is_the_mean_over_those_who_gave_one():
    messages = [but(HERE, loss=1.0), HERE, but(HERE, loss=4.0)]
    assert decide(HERE, messages).loss == 2.5
    assert decide(HERE, [HERE, HERE]).loss is None


def test_strays_are_named():
    assert decide(HERE, [HERE, but(HERE, stray=True), but(HERE, stray=True)]).strays == (1, 2)


def test_three_parameters_that_differ_are_named():
    said = "before step 7 rank 2 held other values than ranks 0, 3 in 4 of 5 parameters: b, c, d and 1 more. "
    with pytest.raises(ReplicaError, match=said):
        compare_replicas({0: [0] * 5, 2: [0, 1, 1, 1, 1], 3: [0] * 5}, "abcde", 7)
