"""A report on one step.

A report holds the tensors the step computed anyway, wherever they are. Nothing is copied, awaited
or computed until an attribute is read, and reading is the only thing that moves data to the host.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .aggregators import Decision, Statistics
from .aggregators.base import count_present
from .costs import Choice
from .insight import formulas
from .ops import Tensor, ops_for

__all__ = ["Report"]

Numbers = list[list[float]]


@dataclass(frozen=True)
class Report:
    """The last step of an optimizer. Lists have one row per group and one entry per worker.

    >>> import torch
    >>> from adacons_hvd import Mean
    >>> from adacons_hvd.costs import Choice
    >>> aggregator = Mean()
    >>> gradients = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    >>> decision, _ = aggregator.explain(gradients)
    >>> report = Report(decision, Statistics.of(gradients), Choice("gather", "two workers"))
    >>> report.weights, report.norms, report.fell_back
    ([[0.5, 0.5]], [[5.0, 1.0]], [False])
    """

    decision: Decision
    statistics: Statistics
    choice: Choice
    #: The bytes that this rank keeps of earlier steps' mean gradients, for an aggregator with a history.
    history_bytes: int = 0

    @property
    def schedule(self) -> str:
        """Which schedule moved the gradients."""
        return self.choice.schedule

    @property
    def reason(self) -> str:
        """Why that one."""
        return self.choice.reason

    @property
    def weights(self) -> Numbers:
        """``gamma``: what each worker's gradient was multiplied by."""
        return _rows(self.decision.weights)

    @property
    def coefficients(self) -> dict[str, Numbers]:
        """The aggregator's intermediate results by name; for AdaCons its coefficients ``alpha``
        as first computed, after momentum and after normalization (the paper's Figure 7)."""
        return {name: _rows(stage) for name, stage in self.decision.stages.items() if name != "agreement"}

    @property
    def past_weights(self) -> Numbers:
        """What the mean gradients of earlier steps were multiplied by; empty without a history."""
        return [] if self.decision.past_weights is None else _rows(self.decision.past_weights)

    @property
    def norms(self) -> Numbers:
        """The length of each worker's gradient."""
        return _rows(self.statistics.norms)

    @property
    def agreement(self) -> Numbers:
        """The cosine between each worker's gradient and the sum of the others'; 0 for one that is absent or zero.

        With :class:`~adacons_hvd.insight.SickWorkers`, it is that of the whole gradient in each group, and where its
        policy is ``"exclude"``, sick workers are not among the others.
        """
        judged = self.decision.stages.get("agreement")
        return _rows(formulas.agreement(self.statistics) if judged is None else judged)

    @property
    def noise_scale(self) -> list[float]:
        """Each group's gradient noise scale, in batches of one worker; multiplied by the batch it is in examples.

        It is the variance of one worker's gradient over the squared length of the true gradient. Much more workers
        than that are of little use. With :mod:`adacons_hvd.insight` it is the ratio of moving averages, and without it
        of one step's numbers, which is rough. Infinite where no signal was seen above the noise.
        """
        return [_ratio(noise, signal) for noise, signal in self._noise_and_signal()]

    @property
    def adascale_gain(self) -> list[float]:
        """Each group's gain of AdaScale: a step of these workers is worth so many steps of one, from 1 to N.

        It is made of the same numbers as :attr:`noise_scale`.
        """
        counts = _rows(count_present(self.statistics.present))
        gains = []
        for (noise, signal), (count,) in zip(self._noise_and_signal(), counts, strict=True):
            signal = max(signal, 0.0)
            gains.append(_ratio(noise + signal, noise / count + signal))
        return gains

    @property
    def sick(self) -> list[int]:
        """The workers that look sick; empty without :class:`~adacons_hvd.insight.SickWorkers`."""
        sick = self.decision.memory.get("sick")
        if sick is None:
            return []
        return [rank for rank in range(len(_rows(sick)[0])) if any(row[rank] for row in _rows(sick))]

    def _noise_and_signal(self) -> list[tuple[float, float]]:
        memory = self.decision.memory
        both: tuple[Tensor, Tensor]
        both = (memory["noise"], memory["signal"]) if "noise" in memory else formulas.noise_and_signal(self.statistics)
        noise, signal = map(_rows, both)
        return [(n[0], s[0]) for n, s in zip(noise, signal, strict=True)]

    @property
    def spread(self) -> list[float]:
        """Standard deviation over mean of each group's contributions ``gamma_i n_i``.

        0 means that every worker counted the same, as in an average of gradients of equal length:
        the aggregator makes no difference.
        """
        spreads = []
        for weights, norms, present in zip(self.weights, self.norms, self.present, strict=True):
            parts = [w * n for w, n, here in zip(weights, norms, present, strict=True) if here]
            mean = sum(parts) / max(len(parts), 1)
            variance = sum((part - mean) ** 2 for part in parts) / max(len(parts), 1)
            spreads.append(variance**0.5 / abs(mean) if mean else 0.0)
        return spreads

    @property
    def present(self) -> list[list[bool]]:
        """Which workers counted; the others had joined or were excluded."""
        return _rows(self.statistics.present)

    @property
    def fell_back(self) -> list[bool]:
        """Whether a group was averaged because the aggregator had no answer."""
        return [row[0] for row in _rows(self.decision.fallback)]

    @property
    def steps(self) -> int:
        """How many steps this optimizer has aggregated."""
        return int(_rows(self.decision.memory["steps"])[0][0])

    @property
    def fallbacks(self) -> int:
        """How many of them fell back to the average, in the group where most did."""
        return int(max(row[0] for row in _rows(self.decision.memory["fallbacks"])))

    def as_dict(self) -> dict[str, Any]:
        """Everything above as plain numbers, ready for JSON."""
        return {
            "steps": self.steps,
            "fallbacks": self.fallbacks,
            "fell_back": self.fell_back,
            "schedule": self.schedule,
            "reason": self.reason,
            "spread": self.spread,
            "noise_scale": self.noise_scale,
            "adascale_gain": self.adascale_gain,
            "agreement": self.agreement,
            "sick": self.sick,
            "weights": self.weights,
            "past_weights": self.past_weights,
            "history_bytes": self.history_bytes,
            "norms": self.norms,
            "present": self.present,
            "coefficients": self.coefficients,
        }

    def __str__(self) -> str:
        return f"step {self.steps} by {self.schedule}: spread {max(self.spread):.3g}, {self.fallbacks} fallbacks so far"


def _ratio(x: float, y: float) -> float:
    """``x / y``; infinite where only ``y`` is not above zero, and not a number where both are not."""
    return x / y if y > 0 else math.inf if x > 0 else math.nan


def _rows(tensor: Any) -> list[list[Any]]:
    ops = ops_for(tensor)
    values = ops.to_list(tensor)
    return [values] if len(ops.shape(tensor)) == 1 else values
