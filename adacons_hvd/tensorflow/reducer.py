"""From this worker's gradients to aggregated ones, over Horovod, eagerly or inside a graph.

Python code in a ``tf.function`` runs once, while it is traced; what it leaves behind runs every
step and knows no Python values. So the work is divided:

* **Once per layout, in Python**, even while tracing (``tf.init_scope`` leads out of the graph):
  ranks compare settings and parameters, all raise the same error if those differ, and otherwise
  agree on slots, packings and schedule. Every rank traces at its first step, so every rank is
  there. Another trace of the same parameters, for a batch of another size, finds the layout made
  and talks to nobody: ranks need not retrace together.
* **Every step, in the graph**: one small sum (``flags``) makes sure that all ranks still follow
  the same layout before anything else is sent. It depends on nothing, so it is over before backward
  is. Should one rank have changed what it trains and the others not, this is where all find out.
  What a rank finds in the flags, Python's functions say in words; see :mod:`.errors`.

Every so many steps a digest of the variables travels with the flags (``engine.replicas``). Steps are
counted from the one in which ranks laid out together, in a ``tf.Variable`` of the layout, because
each layout has variables of its own to compare. The count travels, too. Where it differs, a rank is
back that had joined, and all begin to count anew.

The same sum tells who has left with ``hvd.join()``. After that Horovod only adds, so the graph
holds a second way through the step, by sums alone, and takes it among those who are still here.

What an aggregator remembers is in ``tf.Variable`` and assigned in the graph. It must be the same on
every rank, and there are innocent ways to make it differ: a rank that left early has missed steps;
only rank 0 has restored a checkpoint. So the sum also tells how many steps each rank remembers, and
if those differ, all take up what the one with the most does. In eager mode the same graph is traced
once and called.
"""

from __future__ import annotations

import contextlib
import gc
import json
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import horovod.tensorflow as hvd
import tensorflow as tf
from horovod.tensorflow import mpi_ops
from horovod.tensorflow.mpi_ops import ProcessSet
from tensorflow.core.function.polymorphism.function_cache import FunctionCache
from tensorflow.python.ops import control_flow_util

from .. import __version__, agreement
from ..aggregators import Decision, Memory, Statistics, pack_memory, unpack_memory
from ..agreement import by_ranks
from ..collectives import host_name
from ..collectives.horovod_tensorflow import HorovodTensorFlow, make_graph, make_variable
from ..costs import Choice
from ..engine.plan import group_parameters, shared_buckets
from ..engine.replicas import compare_replicas, is_due, stray_step
from ..engine.session import ONLY_SUMS, canonical_names, choose_schedule
from ..engine.settings import check_members
from ..ops.tensorflow import digest
from ..report import Report
from ..schedules import SCHEDULES, Step
from . import errors
from .packing import Gradient, Packing, Slot, pack
from .settings import Settings, is_variable, key_of, native

__all__ = ["Reducer", "Settings", "key_of", "native"]


NO_XLA = (
    "Horovod's operations cannot be compiled by XLA, so gradients cannot be aggregated inside "
    "a tf.function with jit_compile=True. Leave jit_compile out of the function that takes the "
    "optimizer's step; functions it calls, such as the model's, may keep it."
)


#: How many seconds a rank that is about to raise a ``StrayStepError`` waits for the others to hear of it.
STRAY_SECONDS = 60


class Flags(NamedTuple):
    """What each rank tells the others before it sends anything else; all zeros if it has joined.

    A row of the table that is summed; and, of the sum, the columns.
    """

    here: Any = 1
    #: Whether this rank lays out its parameters, and waits for the others to do so.
    anew: Any = 0
    #: How many steps its aggregator remembers.
    steps: Any = 0
    #: The digest of its layout's description.
    layout: Any = 0
    #: How many steps it has taken since ranks laid out together.
    count: Any = 0
    #: The digest of its variables, 0 in a step in which they are not compared.
    replicas: Any = 0
    #: Whether it took a step along gradients that were never aggregated.
    stray: Any = 0


# How many reducers have been used on each process set. The number is part of the names of a
# reducer's collectives, so it must be the same on every rank: reducers are numbered in the order
# of their first step.
_numbers: Counter[int] = Counter()

_reducers: weakref.WeakSet[Reducer] = weakref.WeakSet()


def _take_number(process_set: ProcessSet) -> int:
    number = _numbers[process_set.process_set_id]
    _numbers[process_set.process_set_id] += 1
    return number


def start_over() -> None:
    """Agree anew and number from 0: after an elastic reset some ranks are new and know nothing yet."""
    _numbers.clear()
    for reducer in list(_reducers):
        reducer.reset()
    _forget_traces()


