"""From this worker's gradients to aggregated ones, over Horovod, eagerly or inside a graph.

Python code in a ``tf.function`` runs once, while it is traced; what it leaves behind runs every
step and knows no Python values. So the work is divided:

* **Once per layout, in Python**, even while tracing (``tf.init_scope`` leads out of the graph):
  ranks compare settings and parameters, all raise the same error if those differ, and otherwise
  agree on slots, parcels and schedule. Every rank traces at its first step, so every rank is
  there. Another trace of the same parameters, for a batch of another size, finds the layout made
  and talks to nobody: ranks need not retrace together.
* **Every step, in the graph**: one small sum (``flags``) makes sure that all ranks still follow
  the same layout before anything else is sent. It depends on nothing, so it is over before backward
  is. Should one rank have changed what it trains and the others not, this is where all find out.

What an aggregator remembers is in ``tf.Variable`` and assigned in the graph. In eager mode the
same graph is traced once and called.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import horovod.tensorflow as hvd
import tensorflow as tf
from horovod.tensorflow import mpi_ops
from horovod.tensorflow.mpi_ops import ProcessSet
from tensorflow.python.ops import control_flow_util

from .. import __version__, agreement
from ..aggregators import Aggregator, Decision, Memory, Statistics, pack_memory, unpack_memory
from ..binding import BUCKET_BYTES, choose_schedule, group_parameters
from ..collectives import host_name
from ..collectives.horovod_tensorflow import HorovodTensorFlow, make_variable
from ..costs import Topology
from ..report import Report
from ..schedules import SCHEDULES, Step
from .packing import Gradient, Parcel, Slot, plan

__all__ = ["Reducer", "Settings", "key_of", "native"]


NO_XLA = (
    "Horovod's operations cannot be compiled by XLA, so gradients cannot be aggregated inside "
    "a tf.function with jit_compile=True. Leave jit_compile out of the function that takes the "
    "optimizer's step; functions it calls, such as the model's, may keep it."
)


@dataclass(frozen=True)
class Settings:
    """What the user asked for; see ``DistributedOptimizer``."""

    aggregator: Aggregator | None
    schedule: str = "auto"
    granularity: str | Sequence[Sequence[Any]] = "model"
    compression: Any = None
    gradient_predivide_factor: float = 1.0
    groups: int | Sequence[Sequence[Any]] | None = None
    sparse_as_dense: bool = False
    process_set: ProcessSet = hvd.global_process_set
    bucket_bytes: int = BUCKET_BYTES
    op: int = hvd.Average
    device_dense: str = ""
    device_sparse: str = ""


# How many reducers have been used on each process set. The number is part of the names of a
# reducer's collectives, so it must be the same on every rank: reducers are numbered in the order
# of their first step.
_numbers: Counter[int] = Counter()


def _take_number(process_set: ProcessSet) -> int:
    number = _numbers[process_set.process_set_id]
    _numbers[process_set.process_set_id] += 1
    return number


def forget_numbers() -> None:
    """Number from 0 again: after an elastic reset some ranks are new and know no numbers yet."""
    _numbers.clear()


def native(variable: Any) -> Any:
    """TensorFlow's variable, where Keras 3 gave one of its own."""
    value = getattr(variable, "value", None)
    return value if isinstance(value, tf.Variable) else variable


def key_of(variable: Any, position: int = 0) -> Hashable:
    """What identifies a variable; a mere tensor is known by its position."""
    variable = native(variable)
    return variable._unique_id if isinstance(variable, tf.Variable) else ("tensor", position)


@dataclass
class Layout:
    """What ranks agreed on for one list of parameters."""

    slots: list[Slot]
    #: Indices of slots for which some rank had a gradient.
    active: list[int]
    parcels: list[Parcel]
    groups: int
    schedule: str
    reason: str
    digest: int
    #: ``[N, 4]`` int64 with this rank's row of the flags. A variable, because TensorFlow would
    #: evaluate a collective of constants once and for all.
    flags: tf.Variable
    compiled: Any = None


