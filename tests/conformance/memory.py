"""What an aggregator remembers is saved and resumed, shared, or refused, by every binding. Runs on the ranks."""

from __future__ import annotations

import hashlib
import importlib
import warnings
from dataclasses import dataclass
from typing import Any

import harness
import numpy as np
import pytest

#: What the first version kept.
FIRST_VERSION = ("version", "workers", "steps", "fallbacks", "curve", "updates")
#: How a memory is damaged, and what is said about it.
DAMAGES = {
    "of version 99, written by a later adacons_hvd": lambda m: {**m, "version": 99},
    "neither 'version' nor 'workers'": lambda m: {k: v for k, v in m.items() if k != "version"},
    "but neither 'version'": lambda m: {k: v for k, v in m.items() if k != "workers"},
    "'curve' holds NaN or infinity": lambda m: {**m, "curve": m["curve"] + np.nan},
    "'steps' holds NaN or infinity": lambda m: {**m, "steps": m["steps"] + np.inf},
}


@dataclass
class Interrupted:
    """A training that was saved after three steps, and the parameters that three more lead to."""

    binding: Any
    saved: dict[str, Any]
    expected: list[np.ndarray]

    def is_continued_by(self, training: Any, first: int = 3) -> None:
        """Let a training that is there take the rest of the steps; it must end where this one did."""
        advance(training, first, 6)
        assert training.report.steps == 6
        for value, expected in zip(training.values(), self.expected, strict=True):
            np.testing.assert_allclose(value, expected, rtol=self.binding.ROUNDING, atol=self.binding.ROUNDING)


def take_all(module: str) -> None:
    """On a rank: all that a binding must do."""
    binding = importlib.import_module(module)
    for optimizer in binding.OPTIMIZERS:
        training = binding.Training(optimizer=optimizer)
        advance(training, 0, 3)
        saved = training.save()
        advance(training, 3, 6)
        interrupted = Interrupted(binding, saved, training.values())
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            training.load(saved)
            interrupted.is_continued_by(training)
            # TensorFlow's tapes keep one memory for one set of variables, so there is one training at a time.
            del training
            training = binding.Training(optimizer=optimizer)
            training.load(saved)
            interrupted.is_continued_by(training)
    of_another_configuration(interrupted, training)
    damaged(interrupted, training)
    del training
    on_one_rank_alone(interrupted)
    of_nothing_that_fits(interrupted)


def of_another_configuration(interrupted: Interrupted, training: Any) -> None:
    """States of an earlier version and of other numbers of workers are taken up."""
    memory = {name: interrupted.saved["memory"][name] for name in FIRST_VERSION}
    training.load({**interrupted.saved, "memory": memory})
    interrupted.is_continued_by(training)

    # The sorted curve is read at as many points as there are workers.
    for curve, read in (([0.5, 1.5], [0.5, 1.0, 1.5]), ([1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 3.0, 5.0])):
        memory = {**interrupted.saved["memory"], "workers": len(curve), "curve": np.array([curve])}
        training.load({**interrupted.saved, "memory": memory})
        advance(training, 3, 4)
        assert training.report.steps == 4
        alpha = np.sort(training.report.coefficients["first-order"][0])
        found = np.sort(training.report.coefficients["momentum"][0])
        np.testing.assert_allclose(found, 0.9 * np.array(read) + 0.1 * alpha, rtol=1e-6)
        assert training.save()["memory"]["workers"] == 3


def damaged(interrupted: Interrupted, training: Any) -> None:
    """What is no memory is refused before anything has changed."""
    training.load(interrupted.saved)
    advance(training, 3, 5)
    for said, damage in DAMAGES.items():
        with pytest.raises(ValueError, match=said):
            training.load({**interrupted.saved, "memory": damage(interrupted.saved["memory"])})
    interrupted.is_continued_by(training, 5)


def of_nothing_that_fits(interrupted: Interrupted) -> None:
    """Without a memory, or with one of other groups, the aggregator begins afresh."""
    layers = "granularity" in interrupted.binding.ARGUMENTS
    training = interrupted.binding.Training(lambda parameters: {"granularity": "layer"} if layers else {})
    training.load(training.through_plain(interrupted.saved))
    advance(training, 3, 4)
    assert training.report.steps == 1
    if layers:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            training.load(interrupted.saved)
            advance(training, 3, 4)
        assert any("is for 1 groups of parameters and there are 2 now" in str(w.message) for w in caught)
        assert training.report.steps == 1


def on_one_rank_alone(interrupted: Interrupted) -> None:
    """The aggregator's part of a state is everybody's, though only one rank has loaded it."""
    training, saved = interrupted.binding.Training(), interrupted.saved
    training.load(saved if harness.rank() == 1 else training.through_plain(saved) | {"optimizer": saved["optimizer"]})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        interrupted.is_continued_by(training)
    told = [str(w.message) for w in caught if "remembers" in str(w.message)]
    assert len(told) == interrupted.binding.SAYS_WHO_LEADS, told
    assert all("([0, 3, 0] of them), so all go on from what rank 1 remembers" in text for text in told)


def advance(training: Any, first: int, stop: int) -> None:
    """Take some steps, numbered alike on all ranks, after which all must hold the same bits."""
    for step in range(first, stop):
        training.step(step)
    assert_equal_bits(training)


def assert_equal_bits(training: Any) -> None:
    bits = hashlib.sha256(b"".join(value.tobytes() for value in training.values())).hexdigest()
    assert len(set(harness.gather(bits))) == 1, "ranks hold other parameters"