def _forget_traces() -> None:
    """Have every ``tf.function`` traced anew when it is called next.

    The number of workers is in many places of a graph, and scripts make their functions once,
    whoever is there. TensorFlow has no means to ask for this, but traces are all kept in objects of
    one class.
    """
    for thing in gc.get_objects():
        if type(thing) is FunctionCache:  # some objects lie about their class, or fail when asked
            thing.clear()


@dataclass
class Layout:
    """What ranks agreed on for one list of parameters."""

    slots: list[Slot]
    #: Indices of slots for which some rank had a gradient.
    active: list[int]
    packings: list[Packing]
    #: The packings for when a rank has joined; None if the others need only sums anyway.
    joined_packings: list[Packing] | None
    #: What tells the groups of parameters apart, one label each.
    labels: tuple[Hashable, ...]
    choice: Choice
    digest: int
    #: 1 for this rank and 0 for the others, int64. A variable, because TensorFlow would evaluate a
    #: collective of constants once and for all.
    here: tf.Variable
    #: How many steps were taken since ranks laid this out together, int64.
    count: tf.Variable
    #: Indices of the slots whose variables are compared between ranks.
    compared: list[int]
    #: What the aggregator remembers of these groups.
    memory: dict[str, tf.Variable]
    #: For eager code: the graph of a step, that of the digests of the variables, and what stands for those where
    #: variables are not compared.
    compiled: Any = None
    digests: Any = None
    no_digests: Any = None


class _GraphStep(Step):
    """A step whose error is raised by the graph, because only the graph sees the values."""

    checks: list[tf.Tensor]

    def _refuse_nonfinite(self, statistics: Statistics) -> None:
        bad = tf.reduce_any(~tf.math.is_finite(statistics.squares), 0)
        self.checks.append(errors.check(tf.reduce_any(bad), self.aggregator.refuse, lambda: [_where(bad)]))


