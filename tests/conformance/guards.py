"""A rank that trains alone stops all ranks, and they go on once they are equal, in every binding. Runs on the ranks.

A binding's module says

- ``STRAYS``: its ways to take a step along gradients that were never aggregated;
- ``TELLS_HOW``: whether all ranks learn which way one has gone;
- ``OUTLIVES_A_RANK``: whether all can go on after one has strayed alone;
- ``FOUND``: after how many steps ranks learn that they began apart, or None if it does not compare replicas;
- ``COMPARES_AVERAGED``: whether it does so without an aggregator, too;
- ``OUT_OF_DATA_IS_TOLD``: whether a rank that has run out of data keeps the others company, gets their errors, and in
  the end their parameters.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import harness
import numpy as np
import pytest
from memory import advance, assert_equal_bits

from adacons_hvd import AdaCons
from adacons_hvd.agreement import by_ranks
from adacons_hvd.engine.replicas import ReplicaError, StrayStepError

#: The optimizer, which has no state of its own: equal parameters are then all that ranks need.
PLAIN = "SGD"
#: Ranks that stray.
ALONE, TOGETHER = [1], [0, 1, 2]


@dataclass(frozen=True)
class Stray:
    """A way to take the step of this number, and how the error calls it."""

    take: Callable[[Any, int], Any]
    how: str
    #: The ranks that stray; each of these in a step of its own.
    ranks: tuple[list[int], ...] = (ALONE, TOGETHER)
    #: Whether the error comes before any rank's parameters have changed.
    untouched: bool = True


def take_all(module: str) -> None:
    """On a rank: all that a binding must do."""
    binding = importlib.import_module(module)
    training = stray_steps(binding)
    if binding.FOUND is None:
        return
    not_compared(binding, training)
    del training
    never_made_equal(binding)
    drifted_later(binding)
    if binding.COMPARES_AVERAGED:
        drifted_later(binding, aggregator=None)
    meant_to_differ(binding)
    out_of_data(binding)


# --- steps along gradients that were never aggregated ---------------------------------------------


def stray_steps(binding: Any) -> Any:
    """Every other way in a training of another kind; returns the last training.

    Such steps are found whether replicas are compared or not.
    """
    ways, training = list(binding.STRAYS.items()), None
    kinds: list[dict[str, Any]] = [{}]
    if binding.FOUND is not None:
        other = {"aggregator": None} if binding.COMPARES_AVERAGED else {"schedule": "gather"}
        kinds = [{"check_replicas": 0}, {"check_replicas": 0, **other}]
    for number, kind in enumerate(kinds):
        training = None
        for name, way in ways[number :: len(kinds)]:
            for ranks in way.ranks:
                try:
                    training = stray_and_go_on(binding, training, way, ranks, kind)
                except BaseException as error:
                    error.add_note(f"{name}, on ranks {ranks} with {kind}")
                    raise
    return training


def stray_and_go_on(binding: Any, training: Any, way: Stray, ranks: list[int], kind: dict[str, Any]) -> Any:
    """In this training, or a new one; returns it if it is still of use."""
    if training is None:
        training = training_with(binding, **{"aggregator": AdaCons(nonfinite="raise"), **kind})
        if binding.OUTLIVES_A_RANK:  # while the others lay out
            stray_step(binding, training, binding.STRAYS["step of the class"], ALONE, 0)
        advance(training, 0, 2)
    stray_step(binding, training, way, ranks, 2)
    if ranks == ALONE and not binding.OUTLIVES_A_RANK:
        return None
    report = training.report
    if not way.untouched:
        mend(training)
    advance(training, 3, 5)
    assert report is None or training.report.steps == report.steps + 2
    return training


def stray_step(binding: Any, training: Any, way: Stray, ranks: list[int], first: int) -> None:
    """These ranks stray in this step, and the others train on until they hear of it."""
    before = training.values()
    with pytest.raises(StrayStepError) as caught:
        way.take(training, first) if harness.rank() in ranks else train(training, range(first, first + 3))
    knows = harness.rank() in ranks or binding.TELLS_HOW
    how = way.how if knows else "the error on that rank says how"
    took = f"{by_ranks(ranks)} took a step along gradients that were never aggregated: {how}"
    # AutoGraph puts lines of its own around it.
    assert took in str(caught.value), str(caught.value)
    if binding.TELLS_HOW:
        assert_all_are_told(str(caught.value))
    if way.untouched:
        for value, old in zip(training.values(), before, strict=True):
            np.testing.assert_array_equal(value, old)


# --- replicas that have drifted apart -------------------------------------------------------------


def never_made_equal(binding: Any) -> None:
    """By default they are found at once."""
    training = training_with(binding)
    change(training, 1, rank=2)
    text, step = stopped_at(training, 0, binding.FOUND), binding.FOUND + 1
    assert f"before step {step} rank 2 held other values than ranks 0-1 in 1 of 2 parameters: b." in text, text
    mend(training)
    advance(training, 10, 12)


def drifted_later(binding: Any, **chosen: Any) -> None:
    """Compared every second step."""
    training = training_with(binding, check_replicas=2, **chosen)
    # What scripts make equal only after the first step is no fault.
    change(training, 0, rank=0)
    training.step(0)
    mend(training)
    advance(training, 1, 3)
    change(training, 0, rank=1)
    found = 3 + binding.FOUND
    text = stopped_at(training, 3, found)
    assert f"before step {found + 1} rank 1 held other values than ranks 0, 2 in 1 of 2 parameters: a." in text, text
    mend(training)
    advance(training, 10, 12)


def meant_to_differ(binding: Any) -> None:
    """One parameter is, and the other one is still compared."""
    training = binding.Training(lambda parameters: {"check_replicas": 1, "may_differ": parameters[:1]}, PLAIN)
    change(training, 0, rank=1)
    train(training, range(4))
    first, second = training.values()
    assert different(first)
    assert not different(second)
    change(training, 1, rank=1)
    text = stopped_at(training, 4, 3 + binding.FOUND)
    assert "rank 1 held other values than ranks 0, 2 in 1 of 1 parameters: b." in text, text
    mend(training)
    advance(training, 10, 12)


def not_compared(binding: Any, training: Any) -> None:
    """Never, if so told, as the training with stray steps is, if there is any."""
    training = training or training_with(binding, check_replicas=0)
    change(training, 0, rank=1)
    train(training, range(10, 14))
    assert different(training.values()[0])


def out_of_data(binding: Any) -> None:
    """Ranks that have run out of data are not compared, and the others are."""
    training = training_with(binding, check_replicas=1)
    with training.until_all_are_out_of_data():
        train(training, range(2 if harness.rank() == 2 else 5))
    if binding.OUT_OF_DATA_IS_TOLD:
        assert_equal_bits(training)
    else:
        # The rank that left has missed steps, and nobody has made parameters equal.
        text = stopped_at(training, 5, 5 + binding.FOUND)
        assert "rank 2 held other values than ranks 0-1 in 2 of 2 parameters: a, b." in text, text
        mend(training)
    advance(training, 10, 12)

    def go_on() -> None:
        with training.until_all_are_out_of_data():
            for step in range(12, 13 if harness.rank() == 2 else 18):
                if step == 14:
                    change(training, 1, rank=1)
                training.step(step)

    if harness.rank() == 2 and not binding.OUT_OF_DATA_IS_TOLD:
        go_on()
    else:
        with pytest.raises(ReplicaError, match=r"rank 1 held other values than rank 0 in 1 of 2 parameters: b\."):
            go_on()
    if not binding.OUT_OF_DATA_IS_TOLD:
        mend(training)
        advance(training, 20, 22)


# --- helpers --------------------------------------------------------------------------------------


def training_with(binding: Any, **chosen: Any) -> Any:
    return binding.Training(lambda parameters: chosen, PLAIN)


def change(training: Any, which: int, rank: int) -> None:
    """Change one parameter a little, on one rank alone."""
    if harness.rank() == rank:
        values = training.values()
        values[which].flat[0] += 1e-9
        training.assign(values)


def mend(training: Any) -> None:
    """Give all ranks the parameters of the first."""
    training.assign(harness.gather(training.values())[0])


def train(training: Any, steps: Iterable[int]) -> None:
    for step in steps:
        training.step(step)


def stopped_at(training: Any, first: int, expected: int) -> str:
    """Train until the error that tells of replicas, which all ranks must have in the expected step; its text."""
    train(training, range(first, expected))
    with pytest.raises(ReplicaError) as caught:
        training.step(expected)
    assert_all_are_told(str(caught.value))
    return str(caught.value)


def assert_all_are_told(text: str) -> None:
    texts = harness.gather(text)
    assert len(set(texts)) == 1, texts


def different(value: np.ndarray) -> bool:
    """Whether ranks hold other values."""
    return len({each.tobytes() for each in harness.gather(value)}) > 1