class _GraphStep(Step):
    """A step whose error is raised by the graph, because only the graph sees the values."""

    checks: list[tf.Operation]

    def _refuse_nonfinite(self, statistics: Statistics) -> None:
        finite = tf.reduce_all(tf.math.is_finite(statistics.squares), 0)
        ranks = tf.reshape(tf.where(~finite), (-1,))
        text = (
            "the gradients of these ranks hold NaN or infinity (or are so large that their "
            f"squares overflow), and {self.aggregator!r} was told to raise: "
        )
        self.checks.append(tf.debugging.Assert(tf.reduce_all(finite), [text, ranks], summarize=-1))


class Reducer:
    """See the module docstring. One per optimizer, or per set of parameters of a tape."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._collectives: HorovodTensorFlow | None = None
        self._number: int | None = None
        self._loss_scaling = False
        self._layouts: dict[Hashable, Layout] = {}
        self._last: Layout | None = None
        #: What the aggregator remembers, and for how many workers.
        self.memory: dict[str, tf.Variable] = {}
        self._loaded: Memory = {}
        self._memory_workers = 0
        self._seen: dict[str, tf.Variable] = {}

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
        unscale = tf.cast(unscale, tf.float64)
        do = self._call if tf.executing_eagerly() else self._run
        results = do(layout, unscale, chosen)
        everything: list[Gradient | None] = [None] * len(gradients)
        for index, result in zip(layout.active, results, strict=True):
            everything[index] = result
        return everything

    def prepare(self, loss_scaling: bool = False) -> None:
        """What comes before the first collective, whichever that is."""
        if control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
            raise RuntimeError(NO_XLA)
        if self._collectives is None or self._collectives.size != self.settings.process_set.size():
            self._connect()  # the first step, or an elastic job has changed its size
        if self._number is None:
            self._number = _take_number(self.settings.process_set)
        self._loss_scaling |= loss_scaling

    def _call(self, layout: Layout, unscale: tf.Tensor, gradients: list[Gradient]) -> list[Gradient]:
        """Run the graph of this layout from eager code, tracing it the first time."""
        if layout.compiled is None:
            layout.compiled = tf.function(
                lambda unscale, *gradients: self._run(layout, unscale, list(gradients)),
                input_signature=[tf.TensorSpec((), tf.float64), *(layout.slots[i].signature() for i in layout.active)],
                autograph=False,
            )
        try:
            return list(layout.compiled(unscale, *gradients))
        except tf.errors.InvalidArgumentError as error:
            if _CHANGED in error.message:
                raise agreement.DisagreementError(error.message) from error
            if "was told to raise" in error.message:
                raise FloatingPointError(error.message) from error
            raise

    def _run(self, layout: Layout, unscale: tf.Tensor, gradients: list[Gradient]) -> list[Gradient]:
        """Add one step's operations to the graph."""
        assert self._collectives is not None
        self._collectives.start()
        with tf.control_dependencies([self._still_agreed(layout)]):
            # Nothing is sent before ranks know that they send the same.
            gradients = [tf.nest.map_structure(tf.identity, g, expand_composites=True) for g in gradients]
        if self.settings.aggregator is None:
            return self._average(layout, gradients)
        schedule = SCHEDULES[layout.schedule](self._collectives, self.settings.gradient_predivide_factor)
        by_index = dict(zip(layout.active, gradients, strict=True))
        buckets = [parcel.pack(by_index, schedule) for parcel in layout.parcels]
        step = _GraphStep(self._collectives, self.settings.aggregator, layout.groups, self.name)
        step.checks = []
        memory = {name: variable.read_value() for name, variable in self.memory.items()}
        decision, statistics = step.run(buckets, memory, unscale)
        results: dict[int, Gradient] = {}
        with tf.control_dependencies(step.checks):
            for parcel, bucket in zip(layout.parcels, buckets, strict=True):
                results.update(parcel.unpack(bucket))
            for name, value in decision.memory.items():
                self.memory[name].assign(value)
            self._remember(decision, statistics)
            empty = {i: gradients[k] for k, i in enumerate(layout.active) if i not in results}
            results = {
                i: tf.nest.map_structure(tf.identity, g, expand_composites=True) for i, g in (results | empty).items()
            }
        return [results[i] for i in layout.active]

    def _average(self, layout: Layout, gradients: list[Gradient]) -> list[Gradient]:
        """What Horovod does without an aggregator, by Horovod's own reduction."""
        settings = self.settings
        assert self._collectives is not None
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
        together = self._together([layout.slots[i] for i in layout.active])
        groups = {key: number for number, group in enumerate(together or ()) for key in group}
        results: dict[int, Gradient] = {}
        grouped: dict[int, list[tuple[int, Gradient]]] = {}
        for index, gradient in zip(layout.active, gradients, strict=True):
            slot = layout.slots[index]
            name = f"{self.name}.{index}"
            if isinstance(gradient, tf.Tensor):
                gradient = self._collectives.anchored(gradient)
            if isinstance(gradient, tf.IndexedSlices):
                if settings.op not in (hvd.Average, hvd.Sum):
                    raise NotImplementedError(
                        f"{slot.name} has a sparse gradient, which only Average and Sum can reduce; "
                        "pass sparse_as_dense=True"
                    )
                values = self._collectives.allgather_rows(gradient.values, f"{name}.values").wait()
                if settings.op == hvd.Average:
                    values = values / tf.cast(self._collectives.size, values.dtype)
                rows = self._collectives.allgather_rows(gradient.indices, f"{name}.rows").wait()
                results[index] = tf.IndexedSlices(values, rows, gradient.dense_shape)
            elif slot.key in groups:
                grouped.setdefault(groups[slot.key], []).append((index, gradient))
            else:
                results[index] = tf.ensure_shape(hvd.allreduce(gradient, name=name, **common), slot.shape)
        for number, members in grouped.items():
            indices, tensors = zip(*members, strict=True)
            reduced = hvd.grouped_allreduce(list(tensors), name=f"{self.name}.group.{number}", **common)
            results.update(zip(indices, reduced, strict=True))
        return [results[i] for i in layout.active]

    def _still_agreed(self, layout: Layout) -> tf.Operation:
        """Fail, on every rank alike, unless all ranks are about to do the same."""
        assert self._collectives is not None
        with tf.device("cpu"):
            seen = self._sum_flags(layout.flags.read_value())
            same = (seen[:, 1] == 0) & (seen[:, 3] == layout.digest)
            here = seen[:, 0] == 1
            if self._survives_join(layout):
                same = same | ~here
                here = tf.ones_like(here)
            changed = tf.reshape(tf.where(here & ~same), (-1,))
            gone = tf.reshape(tf.where(~here), (-1,))
            left = (
                "a rank has called hvd.join(), after which Horovod only adds. Use "
                'schedule="two-pass", which needs nothing else. Ranks that left: '
            )
            checks = [
                tf.debugging.Assert(tf.size(gone) == 0, [left, gone], summarize=-1),
                tf.debugging.Assert(tf.size(changed) == 0, [_CHANGED, changed], summarize=-1),
            ]
        return tf.group(*checks)

    def _survives_join(self, layout: Layout) -> bool:
        if any(layout.slots[i].sparse for i in layout.active):
            return False
        return self.settings.aggregator is None or layout.schedule == "two-pass"

    def _sum_flags(self, table: tf.Tensor) -> tf.Tensor:
        flags = mpi_ops._allreduce(
            table,
            name=f"{self.name}.flags",
            op=mpi_ops.Sum,
            ignore_name_scope=True,
            process_set=self.settings.process_set,
        )
        return tf.ensure_shape(flags, table.shape)

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
        self._last = layout
        return layout

    def _lay_out(
        self, gradients: Sequence[Gradient | None], variables: Sequence[Any], keys: Sequence[Hashable]
    ) -> Layout:
        """Agree with the other ranks on slots, parcels and schedule, and make them."""
        if not tf.executing_eagerly():
            raise RuntimeError(
                "an aggregator needs TensorFlow 2's eager execution, outside or inside a tf.function; "
                "with tf.compat.v1.Session and disable_eager_execution() use horovod.tensorflow"
            )
        assert self._collectives is not None
        settings = self.settings
        group_of, groups = self._granularity(keys)
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
        schedule, reason = self._choose_schedule(used, hosts)
        together = self._together(used)
        parcels = plan(
            f"{self.name}.{schedule}",
            used,
            workers=self._collectives.size,
            bucket_bytes=settings.bucket_bytes,
            together=together,
            compression=settings.compression,
        )
        row = [[0] * 4] * self._collectives.size
        row[self._collectives.rank] = [1, 0, 0, digest]
        with tf.device("cpu"):
            flags = make_variable(tf.constant(row, tf.int64))
        if settings.aggregator is not None:
            self._make_memory(groups)
        return Layout(slots, active, parcels, groups, schedule, reason, digest, flags)

    def _meet(self, digest: int) -> None:
        """Tell the other ranks that this one lays out anew, and make sure that they do, too."""
        assert self._collectives is not None
        row = [[0] * 4] * self._collectives.size
        row[self._collectives.rank] = [1, 1, 0, digest]
        sum_flags = tf.function(self._sum_flags, autograph=False)
        seen = sum_flags(tf.constant(row, tf.int64)).numpy().tolist()
        gone = [rank for rank, flags in enumerate(seen) if not flags[0]]
        if gone:
            raise RuntimeError(f"ranks {gone} have called hvd.join(); new parameters cannot be agreed on without them")
        settled = [rank for rank, flags in enumerate(seen) if not flags[1]]
        if settled:
            raise agreement.DisagreementError(
                f"this rank trains other parameters than in the step before, but ranks {settled} do "
                "not. Every rank must freeze, unfreeze and recompile at the same step."
            )

    def _choose_schedule(self, slots: Sequence[Slot], hosts: Sequence[str]) -> tuple[str, str]:
        settings = self.settings
        if settings.aggregator is None:
            return "allreduce", "no aggregator"
        size = sum(slot.length * slot.dtype.size for slot in slots if not slot.sparse)
        topology = Topology(len(hosts), max(Counter(hosts).values()))
        return choose_schedule(settings.schedule, settings.aggregator, size, topology)

    def _granularity(self, keys: Sequence[Hashable]) -> tuple[dict[Hashable, int], int]:
        """The group of every parameter, and the number of groups."""
        granularity = self.settings.granularity
        if isinstance(granularity, str):
            return group_parameters(granularity, keys)
        return group_parameters([[key_of(variable) for variable in group] for group in granularity], keys)

    def _together(self, slots: Sequence[Slot]) -> list[list[Hashable]] | None:
        groups = self.settings.groups
        if groups is None or groups == 0:
            return None
        if isinstance(groups, int):
            count = min(groups, len(slots))
            bounds = [len(slots) * k // count for k in range(count + 1)] if count else [0]
            return [[slot.key for slot in slots[start:stop]] for start, stop in pairwise(bounds)]
        return [[key_of(variable) for variable in group] for group in groups]

    def _description(self, slots: Sequence[Slot]) -> dict[str, Any]:
        """What all ranks must have in common, in words that an error can show."""
        settings = self.settings
        granularity = settings.granularity
        names = {slot.key: slot.name for slot in slots}
        together = self._together(slots)
        compression = settings.compression or hvd.Compression.none
        return {
            "adacons_hvd": __version__,
            "aggregator": repr(settings.aggregator),
            "op": settings.op,
            "schedule": settings.schedule,
            "granularity": granularity if isinstance(granularity, str) else "explicit groups",
            "compression": getattr(compression, "__name__", type(compression).__name__),
            "gradient_predivide_factor": settings.gradient_predivide_factor,
            "groups": None
            if together is None
            else [[names.get(key, "not trained") for key in group] for group in together],
            "sparse_as_dense": settings.sparse_as_dense,
            "bucket_bytes": settings.bucket_bytes,
            "loss_scaling": self._loss_scaling,
            "parameters": [[slot.name, slot.dtype.name, str(slot.shape), f"group {slot.group}"] for slot in slots],
        }

    # --- state ----------------------------------------------------------------------------------

    def _make_memory(self, groups: int) -> None:
        """Make variables for what the aggregator remembers, with what it remembered so far."""
        assert self._collectives is not None
        aggregator, workers = self.settings.aggregator, self._collectives.size
        assert aggregator is not None
        nothing = tf.zeros((groups, workers), tf.float64)
        blank = Statistics(nothing, nothing, nothing == 0)
        if aggregator.needs_gramian:
            blank = Statistics(nothing, nothing, nothing == 0, tf.zeros((groups, workers, workers), tf.float64))
        counter = tf.zeros((groups, 1), tf.float64)
        fresh = {"steps": counter, "fallbacks": counter, **aggregator.start(blank)}
        old: Memory = self._loaded or {name: variable.read_value() for name, variable in self.memory.items()}
        if old and self._memory_workers != workers:
            old = aggregator.resized(old, workers)
        self._loaded, self._memory_workers = {}, workers
        for name, zero in fresh.items():
            value = old.get(name, zero)
            if tuple(value.shape) != tuple(zero.shape):  # other groups than before
                value = zero
            variable = self.memory.get(name)
            if variable is not None and variable.shape == zero.shape:
                variable.assign(value)
            else:
                self.memory[name] = make_variable(value)
        self.memory = {name: self.memory[name] for name in fresh}

    def _remember(self, decision: Decision, statistics: Statistics) -> None:
        """Keep what a report needs; see :attr:`report`."""
        tensors = {
            "weights": decision.weights,
            "fallback": decision.fallback,
            "dots": statistics.dots,
            "squares": statistics.squares,
            "present": statistics.present,
            **{f"stage {name}": value for name, value in decision.stages.items()},
        }
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
        memory = {name: variable.read_value() for name, variable in self.memory.items()}
        stages = {name.removeprefix("stage "): value for name, value in seen.items() if name.startswith("stage ")}
        decision = Decision(seen["weights"], memory, seen["fallback"], stages)
        statistics = Statistics(seen["dots"], seen["squares"], seen["present"])
        return Report(decision, statistics, self._last.schedule, self._last.reason)

    def state_dict(self) -> dict[str, Any]:
        """What the aggregator remembers, as numbers and arrays."""
        memory = self._loaded or self.memory
        return pack_memory({name: value.numpy() for name, value in memory.items()}, self._memory_workers)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned, saved by any number of workers."""
        memory, self._memory_workers = unpack_memory(state)
        self._loaded = {name: tf.constant(value, tf.float64) for name, value in memory.items()}
        if self._last is not None and self._loaded and self._collectives is not None:
            self._make_memory(self._last.groups)

    def reset(self) -> None:
        """Forget what was agreed on, as when workers have come or gone; keep what was learnt."""
        self._number = None
        self._layouts = {}
        self._collectives = None

    def _connect(self) -> None:
        self._layouts = {}
        self._last = None
        self._seen = {}
        settings = self.settings
        self._collectives = HorovodTensorFlow(settings.process_set, settings.device_dense, settings.device_sparse)


_CHANGED = (
    "ranks no longer train the same parameters. Every rank must freeze, unfreeze and recompile at "
    "the same step. Ranks that differ from this one: "
)


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


def canonical_names(names: Sequence[str]) -> list[str]:
    """Names without the numbers that Keras counts its automatic names with.

    A rank that has made another model before has ``dense_3`` where others have ``dense_1``, and
    that is no reason for an error. Numbers are given anew, in order of appearance.

    >>> canonical_names(["dense_7/kernel", "dense_7/bias", "dense_9/kernel", "head/kernel"])
    ['dense#0/kernel', 'dense#0/bias', 'dense#1/kernel', 'head#0/kernel']
    """
    seen: dict[str, list[str]] = {}

    def renumber(part: str) -> str:
        stem = re.sub(r"_\d+$", "", part)
        parts = seen.setdefault(stem, [])
        if part not in parts:
            parts.append(part)
        return f"{stem}#{parts.index(part)}"

    return ["/".join([*(renumber(p) for p in name.split("/")[:-1]), name.split("/")[-1]]) for name in names]
