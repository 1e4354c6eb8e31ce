"""The flags: the message of every rank to all others before anything else is sent.

One small sum makes sure that all ranks still follow the same layout. It depends on nothing, so it is over before
backward is. Should one rank have changed what it trains and the others not, this is where all find out. The same sum
tells who has left with ``hvd.join()``, how many steps each rank remembers, and every so many steps a digest of the
variables. What a rank finds in the flags, Python's functions say in words; see :mod:`.errors`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import tensorflow as tf
from horovod.tensorflow import mpi_ops

from .. import agreement
from ..agreement import by_ranks
from ..collectives.horovod_tensorflow import HorovodTensorFlow
from ..engine.replicas import compare_replicas, raise_stray_step, stray_step
from ..engine.settings import Settings
from ..ops.tensorflow import digest
from ..ops.tensorflow_graphs import make_graph
from . import errors

if TYPE_CHECKING:
    from .layout import Layout

__all__ = ["Exchange", "Flags", "digests_of"]


class Flags(NamedTuple):
    """One rank's row of the table that is summed, all zeros if it has joined; and, of the sum, the columns."""

    here: Any = 1
    #: Whether this rank lays out its parameters, and waits for the others to do so.
    new_layout: Any = 0
    #: How many steps its aggregator remembers.
    steps: Any = 0
    #: And how many steps' mean gradients it has kept, if it keeps any.
    kept: Any = 0
    #: The digest of its layout's description.
    layout: Any = 0
    #: How many steps it has taken since ranks laid out together.
    count: Any = 0
    #: The digest of its variables, 0 in a step in which they are not compared.
    replicas: Any = 0
    #: Whether it took a step along gradients that were never aggregated.
    stray: Any = 0


