"""A report on one step.

A report holds the tensors the step computed anyway, wherever they are. Nothing is copied, awaited
or computed until an attribute is read, and reading is the only thing that moves data to the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .aggregators import Decision, Statistics
from .costs import Choice
from .ops import ops_for

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
        return {name: _rows(stage) for name, stage in self.decision.stages.items()}

    @property
    def past_weights(self) -> Numbers:
        """What the mean gradients of earlier steps were multiplied by; empty without a history."""
        return [] if self.decision.past_weights is None else _rows(self.decision.past_weights)

    @property
    def norms(self) -> Numbers:
        """The length of each worker's gradient."""
        return _rows(self.statistics.norms)

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
        """Which workers took part; the others had joined or were excluded."""
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
            "weights": self.weights,
            "past_weights": self.past_weights,
            "history_bytes": self.history_bytes,
            "norms": self.norms,
            "present": self.present,
            "coefficients": self.coefficients,
        }

    def __str__(self) -> str:
        return f"step {self.steps} by {self.schedule}: spread {max(self.spread):.3g}, {self.fallbacks} fallbacks so far"


def _rows(tensor: Any) -> list[list[Any]]:
    ops = ops_for(tensor)
    values = ops.to_list(tensor)
    return [values] if len(ops.shape(tensor)) == 1 else values
