"""Any aggregator, with moving averages of its gradients' noise and signal beside it."""

from __future__ import annotations

from dataclasses import replace

from ..aggregators import Aggregator, Decision, Memory, Statistics
from ..aggregators.base import count_present
from ..ops import Tensor, ops_for
from .formulas import noise_and_signal

__all__ = ["MovingAverages"]


class MovingAverages(Aggregator):
    """An aggregator that keeps moving averages of the gradients' noise and signal, and changes nothing else.

    With it, ``report.noise_scale`` and ``report.adascale_gain`` are ratios of averages over many steps. Without it they
    are of one step alone, which for the noise scale is too rough to act on. The averages are a part of the
    aggregator's memory: the same on every rank, saved in checkpoints, kept when the number of workers changes.
    A step with a gradient that is not finite, or of fewer than two workers, leaves them as they were.

    Args:
        aggregator: the aggregator that decides.
        averaging: how much of the averages each step keeps, in [0, 1). They are over about ``1 / (1 - averaging)``
            steps.

    >>> import torch
    >>> from adacons_hvd import Mean
    >>> MovingAverages(Mean())(torch.tensor([[3.0, 1.0], [3.0, -1.0]]))
    tensor([3., 0.])
    """

    pure = True

    def __init__(self, aggregator: Aggregator, averaging: float = 0.99) -> None:
        if not isinstance(aggregator, Aggregator):
            raise TypeError(f"aggregator must be an Aggregator such as AdaCons(), got {aggregator!r}")
        if isinstance(aggregator, MovingAverages):
            raise TypeError(f"{aggregator!r} keeps averages already; give {type(self).__name__} what is inside it")
        if isinstance(averaging, bool) or not isinstance(averaging, (int, float)) or not 0 <= averaging < 1:
            raise ValueError(f"averaging must be at least 0 and below 1, got {averaging!r}")
        self.aggregator = aggregator
        self.averaging = float(averaging)

    # --- what the aggregator inside is -------------------------------------------------------------

    @property
    def needs_gramian(self) -> bool:  # type: ignore[override]
        return self.aggregator.needs_gramian

    @property
    def history(self) -> int:  # type: ignore[override]
        return self.aggregator.history

    @property
    def nonfinite(self) -> str:  # type: ignore[override]
        return self.aggregator.nonfinite

    @property
    def is_portable(self) -> bool:
        return self.aggregator.is_portable

    @property
    def is_pure(self) -> bool:
        return super().is_pure and self.aggregator.is_pure

    @property
    def elementwise(self) -> bool:
        return self.aggregator.elementwise

    def combine(self, rows: Tensor, present: Tensor) -> Tensor:
        return self.aggregator.combine(rows, present)

    # --- its memory, and ours ----------------------------------------------------------------------

    def _ours(self, statistics: Statistics) -> Memory:
        """What this class remembers, at the beginning."""
        ops = ops_for(statistics.squares)
        zero = ops.zeros((*ops.shape(statistics.squares)[:-1], 1), statistics.squares)
        return {"noise": zero, "signal": zero}

    def start(self, statistics: Statistics) -> Memory:
        theirs, ours = self.aggregator.start(statistics), self._ours(statistics)
        taken = sorted(theirs.keys() & ours.keys())
        if taken:
            raise ValueError(f"{self.aggregator!r} and {type(self).__name__} both remember something named {taken}")
        return {**theirs, **ours}

    def decide(self, statistics: Statistics, memory: Memory) -> Decision:
        if memory and "noise" not in memory:
            # What the aggregator inside has left, in a checkpoint or with other workers.
            memory = {**self.started(statistics), **memory}
        return super().decide(statistics, memory)

    def weigh(self, statistics: Statistics, memory: Memory) -> Decision:
        ops = ops_for(statistics.squares)
        several = count_present(statistics.present) > 1
        averages: Memory = {}
        for name, found in zip(("noise", "signal"), noise_and_signal(statistics), strict=True):
            moved = self.averaging * memory[name] + (1 - self.averaging) * found
            averages[name] = ops.where(several, moved, memory[name])
        theirs = {name: value for name, value in memory.items() if name not in averages}
        decision = self.aggregator.weigh(statistics, theirs)
        return replace(decision, memory={**decision.memory, **averages})

    def resize(self, memory: Memory, workers: int) -> Memory:
        averages: Memory = {name: memory[name] for name in ("noise", "signal") if name in memory}
        theirs = {name: value for name, value in memory.items() if name not in averages}
        resized = self.aggregator.resize(theirs, workers) if theirs else {}
        return {**resized, **averages} if resized or not theirs else {}