class Exchange:
    """Exchanges flags between the ranks of one reducer, and raises errors on all of them alike."""

    def __init__(self, settings: Settings, collectives: HorovodTensorFlow, name: str) -> None:
        self._aggregator = settings.aggregator
        self._process_set = settings.process_set
        self._collectives = collectives
        self._name = name

    # --- in the graph of every step ---

    def agreed(self, layout: Layout, digests: tf.Tensor) -> Flags:
        """The flags of all ranks, in columns. The graph fails here, on every rank alike, unless all do the same."""
        table = self._table(layout, digests)
        with tf.control_dependencies([self._same_layout(layout, table)]):
            # Nothing is sent before ranks know that they send the same, and nothing learnt from
            # the flags either: a rank that changes what it trains remembers no steps.
            table = tf.identity(table)
        with tf.control_dependencies([self._equal_replicas(layout, table, digests)]):
            return Flags(*tf.unstack(table, axis=1))

    def _table(self, layout: Layout, digests: tf.Tensor) -> tf.Tensor:
        """Every rank's row of the flags; zeros for those that have joined."""
        mine = Flags(
            steps=tf.cast(tf.reduce_max(layout.memory["steps"]), tf.int64) if layout.memory else 0,
            kept=tf.cast(tf.reduce_max(layout.past.variables["kept"]), tf.int64) if layout.past else 0,
            layout=layout.digest,
            count=layout.count.read_value(),
            replicas=tf.reduce_sum(digests),
        )
        row = tf.stack([tf.cast(value, tf.int64) for value in mine])
        return self._sum(layout.here.read_value()[:, None] * row, "flags")

    def _same_layout(self, layout: Layout, table: tf.Tensor) -> tf.Tensor:
        """Fail unless all ranks are about to do the same."""
        needs = "" if self._aggregator is None else self._aggregator.needs
        flags = Flags(*tf.unstack(table, axis=1))
        here = flags.here == 1
        fine = ~here | ((flags.new_layout == 0) & (flags.stray == 0) & (flags.layout == layout.digest))
        if needs:
            fine &= here
        return errors.check(
            ~tf.reduce_all(fine),
            _refuse_disagreement,
            lambda: [table, tf.constant(layout.digest, tf.int64), repr(self._aggregator), needs],
        )

    def _equal_replicas(self, layout: Layout, table: tf.Tensor, digests: tf.Tensor) -> tf.Tensor:
        """Fail if ranks have compared their variables and these differ."""
        flags = Flags(*tf.unstack(table, axis=1))
        mine = Flags(*tf.unstack(table[self._collectives.rank]))
        here = flags.here == 1
        # Where a rank is back that had joined, some ranks may compare in this step and others not.
        together = tf.reduce_all(~here | (flags.count == mine.count))
        differ = together & tf.reduce_any(here & (flags.replicas != mine.replicas))

        def everyone() -> list[tf.Tensor]:
            names = tf.constant(_distinct([layout.slots[i].name for i in layout.compared]))
            rows = self._sum(layout.here.read_value()[:, None] * digests, "replicas")
            return [rows, here, names, mine.count]

        return errors.check(differ, _refuse_drifted, everyone)

    def _sum(self, table: tf.Tensor, what: str) -> tf.Tensor:
        """The sum of all ranks' tables."""
        total = mpi_ops._allreduce(
            table,
            name=f"{self._name}.{what}",
            op=mpi_ops.Sum,
            ignore_name_scope=True,
            process_set=self._process_set,
        )
        return tf.ensure_shape(total, table.shape)

    # --- from eager code ---

    def meet(self, layout: int) -> None:
        """Tell the other ranks that this one lays out anew, and make sure that they do, too."""
        seen = self._tell(Flags(new_layout=1, layout=layout))
        _refuse_stray(seen)
        gone = [rank for rank, here in enumerate(seen.here) if not here]
        if gone:
            raise RuntimeError(f"{by_ranks(gone)} called hvd.join(); new parameters cannot be agreed on without them")
        settled = [rank for rank, new in enumerate(seen.new_layout) if not new]
        if settled:
            raise agreement.DisagreementError(
                f"this rank trains other parameters than in the step before, but {by_ranks(settled)} did "
                "not change them. Every rank must freeze, unfreeze and recompile at the same step."
            )

    def stray(self, how: str) -> NoReturn:
        """Tell all ranks that this one took a step along gradients that were never aggregated, and raise the error.

        The others get the same error in their step or while they lay out.
        """

        def tell() -> NoReturn:
            raise stray_step(_ranks_of(self._tell(Flags(stray=1)).stray), how)

        raise_stray_step(tell, self._collectives.rank, how)

    def _tell(self, mine: Flags) -> Flags:
        """Tell the other ranks something at once; what all of them told, in columns."""
        table = [list(Flags(here=0))] * self._collectives.size
        table[self._collectives.rank] = list(mine)
        graph = make_graph(lambda table: self._sum(table, "flags"), tf.TensorSpec((len(table), len(mine)), tf.int64))
        return Flags(*graph(tf.constant(table, tf.int64)).numpy().T.tolist())


def digests_of(variables: Sequence[Any]) -> tf.Tensor:
    """One digest for each variable."""
    return tf.stack([digest([variable]) for variable in variables])


def _refuse_stray(flags: Flags) -> None:
    stray = _ranks_of(flags.stray)
    if stray:
        raise stray_step(stray, "the error on that rank says how")


def _refuse_disagreement(table: list[list[int]], layout: int, aggregator: str, needs: str) -> None:
    flags = Flags(*zip(*table, strict=True))
    _refuse_stray(flags)
    changed = [
        rank
        for rank, row in enumerate(map(Flags._make, table))
        if row.here and (row.new_layout or row.layout != layout)
    ]
    if changed:
        raise agreement.DisagreementError(
            f"ranks no longer train the same parameters: {by_ranks(changed)} changed them and this rank did not. "
            "Every rank must freeze, unfreeze and recompile at the same step."
        )
    gone = [rank for rank, here in enumerate(flags.here) if not here]
    raise RuntimeError(
        f"{aggregator} needs {needs}, which cannot be had once a rank has called hvd.join(), and {by_ranks(gone)} did"
    )


def _refuse_drifted(digests: list[list[int]], here: list[bool], names: list[str], count: int) -> None:
    compare_replicas({rank: row for rank, row in enumerate(digests) if here[rank]}, names, count + 1)


def _ranks_of(column: Sequence[int]) -> list[int]:
    return [rank for rank, value in enumerate(column) if value]


def _distinct(names: Sequence[str]) -> list[str]:
    """Names that tell variables apart, also where several were given none."""
    often = Counter(names)
    return [f"{name} (number {i})" if often[name] > 1 else name for i, name in enumerate(names)]