class Reducer:
    """See the module docstring. One per optimizer, or per set of parameters of a tape."""

    def __init__(self, settings: Settings) -> None:
        _reducers.add(self)
        self.settings = settings
        self._collectives: HorovodTensorFlow | None = None
        self._number: int | None = None
        self._loss_scaling = False
        self._layouts: dict[Hashable, Layout] = {}
        self._last: Layout | None = None
        # What the aggregator remembers, by the labels of its groups.
        self._memories: dict[tuple[Hashable, ...], dict[str, tf.Variable]] = {}
        # The same and for how many workers, from a checkpoint or before a reset, until the next layout.
        self._loaded: tuple[Memory, int] | None = None
        self._seen: dict[str, tf.Variable] = {}
        #: How often everything was forgotten that graphs are made for.
        with tf.init_scope(), tf.device("cpu"):
            self._generation = make_variable(tf.zeros((), tf.int64))

    # --- every step -----------------------------------------------------------------------------

    @tf.autograph.experimental.do_not_convert
    def reduce(
        self,
        gradients: Sequence[Gradient | None],
        variables: Sequence[Any],
        unscale: tf.Tensor | float = 1.0,
    ) -> list[Gradient | None]:
        """The aggregated gradients, None where no rank has any.

        ``unscale`` is what the gradients have to be multiplied by to be true gradients, where a
        loss scale is in force; the result is scaled just as they are.
        """
        if not self.settings.process_set.included():
            return list(gradients)
        self.prepare()
        if self.settings.sparse_as_dense:
            gradients = [g if g is None else tf.convert_to_tensor(g) for g in gradients]
        layout = self._layout(gradients, variables)
        chosen = [layout.slots[i].normal(gradients[i]) for i in layout.active]
        compared = [native(variables[i]) for i in layout.compared]
        unscale = tf.cast(unscale, tf.float64)
        if tf.executing_eagerly():
            results = self._call(layout, unscale, compared, chosen)
        else:
            results = self._run(layout, unscale, self._digests(layout, compared), chosen)
        everything: list[Gradient | None] = [None] * len(gradients)
        for index, result in zip(layout.active, results, strict=True):
            everything[index] = result
        return everything

    def prepare(self, loss_scaling: bool = False) -> None:
        """What comes before the first collective, whichever that is."""
        if control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
            raise RuntimeError(NO_XLA)
        if self._collectives is not None and self._collectives.size != self.settings.process_set.size():
            number = self._number
            with tf.init_scope():
                self.reset()  # an elastic job has changed its size
            self._number = number
        if self._collectives is None:
            settings = self.settings
            self._collectives = HorovodTensorFlow(settings.process_set, settings.device_dense, settings.device_sparse)
        if self._number is None:
            self._number = _take_number(self.settings.process_set)
        self._loss_scaling |= loss_scaling

    def _call(
        self, layout: Layout, unscale: tf.Tensor, compared: Sequence[tf.Variable], gradients: list[Gradient]
    ) -> list[Gradient]:
        """Run the graph of this layout from eager code, tracing it the first time."""
        if layout.compiled is None:
            layout.compiled = make_graph(
                lambda unscale, digests, *gradients: self._run(layout, unscale, digests, list(gradients)),
                tf.TensorSpec((), tf.float64),
                tf.TensorSpec((len(compared),), tf.int64),
                *(layout.slots[i].signature() for i in layout.active),
            )
            layout.no_digests = tf.zeros((len(compared),), tf.int64)
        digests = layout.no_digests
        if compared and is_due(int(layout.count.value()), self.settings.check_replicas):
            if layout.digests is None:
                # Of their values: the graph would keep variables for as long as it is there itself.
                specs = [tf.TensorSpec(variable.shape, variable.dtype) for variable in compared]
                layout.digests = make_graph(lambda *values: _digests_of(values), *specs)
            digests = layout.digests(*(variable.read_value() for variable in compared))
        try:
            return list(layout.compiled(unscale, digests, *gradients))
        except tf.errors.InvalidArgumentError as error:
            judged = errors.decoded(error)
            if judged is None:
                raise
            raise judged from error

    def _digests(self, layout: Layout, compared: Sequence[tf.Variable]) -> tf.Tensor:
        """Add the digests of the variables to the graph; zeros in a step in which they are not compared."""

        def none() -> tf.Tensor:
            return tf.zeros((len(compared),), tf.int64)

        if not compared:
            return none()
        with tf.device("cpu"):
            count, interval = layout.count.read_value(), self.settings.check_replicas
            due = (count > 0) & ((count == 1) | (count % interval == 0))  # as `is_due` says
            return tf.cond(due, lambda: _digests_of(compared), none)

    def _run(self, layout: Layout, unscale: tf.Tensor, digests: tf.Tensor, gradients: list[Gradient]) -> list[Gradient]:
        """Add one step's operations to the graph."""
        assert self._collectives is not None
        with tf.device("cpu"):
            with tf.control_dependencies([self._still_the_same_workers()]):
                table = self._flags(layout, digests)
            with tf.control_dependencies([self._still_agreed(layout, table)]):
                # Nothing is sent before ranks know that they send the same, and nothing learnt from
                # the flags either: a rank that changes what it trains remembers no steps.
                table = tf.identity(table)
            with tf.control_dependencies([self._replicas_are_equal(layout, table, digests)]):
                flags = Flags(*tf.unstack(table, axis=1))
            here = flags.here == 1
            # A rank that is back after it had joined has missed steps.
            missed = tf.reduce_any(here & (flags.count != flags.count[self._collectives.rank]))
            count = tf.where(missed, tf.constant(0, tf.int64), flags.count[self._collectives.rank])
        with tf.control_dependencies([flags.here]):
            gradients = _identities(gradients)
        results = self._results(layout, unscale, flags, gradients)
        with tf.control_dependencies(tf.nest.flatten(results, expand_composites=True)):
            # No step that ends with an error counts, on any rank.
            layout.count.assign(count + 1)
        return results

    def _results(self, layout: Layout, unscale: tf.Tensor, flags: Flags, gradients: list[Gradient]) -> list[Gradient]:
        """The aggregated gradients, once it is known that ranks agree."""
        all_here = tf.reduce_all(flags.here == 1)
        if self.settings.aggregator is None:
            return self._average(layout, gradients, all_here)
        if not layout.packings:  # nothing has any elements
            return gradients
        memory = self._shared_memory(layout, flags)

        def with_all() -> Any:
            return self._step(layout, layout.packings, layout.choice.schedule, unscale, memory, gradients)

        if layout.joined_packings is None:
            results, memory, seen = with_all()
        else:
            packings = layout.joined_packings

            def without_some() -> Any:
                slots = [layout.slots[i] for i in layout.active]
                dense = [slot.dense(gradient) for slot, gradient in zip(slots, gradients, strict=True)]
                results, *rest = self._step(layout, packings, ONLY_SUMS.schedule, unscale, memory, dense)
                return [slot.normal(result) for slot, result in zip(slots, results, strict=True)], *rest

            results, memory, seen = tf.cond(all_here, with_all, without_some)
        for name, value in memory.items():
            layout.memory[name].assign(value)
        self._remember({**seen, "all here": all_here})
        return list(results)

    def _step(
        self,
        layout: Layout,
        packings: Sequence[Packing],
        schedule_name: str,
        unscale: tf.Tensor,
        memory: Memory,
        gradients: Sequence[Gradient],
    ) -> tuple[list[Gradient], Memory, dict[str, tf.Tensor]]:
        """Aggregate: the results, what the aggregator remembers now, and what a report needs."""
        assert self._collectives is not None
        assert self.settings.aggregator is not None
        self._collectives.start()
        schedule = SCHEDULES[schedule_name](self._collectives, self.settings.gradient_predivide_factor)
        by_index = dict(zip(layout.active, gradients, strict=True))
        buckets = [packing.pack(by_index, schedule) for packing in packings]
        step = _GraphStep(self._collectives, self.settings.aggregator, len(layout.labels), self.name)
        step.checks = []
        decision, statistics = step.run(buckets, memory, unscale)
        results = dict(by_index)  # what has no elements is in no packing
        with tf.control_dependencies(step.checks):
            for packing, bucket in zip(packings, buckets, strict=True):
                results.update(packing.unpack(bucket))
            found = _identities([results[i] for i in layout.active])
            # Nothing is learnt from a step that ends with an error.
            memory = {name: tf.identity(value) for name, value in decision.memory.items()}
        seen = {
            "weights": decision.weights,
            "fallback": decision.fallback,
            "dots": statistics.dots,
            "squares": statistics.squares,
            "present": statistics.present,
            **{f"stage {name}": value for name, value in decision.stages.items()},
        }
        return found, memory, seen

    def _average(self, layout: Layout, gradients: list[Gradient], all_here: tf.Tensor) -> list[Gradient]:
        """What Horovod does without an aggregator, by Horovod's own reduction."""
        settings = self.settings
        factor = settings.gradient_predivide_factor if settings.op == hvd.Average else 1.0
        common = {
            "op": settings.op,
            "compression": settings.compression or hvd.Compression.none,
            "prescale_factor": 1 / factor,
            "postscale_factor": factor,
            "process_set": settings.process_set,
            "ignore_name_scope": True,
            "device_dense": settings.device_dense,
        }
        assert self._collectives is not None
        together = self._shared_buckets([layout.slots[i] for i in layout.active])
        groups = {key: number for number, group in enumerate(together or ()) for key in group}
        results: dict[int, Gradient] = {}
        grouped: dict[int, list[tuple[int, Gradient]]] = {}
        for index, gradient in zip(layout.active, gradients, strict=True):
            slot = layout.slots[index]
            if slot.sparse:
                results[index] = self._average_rows(slot, gradient, all_here)
                continue
            gradient = self._collectives.anchored(gradient)
            if slot.key in groups:
                grouped.setdefault(groups[slot.key], []).append((index, gradient))
            else:
                reduced = hvd.allreduce(gradient, name=f"{self.name}.{index}", **common)
                results[index] = tf.ensure_shape(reduced, slot.shape)
        for number, members in grouped.items():
            indices, tensors = zip(*members, strict=True)
            reduced = hvd.grouped_allreduce(list(tensors), name=f"{self.name}.group.{number}", **common)
            results.update(zip(indices, reduced, strict=True))
        return [results[i] for i in layout.active]

    def _average_rows(self, slot: Slot, gradient: tf.IndexedSlices, all_here: tf.Tensor) -> tf.IndexedSlices:
        """The average of a sparse gradient; in full length once a rank has joined."""
        collectives, op = self._collectives, self.settings.op
        assert collectives is not None
        if op not in (hvd.Average, hvd.Sum):
            raise NotImplementedError(
                f"{slot.name} has a sparse gradient, which only Average and Sum can reduce; pass sparse_as_dense=True"
            )
        name = f"{self.name}.{slot.index}"

        def rows_of_all() -> tf.IndexedSlices:
            values = collectives.allgather_rows(gradient.values, f"{name}.values").wait()
            rows = collectives.allgather_rows(gradient.indices, f"{name}.rows").wait()
            return tf.IndexedSlices(values, rows, tf.constant(slot.shape, tf.int64))

        def in_full_length() -> tf.IndexedSlices:
            collectives.start()
            return slot.normal(collectives.allreduce(slot.dense(gradient), f"{name}.sum").wait())

        total = tf.cond(all_here, rows_of_all, in_full_length)
        if op == hvd.Sum:
            return total
        values = total.values / tf.cast(collectives.size, total.values.dtype)
        return tf.IndexedSlices(values, total.indices, total.dense_shape)

    def _flags(self, layout: Layout, digests: tf.Tensor) -> tf.Tensor:
        """Every rank's row of the flags; zeros for those that have joined."""
        mine = Flags(
            steps=tf.cast(tf.reduce_max(layout.memory["steps"]), tf.int64) if layout.memory else 0,
            layout=layout.digest,
            count=layout.count.read_value(),
            replicas=tf.reduce_sum(digests),
        )
        row = tf.stack([tf.cast(value, tf.int64) for value in mine])
        return self._sum(layout.here.read_value()[:, None] * row, "flags")

    def _still_the_same_workers(self) -> tf.Tensor:
        """Fail in a graph that was made for workers who were there before."""
        with tf.init_scope():
            now = self._generation.numpy()
        return errors.check(self._generation != now, _refuse_outdated, list)

    def _still_agreed(self, layout: Layout, table: tf.Tensor) -> tf.Tensor:
        """Fail, on every rank alike, unless all ranks are about to do the same."""
        aggregator = self.settings.aggregator
        gramian = aggregator is not None and aggregator.needs_gramian
        flags = Flags(*tf.unstack(table, axis=1))
        here = flags.here == 1
        fine = ~here | ((flags.anew == 0) & (flags.stray == 0) & (flags.layout == layout.digest))
        if gramian:
            fine &= here
        return errors.check(
            ~tf.reduce_all(fine),
            _refuse_disagreement,
            lambda: [table, tf.constant(layout.digest, tf.int64), repr(aggregator)],
        )

    def _replicas_are_equal(self, layout: Layout, table: tf.Tensor, digests: tf.Tensor) -> tf.Tensor:
        """Fail, on every rank alike, if ranks have compared their variables and these differ."""
        assert self._collectives is not None
        flags = Flags(*tf.unstack(table, axis=1))
        mine = Flags(*(column[self._collectives.rank] for column in flags))
        here = flags.here == 1
        # Where a rank is back that had joined, some ranks may compare in this step and others not.
        together = tf.reduce_all(~here | (flags.count == mine.count))
        differ = together & tf.reduce_any(here & (flags.replicas != mine.replicas))

        def everyone() -> list[tf.Tensor]:
            names = tf.constant(_distinct([layout.slots[i].name for i in layout.compared]))
            rows = self._sum(layout.here.read_value()[:, None] * digests, "replicas")
            return [rows, here, names, mine.count]

        return errors.check(differ, _refuse_drifted, everyone)

    def _shared_memory(self, layout: Layout, flags: Flags) -> Memory:
        """What the aggregator remembers: of the rank that remembers the most steps, if ranks differ."""
        collectives = self._collectives
        assert collectives is not None
        own = {name: variable.read_value() for name, variable in layout.memory.items()}
        root = tf.argmax(flags.steps)
        differ = tf.reduce_any((flags.here == 1) & (flags.steps != flags.steps[root]))

        def share() -> list[tf.Tensor]:
            collectives.start()
            flat = tf.concat([tf.reshape(value, (-1,)) for value in own.values()], 0)
            flat = tf.where(root == collectives.rank, flat, tf.zeros_like(flat))
            flat = collectives.allreduce(flat, f"{self.name}.memory").wait()
            parts = tf.split(flat, [value.shape.num_elements() for value in own.values()])
            return [tf.reshape(part, value.shape) for part, value in zip(parts, own.values(), strict=True)]

        values = tf.cond(differ, share, lambda: list(own.values()))
        return dict(zip(own, values, strict=True))

    def _sum(self, table: tf.Tensor, what: str) -> tf.Tensor:
        """The sum of all ranks' tables."""
        total = mpi_ops._allreduce(
            table,
            name=f"{self.name}.{what}",
            op=mpi_ops.Sum,
            ignore_name_scope=True,
            process_set=self.settings.process_set,
        )
        return tf.ensure_shape(total, table.shape)

    def _tell(self, mine: Flags) -> Flags:
        """Tell the other ranks something at once, from eager code; what all of them told, in columns."""
        assert self._collectives is not None
        table = [list(Flags(here=0))] * self._collectives.size
        table[self._collectives.rank] = list(mine)
        graph = make_graph(lambda table: self._sum(table, "flags"), tf.TensorSpec((len(table), len(mine)), tf.int64))
        return Flags(*graph(tf.constant(table, tf.int64)).numpy().T.tolist())

    def stray(self, how: str) -> None:
        """Tell all ranks that this one took a step along gradients that were never aggregated, and raise the error.

        The others get the same error in their step or while they lay out. If they take none, this rank waits
        for :data:`STRAY_SECONDS` and then raises the error alone.
        """
        if not self.settings.process_set.included():
            return
        with tf.init_scope():
            self.prepare()
        assert self._collectives is not None
        ranks = [self._collectives.rank]

        def tell() -> None:
            # Horovod's own error means that it is shutting down, so the others have ended.
            with contextlib.suppress(tf.errors.OpError):
                ranks[:] = _ranks_of(self._tell(Flags(stray=1)).stray)

        # In a thread of its own, because Horovod has no limit on how long it waits.
        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        thread.join(STRAY_SECONDS)
        raise stray_step(list(ranks), how)

    # --- once per layout ------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The prefix of this reducer's collectives."""
        return f"adacons.tf.{self._number}"

    def _layout(self, gradients: Sequence[Gradient | None], variables: Sequence[Any]) -> Layout:
        """The layout for these parameters: the one made before, or a new one."""
        keys = tuple(key_of(variable, i) for i, variable in enumerate(variables))
        layout = self._layouts.get(keys)
        if layout is None or any(g is not None and i not in layout.active for i, g in enumerate(gradients)):
            # Python code runs at a rank's first step, whether that is being traced or not.
            with tf.init_scope():
                layout = self._lay_out(gradients, variables, keys)
            self._layouts[keys] = layout
        if layout is not self._last:
            with tf.init_scope():
                self._carry_over(layout)
            self._last = layout
        return layout

    def _lay_out(
        self, gradients: Sequence[Gradient | None], variables: Sequence[Any], keys: Sequence[Hashable]
    ) -> Layout:
        """Agree with the other ranks on slots, packings and schedule, and make them."""
        if not tf.executing_eagerly():
            raise RuntimeError(
                "an aggregator needs TensorFlow 2's eager execution, outside or inside a tf.function; "
                "with tf.compat.v1.Session and disable_eager_execution() use horovod.tensorflow"
            )
        assert self._collectives is not None
        settings = self.settings
        if not self._layouts and not isinstance(settings.granularity, str):
            # Later some may be frozen. What is frozen now may be trained later.
            trainable = [
                [v for named in group if (v := named.if_trainable()) is not None] for group in settings.granularity
            ]
            check_members("granularity", trainable, keys, key_of)
        group_of, labels = self._granularity(keys)
        names = canonical_names([_name(variable, i) for i, variable in enumerate(variables)])
        slots = [
            Slot(i, key, name, *_shape_and_type(variable, gradient), group_of[key])
            for i, (key, name, variable, gradient) in enumerate(zip(keys, names, variables, gradients, strict=True))
        ]
        description = self._description(slots)
        digest = agreement.digest(description)
        self._meet(digest)
        sparse = [i for i, g in enumerate(gradients) if isinstance(g, tf.IndexedSlices)]
        active = [i for i, g in enumerate(gradients) if g is not None]
        mine = json.dumps([digest, host_name(), sparse, active]).encode()
        answers = [json.loads(a) for a in self._collectives.allgather_bytes(mine, f"{self.name}.plan")]
        if any(answer[0] != digest for answer in answers):
            agreement.confirm(self._collectives, description, self.name)
        hosts = [answer[1] for answer in answers]
        # A parameter may have a sparse gradient on one rank, and a dense one or none on another.
        for index in {i for answer in answers for i in answer[2]}:
            slots[index] = Slot(**{**vars(slots[index]), "sparse": True})
        active = sorted({i for answer in answers for i in answer[3]})
        used = [slots[i] for i in active]
        choice = self._choose_schedule(used, hosts)
        together = self._shared_buckets(used)

        def packings_for(schedule: str, slots: Sequence[Slot]) -> list[Packing]:
            assert self._collectives is not None
            return pack(
                f"{self.name}.{schedule}",
                slots,
                workers=self._collectives.size,
                bucket_bytes=settings.bucket_bytes,
                together=together,
                compression=settings.compression,
            )

        joined_packings = None
        only_sums = choice.schedule == ONLY_SUMS.schedule and not any(slot.sparse for slot in used)
        if settings.aggregator is not None and not settings.aggregator.needs_gramian and not only_sums:
            joined_packings = packings_for(ONLY_SUMS.schedule, [replace(slot, sparse=False) for slot in used])
        with tf.device("cpu"):
            here = make_variable(tf.one_hot(self._collectives.rank, self._collectives.size, dtype=tf.int64))
            count = make_variable(tf.zeros((), tf.int64))
        return Layout(
            slots,
            active,
            packings_for(choice.schedule, used),
            joined_packings,
            labels,
            choice,
            digest,
            here,
            count,
            self._compared(variables, slots),
            self._memory_of(labels),
        )

    def _compared(self, variables: Sequence[Any], slots: Sequence[Slot]) -> list[int]:
        """The slots whose variables are compared between ranks; a mere tensor has no value to keep equal."""
        if not self.settings.check_replicas:
            return []
        return [
            slot.index
            for slot, variable in zip(slots, variables, strict=True)
            if is_variable(variable) and slot.key not in self.settings.may_differ
        ]

    def _meet(self, digest: int) -> None:
        """Tell the other ranks that this one lays out anew, and make sure that they do, too."""
        seen = self._tell(Flags(anew=1, layout=digest))
        _refuse_stray(seen)
        gone = [rank for rank, here in enumerate(seen.here) if not here]
        if gone:
            raise RuntimeError(f"{by_ranks(gone)} called hvd.join(); new parameters cannot be agreed on without them")
        settled = [rank for rank, anew in enumerate(seen.anew) if not anew]
        if settled:
            raise agreement.DisagreementError(
                f"this rank trains other parameters than in the step before, but {by_ranks(settled)} did "
                "not change them. Every rank must freeze, unfreeze and recompile at the same step."
            )

    def _choose_schedule(self, slots: Sequence[Slot], hosts: Sequence[str]) -> Choice:
        settings = self.settings
        if settings.aggregator is None:
            return Choice("allreduce", "no aggregator")
        size = sum(slot.length * slot.dtype.size for slot in slots if not slot.sparse)
        assert self._collectives is not None
        return choose_schedule(
            settings.schedule,
            settings.aggregator,
            self._collectives,
            hosts,
            size,
            settings.bucket_bytes,
            tf.zeros(()),
            self.name,
        )

    def _granularity(self, keys: Sequence[Hashable]) -> tuple[dict[Hashable, int], tuple[Hashable, ...]]:
        """The group of every parameter, and what tells the groups apart, whichever are trained."""
        granularity = self.settings.granularity
        lists = granularity if isinstance(granularity, str) else [[n.key for n in group] for group in granularity]
        group_of, groups = group_parameters(lists, keys)
        return group_of, tuple(keys) if granularity == "layer" else tuple(range(groups))

    def _shared_buckets(self, slots: Sequence[Slot]) -> list[list[Hashable]] | None:
        groups = self.settings.groups
        by_key = [[named.key for named in group] for group in groups] if isinstance(groups, tuple) else groups
        return shared_buckets(by_key, [slot.key for slot in slots])

    def _description(self, slots: Sequence[Slot]) -> dict[str, Any]:
        """What all ranks must have in common, in words that an error can show."""
        settings = self.settings
        granularity = settings.granularity
        names = {slot.key: slot.name for slot in slots}
        together = self._shared_buckets(slots)
        compression = settings.compression or hvd.Compression.none
        return {
            "adacons_hvd": __version__,
            "aggregator": repr(settings.aggregator),
            "op": settings.op,
            "schedule": str(settings.schedule),
            "granularity": granularity if isinstance(granularity, str) else "explicit groups",
            "compression": getattr(compression, "__name__", type(compression).__name__),
            "gradient_predivide_factor": settings.gradient_predivide_factor,
            "groups": None
            if together is None
            else [[names.get(key, "not trained") for key in group] for group in together],
            "sparse_as_dense": settings.sparse_as_dense,
            "bucket_bytes": settings.bucket_bytes,
            "loss_scaling": self._loss_scaling,
            "check_replicas": settings.check_replicas,
            "may_differ": [slot.name for slot in slots if slot.key in settings.may_differ],
            "parameters": [[slot.name, slot.dtype.name, str(slot.shape), f"group {slot.group}"] for slot in slots],
        }

    # --- state ----------------------------------------------------------------------------------

    def _memory_of(self, labels: tuple[Hashable, ...]) -> dict[str, tf.Variable]:
        """The variables for what the aggregator remembers of these groups."""
        if self.settings.aggregator is None:
            return {}
        if labels not in self._memories:
            self._memories[labels] = {k: make_variable(v) for k, v in self._blank_memory(len(labels)).items()}
        return self._memories[labels]

    def _blank_memory(self, groups: int) -> Memory:
        assert self._collectives is not None
        aggregator, workers = self.settings.aggregator, self._collectives.size
        assert aggregator is not None
        nothing = tf.zeros((groups, workers), tf.float64)
        gramian = tf.zeros((groups, workers, workers), tf.float64) if aggregator.needs_gramian else None
        blank = Statistics(nothing, nothing, nothing == 0, gramian)
        return aggregator.started(blank)

    def _carry_over(self, layout: Layout) -> None:
        """Give a layout what is remembered: from a checkpoint, or of the same groups in the last layout."""
        if self._loaded is not None:
            self._take_up(layout)
        elif self._last is not None and self._last.labels != layout.labels:
            pairs = [(i, self._last.labels.index(x)) for i, x in enumerate(layout.labels) if x in self._last.labels]
            for name, variable in layout.memory.items():
                rows = variable.numpy()
                for row, former in pairs:
                    rows[row] = self._last.memory[name][former].numpy()
                variable.assign(rows)

    def _take_up(self, layout: Layout) -> None:
        """Make what was loaded what the aggregator remembers."""
        assert self._loaded is not None
        (loaded, workers), self._loaded = self._loaded, None
        if self.settings.aggregator is None:
            return
        assert self._collectives is not None
        groups = len(layout.labels)
        known = loaded["steps"].shape[0] if loaded else groups
        if known != groups:
            warnings.warn(
                f"the aggregator's state is for {known} groups of parameters and there are {groups} now, "
                "so it starts afresh",
                stacklevel=2,
            )
            loaded = {}
        if loaded and workers != self._collectives.size:
            loaded = self.settings.aggregator.resized(loaded, self._collectives.size)
        for name, blank in self._blank_memory(groups).items():
            layout.memory[name].assign(loaded.get(name, blank))

    def _remember(self, tensors: Mapping[str, tf.Tensor]) -> None:
        """Keep what a report needs; see :attr:`report`."""
        for name, value in tensors.items():
            variable = self._seen.get(name)
            if variable is None or variable.shape != value.shape:
                with tf.init_scope():
                    variable = make_variable(tf.zeros(value.shape, value.dtype))
                self._seen[name] = variable
            variable.assign(value)

    @property
    def report(self) -> Report | None:
        """What the last step did; None before the first and without an aggregator."""
        if not self._seen or self._last is None:
            return None
        seen = {name: variable.read_value() for name, variable in self._seen.items()}
        memory = {name: variable.read_value() for name, variable in self._last.memory.items()}
        stages = {name.removeprefix("stage "): value for name, value in seen.items() if name.startswith("stage ")}
        decision = Decision(seen["weights"], memory, seen["fallback"], stages)
        statistics = Statistics(seen["dots"], seen["squares"], seen["present"])
        if seen["all here"]:
            return Report(decision, statistics, self._last.choice)
        return Report(decision, statistics, ONLY_SUMS)

    def state_dict(self) -> dict[str, Any]:
        """What the aggregator remembers, as numbers and arrays."""
        memory, workers = self._remembered()
        return pack_memory({name: value.numpy() for name, value in memory.items()}, workers)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned, saved by any number of workers."""
        memory, workers = unpack_memory(state)
        self._loaded = {name: tf.constant(value, tf.float64) for name, value in memory.items()}, workers
        if self._last is not None:
            self._take_up(self._last)

    def reset(self) -> None:
        """Forget what was agreed on, as when workers have come or gone; keep what was learnt."""
        self._loaded = self._remembered()
        self._generation.assign_add(1)
        self._memories = {}
        self._layouts = {}
        self._last = None
        self._seen = {}
        self._number = None
        self._collectives = None

    def _remembered(self) -> tuple[Memory, int]:
        """What the aggregator remembers, and for how many workers."""
        if self._loaded is not None:
            return self._loaded
        if self._last is None or not self._last.memory:
            return {}, 0
        assert self._collectives is not None
        return {name: variable.read_value() for name, variable in self._last.memory.items()}, self._collectives.size


# --- what a graph asks of Python, see `errors` ------------------------------------------------------


def _refuse_outdated() -> None:
    raise RuntimeError(
        "Horovod was initialised anew after this function was traced, so it has to be traced again: call the "
        "tf.function, not a concrete function taken from it, and use the hvd.elastic.run of adacons_hvd."
    )


def _refuse_stray(flags: Flags) -> None:
    stray = _ranks_of(flags.stray)
    if stray:
        raise stray_step(stray, "the error on that rank says how")


def _refuse_disagreement(table: list[list[int]], layout: int, aggregator: str) -> None:
    flags = Flags(*zip(*table, strict=True))
    _refuse_stray(flags)
    changed = [
        rank for rank, row in enumerate(map(Flags._make, table)) if row.here and (row.anew or row.layout != layout)
    ]
    if changed:
        raise agreement.DisagreementError(
            f"ranks no longer train the same parameters: {by_ranks(changed)} changed them and this rank did not. "
            "Every rank must freeze, unfreeze and recompile at the same step."
        )
    gone = [rank for rank, here in enumerate(flags.here) if not here]
    raise RuntimeError(
        f"{aggregator} needs the Gramian of all gradients, which cannot be computed once a rank has called "
        f"hvd.join(), and {by_ranks(gone)} did."
    )


def _refuse_drifted(digests: list[list[int]], here: list[bool], names: list[str], count: int) -> None:
    compare_replicas({rank: row for rank, row in enumerate(digests) if here[rank]}, names, count + 1)


def _ranks_of(column: Sequence[int]) -> list[int]:
    return [rank for rank, value in enumerate(column) if value]


def _where(condition: tf.Tensor) -> tf.Tensor:
    return tf.reshape(tf.where(condition), (-1,))


def _digests_of(variables: Sequence[Any]) -> tf.Tensor:
    return tf.stack([digest([variable]) for variable in variables])


def _distinct(names: Sequence[str]) -> list[str]:
    """Names that tell variables apart, also where several were given none."""
    often = Counter(names)
    return [f"{name} (number {i})" if often[name] > 1 else name for i, name in enumerate(names)]


def _identities(gradients: Sequence[Gradient]) -> list[Gradient]:
    """The same gradients, as operations that wait for the control dependencies in force."""
    return [tf.nest.map_structure(tf.identity, gradient, expand_composites=True) for gradient in gradients]


def _shape_and_type(variable: Any, gradient: Gradient | None) -> tuple[tuple[int, ...], tf.DType]:
    shape = variable.shape if gradient is None or isinstance(gradient, tf.IndexedSlices) else gradient.shape
    if not tf.TensorShape(shape).is_fully_defined():
        shape = variable.shape
    dtype = native(variable).dtype if gradient is None else gradient.dtype
    return tuple(int(side) for side in shape), tf.as_dtype(dtype)


def _name(variable: Any, position: int) -> str:
    path = getattr(variable, "path", None)
    if path is None and isinstance(variable, tf.Variable):
        path = variable.name
    return str(path).split(":")[0] if path is not None else f"tensor_{position}"
