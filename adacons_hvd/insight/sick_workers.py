"""Naming the workers whose gradients have gone bad, and leaving them out.

Each step compares every worker with the others by two numbers: its agreement, the cosine between its gradient and the
sum of the others', and its length. How far a worker is from the median of all is measured in units of the usual
distance, and averaged over some steps. A worker whose average leaves the threshold is sick until it is well inside
again. All of it is computed from numbers that are equal on all ranks, by the same operations, so all decide alike.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..aggregators import Aggregator, Decision, Memory, Statistics
from ..aggregators.base import count_present, one_of
from ..ops import Tensor, ops_for
from .averages import MovingAverages
from .formulas import agreement, cosine

__all__ = ["SickWorker", "SickWorkers"]

#: Distances from the median count at most this many of the usual ones, so that no single step decides.
MOST = 5.0

#: The usual distances are taken to be at least this: of cosines, and of lengths relative to their median.
LEAST_AGREEMENT, LEAST_LENGTH = 0.01, 0.05

#: The usual distance is averaged over this many steps.
USUAL_STEPS = 100

#: The standard deviation of normally distributed numbers, in units of their median distance from the median.
DEVIATION = 1.4826

#: How many healthy workers it takes to say which one is not.
FEWEST = 3

POLICIES = ("warn", "exclude", "raise")


@dataclass(frozen=True)
class SickWorker:
    """News of one worker: it looks sick, or has recovered."""

    #: Its place among the workers: Horovod's rank in the process set, or that of the process group.
    rank: int
    #: The step in which its numbers began to be suspicious, and this one.
    since: int
    step: int
    #: The cosine between its gradient and the sum of the others' in this step, and the median of all.
    agreement: float
    usual_agreement: float
    #: The length of its gradient, as a multiple of the median length.
    relative_length: float
    #: Whether its gradient is left out from now on.
    excluded: bool
    #: Whether it was sick, and is no more.
    recovered: bool

    def __str__(self) -> str:
        now = (
            f"in step {self.step} its gradient agrees with the others' by {self.agreement:.2f} (median "
            f"{self.usual_agreement:.2f}) and has {self.relative_length:.3g} times the median length"
        )
        if self.recovered:
            return f"rank {self.rank}, sick since step {self.since}, has recovered: {now}"
        left_out = "; its gradient is left out until it has recovered" if self.excluded else ""
        return (
            f"rank {self.rank} looks sick since step {self.since}: {now}{left_out}. Look at its data and its hardware"
        )


class SickWorkers(MovingAverages):
    """An aggregator that names the workers whose gradients have gone bad, and may leave them out.

    A worker is named once, when its agreement with the others is too low or its length unlike theirs for several steps,
    and once more when it has recovered. It takes three healthy workers to tell which one is not. It does not find small
    silent corruption; ``docs/sick-workers.md`` has what it finds and how often it is wrong.

    What it remembers is a part of the aggregator's memory: the same on every rank and saved in checkpoints. With
    another number of workers it begins afresh, because they are other workers.

    Args:
        aggregator: the aggregator that decides.
        policy: ``"warn"`` warns, on the first worker. ``"exclude"`` does, and treats the sick worker as absent until it
            has recovered, as long as the sick are a minority; for that it needs the Gramian of all gradients, which
            not every schedule has. ``"raise"`` raises an error on every worker.
        callback: a function that is called with each :class:`SickWorker`, on every worker, in place of the warning.
        threshold: how far from the median is sick, in units of the usual distance. A lower one finds more and is wrong
            more often.
        steps: about how many steps a worker is judged by. More of them find smaller faults, later.
        averaging: see :class:`MovingAverages`.

    >>> import torch
    >>> from adacons_hvd import AdaCons
    >>> aggregator = SickWorkers(AdaCons(), policy="exclude", callback=lambda worker: print(worker.rank, worker.since))
    >>> gradients = torch.tensor([[1.0, 0.1], [1.0, -0.1], [1.0, 0.0], [-1.0, 0.0]])
    >>> for step in range(30):
    ...     aggregated = aggregator(gradients)
    3 4
    >>> decision, _ = aggregator.explain(gradients)
    >>> decision.weights[3].item()
    0.0
    """

    pure = True

    def __init__(
        self,
        aggregator: Aggregator,
        policy: str = "warn",
        callback: Callable[[SickWorker], None] | None = None,
        threshold: float = 2.5,
        steps: int = 10,
        averaging: float = 0.99,
    ) -> None:
        super().__init__(aggregator, averaging)
        if callback is not None and not callable(callback):
            raise TypeError(f"callback must be a function of a SickWorker, got {callback!r}")
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 < threshold < MOST:
            raise ValueError(f"threshold must be between 0 and {MOST:g}, got {threshold!r}")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be a positive whole number, got {steps!r}")
        self.policy = one_of("policy", policy, POLICIES)
        self.threshold = float(threshold)
        self.steps = steps
        self._callback = callback

    @property
    def needs_gramian(self) -> bool:  # type: ignore[override]
        return self.policy == "exclude" or self.aggregator.needs_gramian

    @property
    def is_portable(self) -> bool:
        return self.aggregator.is_portable and not self.needs_gramian

    def combine(self, rows: Tensor, present: Tensor) -> Tensor:
        ops = ops_for(rows)
        return self.aggregator.combine(ops.where(present[:, None], rows, ops.zeros_like(rows)), present)

    def _ours(self, statistics: Statistics) -> Memory:
        ops = ops_for(statistics.squares)
        each, one = ops.zeros_like(statistics.squares), super()._ours(statistics)["noise"]
        return {
            **super()._ours(statistics),
            **dict.fromkeys(_OF_WORKERS, each),
            **dict.fromkeys(_OF_ALL, one),
        }

    def resize(self, memory: Memory, workers: int) -> Memory:
        return super().resize({k: v for k, v in memory.items() if k not in (*_OF_WORKERS, *_OF_ALL)}, workers)

    def decide(self, statistics: Statistics, memory: Memory) -> Decision:
        ops = ops_for(statistics.squares)
        if "noise" not in memory or "sick" not in memory:
            memory = {**self.started(statistics), **memory}
        ours = {name: ops.first_row(memory[name]) for name in ("steps", *_OF_WORKERS, *_OF_ALL)}
        found = self._judge(_whole(statistics), ours)
        inside = statistics
        if self.needs_gramian:
            inside = _without(statistics, found.excluded, self.aggregator.needs_gramian)
        theirs = {name: value for name, value in memory.items() if name not in (*_OF_WORKERS, *_OF_ALL)}
        decision = super().decide(inside, theirs)
        each = ops.zeros_like(statistics.squares)
        alone = ops.zeros_like(memory["judged"])
        return replace(
            decision,
            memory={
                **decision.memory,
                **{name: each + found.memory[name] for name in _OF_WORKERS},
                **{name: alone + found.memory[name] for name in _OF_ALL},
            },
            stages={**decision.stages, "agreement": each + found.agreement},
            news=found.news,
        )

    def _judge(self, s: Statistics, ours: Memory) -> _Judgement:
        """Judge all workers by the inner products of their whole gradients."""
        ops = ops_for(s.squares)
        zero, none = ops.zeros_like(s.squares), ops.zeros_like(ours["judged"])
        finite = ops.every(ops.isfinite(s.dots) & ops.isfinite(s.squares))
        was_sick = ours["sick"] > 0
        healthy = s.present & ~was_sick
        count = ops.total(ops.wide(healthy))
        evidence = finite & (count >= FEWEST - 1)

        # What this step says of each worker: how far it is from the median, in units of the usual distance.
        squares = ops.where(finite, s.squares, zero)
        agreeing = ops.where(finite, _agreement(s, healthy), zero)
        usual = _median(agreeing, healthy)
        behind = agreeing - usual
        norms = ops.sqrt(squares)
        middle = _median(norms, healthy)
        both = norms + middle
        # About log(norm / middle), but it knows what to do with zero.
        apart = ops.where(both > 0, 2 * (norms - middle) / ops.where(both > 0, both, 1 + zero), zero)
        judged = ours["judged"] + ops.wide(evidence)
        newest = ops.where(judged < USUAL_STEPS, 1 / ops.where(judged > 0, judged, 1 + none), none + 1 / USUAL_STEPS)
        memory: Memory = {"judged": judged}
        scores = {}
        for name, distance, least in (("agreement", behind, LEAST_AGREEMENT), ("length", apart, LEAST_LENGTH)):
            spread = DEVIATION * _median(ops.absolute(distance), healthy)
            before = ours[f"{name}_spread"]
            spread = ops.where(evidence, before + newest * (spread - before), before)
            memory[f"{name}_spread"] = spread
            unit = ops.where(spread > least, spread, none + least)
            score = ours[f"{name}_score"]
            moved = score + (ops.clip(distance / unit, -MOST, MOST) - score) / self.steps
            scores[name] = memory[f"{name}_score"] = ops.where(evidence & s.present, moved, score)

        # Agreeing more than others is no fault.
        worse = 0.0 - scores["agreement"]
        length = ops.absolute(scores["length"])
        worst = ops.where(worse > length, worse, length)
        suspicious = worst > self.threshold / 2
        sick = (was_sick & suspicious) | ((worst > self.threshold) & (count >= FEWEST) & s.present)
        step = zero + ours["steps"] + 1
        since = ops.where(suspicious, ops.where(ours["since"] > 0, ours["since"], step), zero)
        few = 2 * ops.total(ops.wide(sick & s.present)) < count_present(s.present)
        excluded = sick & few if self.policy == "exclude" else sick & ~sick
        memory["sick"], memory["since"] = ops.wide(sick), since
        change = memory["sick"] - ours["sick"]
        began = ops.where(sick, since, ours["since"])
        relative = (2 + apart) / (2 - apart)
        news = [change, began, step, agreeing, zero + usual, relative, ops.wide(excluded)]
        return _Judgement(memory, excluded, agreeing, ops.concat(news))

    def tell(self, news: Sequence[float], first: bool) -> None:
        workers = len(news) // _NEWS
        rows = [news[start : start + workers] for start in range(0, len(news), workers)]
        found = [
            SickWorker(rank, int(since), int(step), agreement, usual, relative, bool(excluded), change < 0)
            for rank, (change, since, step, agreement, usual, relative, excluded) in enumerate(zip(*rows, strict=True))
            if change
        ]
        for worker in found:
            if self._callback is not None:
                self._callback(worker)
            elif first and self.policy != "raise":
                warnings.warn(str(worker), stacklevel=2)
        sick = [worker for worker in found if not worker.recovered]
        if sick and self.policy == "raise":
            raise RuntimeError("; ".join(map(str, sick)))

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) and self._callback == other._callback  # type: ignore[attr-defined]

    __hash__ = Aggregator.__hash__


@dataclass(frozen=True)
class _Judgement:
    memory: Memory
    #: ``[N]``, boolean.
    excluded: Tensor
    #: ``[N]``
    agreement: Tensor
    news: Tensor


#: What is remembered of each worker, and of all. It is judged by the whole gradient, so all groups have the same rows.
_OF_WORKERS = ("agreement_score", "length_score", "sick", "since")
_OF_ALL = ("judged", "agreement_spread", "length_spread")

#: How many numbers are told of each worker.
_NEWS = 7


def _whole(s: Statistics) -> Statistics:
    """The statistics of the whole gradients, which are the sums of those of their groups."""
    ops = ops_for(s.squares)
    workers = ops.shape(s.squares)[-1]

    def summed(x: Tensor, shape: tuple[int, ...]) -> Tensor:
        groups = math.prod(ops.shape(x)) // math.prod(shape)
        if groups == 1:
            return ops.reshape(x, shape)
        return ops.reshape(ops.total(ops.transposed(ops.reshape(x, (groups, -1)))), shape)

    gramian = None if s.gramian is None else summed(s.gramian, (workers, workers))
    return Statistics(summed(s.dots, (workers,)), summed(s.squares, (workers,)), ops.first_row(s.present), gramian)


def _agreement(s: Statistics, healthy: Tensor) -> Tensor:
    """Each worker's agreement with the healthy ones, or with all where there is no Gramian."""
    if s.gramian is None:
        return agreement(s)
    ops = ops_for(s.squares)
    part = ops.wide(healthy)
    dots = ops.total(s.gramian * part)[..., 0]
    return cosine(dots, s.squares, ops.total(dots * part), healthy)


