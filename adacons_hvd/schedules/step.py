"""The step: what happens between backward and the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..aggregators import Aggregator, Decision, Memory, Statistics, average_weights
from ..collectives import Collectives
from ..ops import Plain, Tensor, as_plain, ops_for
from .base import Bucket, Combination, Share
from .sparse import SparseBucket

__all__ = ["Step"]

#: Up to how many weights Python's own numbers are faster than tensors.
FEW = 512


@dataclass
class Step:
    """Aggregates the gradients of one optimizer, between backward and its step.

    Args:
        collectives: the workers.
        aggregator: what turns statistics into weights.
        groups: how many groups of parameters there are.
        name: a prefix for the names of collectives, equal on all ranks.
        names: the names of workers in errors, where workers are not ranks.
    """

    collectives: Collectives
    aggregator: Aggregator
    groups: int
    name: str
    names: Sequence[str] = ()
    #: News that is on its way to the host.
    _news: Any = field(default=None, init=False, repr=False)
    #: :meth:`_decide` in the form that is recorded, once a framework's tensors are known.
    _recorded: Any = field(default=None, init=False, repr=False)

    @property
    def may_begin_early(self) -> bool:
        """Whether a bucket may begin before the others are filled.

        To exclude a worker whose gradient is not finite, its whole gradient must be known first.
        """
        return self.aggregator.nonfinite != "exclude"

    def run(
        self,
        buckets: Sequence[Bucket],
        memory: Memory,
        unscale: Tensor | float = 1.0,
        here: bool | None = None,
    ) -> tuple[Decision, Statistics]:
        """Aggregate. Afterwards every bucket holds its part of the result.

        ``unscale`` is what the gradients have to be multiplied by to be true gradients, where a
        loss scale is in force; the result is scaled just as they are. ``here`` is given where
        workers may run out of data at different times, on all of them alike: False on one that has
        none left and brings zeros, to keep the others company.
        """
        self._refuse_sparse(buckets)
        takes_part = self._take_part(buckets, here)
        for bucket in buckets:
            if not bucket.begun:
                bucket.memory, bucket.unscale = memory, unscale
                bucket.begin()
        reference = buckets[0].reference
        plain = self._is_plain(reference)
        table, present = self._table(buckets, takes_part, plain)
        if plain:
            memory = {name: as_plain(value) for name, value in memory.items()}
            factor = unscale if isinstance(unscale, float) else as_plain(unscale)
            decision, statistics = self._decide(table, present, factor, memory)
        else:
            decision, statistics = self._decided(table, present, unscale, memory)
        if decision.news is not None:
            self._tell(decision.news)
        combination = self._combination(decision, statistics.present, unscale, reference)
        for bucket in buckets:
            bucket.combine(combination)
        for bucket in buckets:
            bucket.finish()
            bucket.memory, bucket.unscale = decision.memory, unscale
        return decision, statistics

    def _decided(
        self, table: Tensor, present: Tensor, unscale: Tensor | float, memory: Memory
    ) -> tuple[Decision, Statistics]:
        """Decide by operations that were recorded, where the aggregator allows it and the framework can."""
        aggregator = self.aggregator
        if not aggregator.is_pure or aggregator.nonfinite == "raise":
            return self._decide(table, present, unscale, memory)
        if self._recorded is None:
            self._recorded = ops_for(table).recorded(self._decide)
        found: tuple[Decision, Statistics] = self._recorded(aggregator.identity, table, present, unscale, memory)
        return found

    def _decide(
        self, table: Tensor, present: Tensor, unscale: Tensor | float, memory: Memory
    ) -> tuple[Decision, Statistics]:
        """From the table of inner products to weights."""
        statistics = Statistics.read(table, present, self.aggregator.needs_gramian, self.aggregator.history)
        if not (isinstance(unscale, float) and unscale == 1.0):
            statistics = statistics.scaled(unscale)
        if self.aggregator.nonfinite == "raise":
            self._refuse_nonfinite(statistics)
        decision = self.aggregator.decide(statistics, memory)
        # Those that the aggregator left out are no part of the mean that a history keeps, and absent in the report.
        return decision, replace(statistics, present=decision.present)

    def _tell(self, news: Tensor) -> None:
        """Let the aggregator tell its news; a step later where a device would have to be waited for."""
        ops, first = ops_for(news), self.collectives.rank == 0
        if isinstance(news, Plain) or ops.on_host(news):
            self.aggregator.tell(ops.to_list(news), first)
            return
        before, self._news = self._news, ops.on_its_way(news)
        if before is not None:
            self.aggregator.tell(before(), first)

    def _is_plain(self, reference: Tensor) -> bool:
        """Whether statistics are to be read, and weights computed on Python's numbers; alike on all workers."""
        aggregator = self.aggregator
        few = self.groups * self.collectives.size <= FEW
        by_weights = not (aggregator.history or aggregator.elementwise)
        return few and aggregator.is_portable and by_weights and ops_for(reference).on_host(reference)

    def _combination(
        self, decision: Decision, present: Tensor, unscale: Tensor | float, reference: Tensor
    ) -> Combination:
        aggregator = self.aggregator
        weights = ops_for(reference).beside(decision.weights, reference)
        if aggregator.elementwise:
            return Combination(weights, elements=self._by_elements(decision, present))
        if not aggregator.history:
            return Combination(weights)
        assert decision.past_weights is not None
        # The mean gradients kept are true ones, whatever the loss scale was when they came.
        weights = ops_for(weights).join([weights, decision.past_weights / unscale], -1)
        return Combination(weights, average_weights(present) * unscale, decision.slot)

    def _by_elements(self, decision: Decision, present: Tensor) -> Callable[[Tensor, int], Tensor]:
        """The combined elements of a group; their average where the aggregator has no answer."""

        def elements(rows: Tensor, group: int) -> Tensor:
            ops = ops_for(rows)
            average = ops.combine(decision.weights[group], rows)
            return ops.where(decision.fallback[group], average, self.aggregator.combine(rows, present[group]))

        return elements

    def _refuse_sparse(self, buckets: Sequence[Bucket]) -> None:
        """Refuse sparse gradients where there must be a row of each worker for the same elements."""
        if self.aggregator.history or self.aggregator.elementwise:
            sparse = [bucket.name for bucket in buckets if isinstance(bucket, SparseBucket)]
            if sparse:
                raise NotImplementedError(
                    f"{self.aggregator!r} needs {self.aggregator.needs}, which sparse gradients do not have; make them "
                    "dense: with sparse_as_dense=True, or Embedding(sparse=False) in PyTorch"
                )

    def _take_part(self, buckets: Sequence[Bucket], here: bool | None) -> Tensor | None:
        """Whether this worker does; None if all workers surely do."""
        if here is not None and (not here or self.may_begin_early):
            reference = buckets[0].reference
            return ops_for(reference).like([here], reference)[0] == 1
        if self.may_begin_early:
            return None
        squares = [bucket.square() for bucket in buckets]
        ops = ops_for(squares[0])
        finite = ops.isfinite(ops.add_n(squares))
        for bucket in buckets:
            bucket.blank_unless(finite)
        return finite

    def _table(self, buckets: Sequence[Bucket], takes_part: Tensor | None, plain: bool) -> tuple[Tensor, Tensor]:
        """The inner products of all workers' gradients for every group, and who takes part."""
        gramian = self.aggregator.needs_gramian
        workers, rank = self.collectives.size, self.collectives.rank
        history = self.aggregator.history
        width = (workers if gramian else 2) + history
        reference = buckets[0].reference
        shares = [(share, bucket) for bucket in buckets for share in bucket.shares(gramian)]

        def read(tensor: Tensor) -> Tensor:
            return as_plain(tensor) if plain else tensor

        like = Plain([[0.0]], (1,)) if plain else reference
        ops = ops_for(like)
        if takes_part is None and all(bucket.complete for bucket in buckets):
            tables = [Share(share.group, read(share.table)) for share, _ in shares]
            table = self._by_group(tables, (workers, width), like)
            return table, ops.booleans((self.groups, workers), True, table)

        # What every worker knows in full must be counted once: each gives its own row of it.
        known = [Share(s.group, read(s.table[rank] if b.complete else s.table)) for s, b in shares]
        rows = [share for share in known if len(ops.shape(share.table)) == 1]
        parts = [share for share in known if len(ops.shape(share.table)) == 2]
        table = ops.in_row(self._by_group(rows, (width,), like), rank, workers)
        if parts:
            table = table + self._by_group(parts, (workers, width), like)
        here = ops.zeros((1,), like) + (1 if takes_part is None else ops.wide(read(takes_part)))

        # A worker that has left with hvd.join() adds zeros to this sum, so it is seen as absent.
        message = ops.concat([ops.reshape(table, (-1,)), ops.reshape(ops.in_row(here, rank, workers), (-1,))])
        message = ops_for(reference).beside(message, reference)
        direct, name = self.collectives.direct, f"{self.name}.table"
        if direct is not None and direct.prepare(message, name):
            message = direct.sum(message, name)
        else:
            message = self.collectives.allreduce(message, name, out=message).wait()
        table = ops.reshape(read(message[:-workers]), (self.groups, workers, width))
        present = ops.zeros((self.groups, workers), table) + read(message[-workers:]) > 0
        return table, present

    def _by_group(self, shares: Sequence[Share], shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Add up shares: ``[groups, *shape]``."""
        ops = ops_for(like)
        nothing = ops.zeros(shape, like)
        tables: list[Tensor] = [nothing] * self.groups
        for group, table in shares:
            known = tables[group]
            tables[group] = table if known is nothing else known + table
        return ops.reshape(ops.stack(tables), (self.groups, *shape))

    def _refuse_nonfinite(self, statistics: Statistics) -> None:
        ops = ops_for(statistics.squares)
        finite = ops.to_list(ops.isfinite(statistics.squares))
        names: Sequence[int | str] = self.names or range(self.collectives.size)
        self.aggregator.refuse([name for i, name in enumerate(names) if not all(group[i] for group in finite)])