def _without(s: Statistics, excluded: Tensor, gramian: bool) -> Statistics:
    """The statistics of the others, as if the excluded workers were absent."""
    ops = ops_for(s.squares)
    present = s.present & ~excluded
    table = ops.where(~excluded[:, None] & ~excluded, s.gramian, ops.zeros_like(s.gramian))
    # One that is not finite stays, because no weight, zero either, keeps it out of the result.
    squares = ops.where(excluded & ops.isfinite(s.squares), ops.zeros_like(s.squares), s.squares)
    past = None if s.past is None else ops.where(excluded[:, None], ops.zeros_like(s.past), s.past)
    dots = ops.total(table)[..., 0] / count_present(present)
    return replace(s, dots=dots, squares=squares, present=present, gramian=table if gramian else None, past=past)


def _median(x: Tensor, among: Tensor) -> Tensor:
    """The median, ``[1]``, of those of ``x``, ``[N]``, that are ``among``; of none, some number."""
    ops = ops_for(x)
    ordered = ops.take(x, ops.argsort(ops.where(among, x, ops.zeros_like(x) + float("inf"))))
    count = count_present(among)
    low, high = ops.floor((count - 1) / 2), ops.floor(count / 2)
    last = ops.shape(x)[-1] - 1
    return (ops.take(ordered, ops.clip(low, 0, last)) + ops.take(ordered, ops.clip(high, 0, last))) / 2
