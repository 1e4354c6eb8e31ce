"""From this worker's gradients to aggregated ones, over Horovod, eagerly or inside a graph.

Python code in a ``tf.function`` runs once, while it is traced; what it leaves behind runs every
step and knows no Python values. So the work is divided:

* **Once per layout, in Python**: ranks compare settings and parameters and agree on the rest (:mod:`.layout`).
* **Every step, in the graph**: ranks exchange flags (:mod:`.flags`), and then take the step (:mod:`.step`), or average
  where there is no aggregator (:mod:`.average`). What the aggregator remembers is in variables (:mod:`.memory`).

Steps are counted from the one in which ranks laid out together. The count travels with the flags. Where it differs, a
rank is back that had joined, and all begin to count anew. Once a rank has called ``hvd.join()``, Horovod only adds. So
the graph holds a second way through the step, by sums alone, and takes it among those who are still here.

In eager mode the same graph is traced once and called.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.core.function.polymorphism.function_cache import FunctionCache
from tensorflow.python.ops import control_flow_util

from ..collectives.horovod_tensorflow import HorovodTensorFlow, make_variable
from ..engine.replicas import is_due
from ..engine.session import ONLY_SUMS, Numbering
from ..engine.settings import Settings
from ..ops.tensorflow_graphs import make_graph
from ..report import Report
from . import errors, flags
from .average import average
from .flags import Flags, digests_of
from .layout import Layout, check_granularity, lay_out
from .memory import Memories, shared
from .packing import Gradient
from .step import GraphStep, Outcome, Seen, identities
from .variables import key_of, native

__all__ = ["Reducer", "start_over"]

NO_XLA = (
    "Horovod's operations cannot be compiled by XLA, so gradients cannot be aggregated inside "
    "a tf.function with jit_compile=True. Leave jit_compile out of the function that takes the "
    "optimizer's step; functions it calls, such as the model's, may keep it."
)

OUTDATED = (
    "Horovod was initialised anew after this function was traced, so it has to be traced again: call the "
    "tf.function, not a concrete function taken from it, and use the hvd.elastic.run of adacons_hvd."
)

_numbering = Numbering()

_reducers: weakref.WeakSet[Reducer] = weakref.WeakSet()


def start_over() -> None:
    """Agree anew and number from 0: after an elastic reset some ranks are new and know nothing yet."""
    _numbering.restart()
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


class Session:
    """Everything of a reducer that lasts as long as the workers stay the same."""

    def __init__(self, settings: Settings, number: int) -> None:
        #: A part of the names of the reducer's collectives.
        self.number = number
        self.name = f"adacons.tf.{number}"
        self.collectives = HorovodTensorFlow(settings.process_set, settings.device_dense, settings.device_sparse)
        self.flags = flags.Exchange(settings, self.collectives, self.name)
        self.layouts: dict[Hashable, Layout] = {}
        #: The layout of the last step, None before the first.
        self.last: Layout | None = None
        self.seen = Seen()


class Reducer:
    """Aggregates gradients for one optimizer, or for one set of parameters of a tape."""

    def __init__(self, settings: Settings) -> None:
        _reducers.add(self)
        self.settings = settings
        self._memories = Memories(settings.aggregator)
        self._loss_scaling = False
        self._session: Session | None = None
        #: How often everything was forgotten that graphs are made for.
        with tf.init_scope(), tf.device("cpu"):
            self._generation = make_variable(tf.zeros((), tf.int64))

    def session(self) -> Session:
        """The session with the workers that are there. It is asked for before any collective."""
        if control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
            raise RuntimeError(NO_XLA)
        number = None
        if self._session is not None and self._session.collectives.size != self.settings.process_set.size():
            number = self._session.number
            with tf.init_scope():
                self.reset()  # an elastic job has changed its size
        if self._session is None:
            number = _numbering.take(self.settings.process_set.process_set_id) if number is None else number
            self._session = Session(self.settings, number)
        return self._session

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
        session = self.session()
        if self.settings.sparse_as_dense:
            gradients = [g if g is None else tf.convert_to_tensor(g) for g in gradients]
        layout = self._layout(session, gradients, variables)
        chosen = [layout.slots[i].normal(gradients[i]) for i in layout.active]
        compared = [native(variables[i]) for i in layout.compared]
        unscale = tf.cast(unscale, tf.float64)
        if tf.executing_eagerly():
            results = self._call(session, layout, unscale, compared, chosen)
        else:
            results = self._run(session, layout, unscale, self._digests(layout, compared), chosen)
        everything: list[Gradient | None] = [None] * len(gradients)
        for index, result in zip(layout.active, results, strict=True):
            everything[index] = result
        return everything

    def _layout(self, session: Session, gradients: Sequence[Gradient | None], variables: Sequence[Any]) -> Layout:
        """The layout for these parameters: the one made before, or a new one."""
        keys = tuple(key_of(variable, i) for i, variable in enumerate(variables))
        layout = session.layouts.get(keys)
        if layout is None or any(g is not None and i not in layout.active for i, g in enumerate(gradients)):
            # Python code runs at a rank's first step, whether that is being traced or not.
            with tf.init_scope():
                layout = self._lay_out(session, gradients, variables)
            session.layouts[keys] = layout
        if layout is not session.last:
            with tf.init_scope():
                self._memories.use(layout.labels, layout.past)
            session.last = layout
        return layout

    def _lay_out(self, session: Session, gradients: Sequence[Gradient | None], variables: Sequence[Any]) -> Layout:
        if not tf.executing_eagerly():
            raise RuntimeError(
                "an aggregator needs TensorFlow 2's eager execution, outside or inside a tf.function; "
                "with tf.compat.v1.Session and disable_eager_execution() use horovod.tensorflow"
            )
        if not session.layouts:
            check_granularity(self.settings, variables)
        return lay_out(
            self.settings,
            session.collectives,
            session.name,
            gradients,
            variables,
            loss_scaling=self._loss_scaling,
            meet=session.flags.meet,
            memories=self._memories,
        )

    def _call(
        self,
        session: Session,
        layout: Layout,
        unscale: tf.Tensor,
        compared: Sequence[tf.Variable],
        gradients: list[Gradient],
    ) -> list[Gradient]:
        """Run the graph of this layout from eager code, tracing it the first time."""
        if layout.compiled is None:
            layout.compiled = make_graph(
                lambda unscale, digests, *gradients: self._run(session, layout, unscale, digests, list(gradients)),
                tf.TensorSpec((), tf.float64),
                tf.TensorSpec((len(compared),), tf.int64),
                *(layout.slots[i].signature() for i in layout.active),
            )
        digests = tf.zeros((len(compared),), tf.int64)
        if compared and is_due(int(layout.count.value()), self.settings.check_replicas):
            if layout.digests is None:
                # Of their values: the graph would keep variables for as long as it is there itself.
                specs = [tf.TensorSpec(variable.shape, variable.dtype) for variable in compared]
                layout.digests = make_graph(lambda *values: digests_of(values), *specs)
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
            return tf.cond(due, lambda: digests_of(compared), none)

    def _run(
        self, session: Session, layout: Layout, unscale: tf.Tensor, digests: tf.Tensor, gradients: list[Gradient]
    ) -> list[Gradient]:
        """Add one step's operations to the graph."""
        with tf.device("cpu"):
            with tf.control_dependencies([self._still_the_same_workers()]):
                seen = session.flags.agreed(layout, digests)
            # A rank that is back after it had joined has missed steps.
            mine = seen.count[session.collectives.rank]
            missed = tf.reduce_any((seen.here == 1) & (seen.count != mine))
            count = tf.where(missed, tf.constant(0, tf.int64), mine)
        with tf.control_dependencies([seen.here]):
            gradients = identities(gradients)
        results = self._results(session, layout, unscale, seen, gradients)
        with tf.control_dependencies(tf.nest.flatten(results, expand_composites=True)):
            # No step that ends with an error counts, on any rank.
            layout.count.assign(count + 1)
        return results

    def _still_the_same_workers(self) -> tf.Operation:
        """Fail in a graph that was made for workers who were there before."""
        with tf.init_scope():
            now = self._generation.numpy()
        return errors.require(tf.equal(self._generation, now), RuntimeError(OUTDATED))

    def _results(
        self, session: Session, layout: Layout, unscale: tf.Tensor, seen: Flags, gradients: list[Gradient]
    ) -> list[Gradient]:
        """The aggregated gradients, once it is known that ranks agree."""
        settings, collectives = self.settings, session.collectives
        all_here = tf.reduce_all(seen.here == 1)
        slots = [layout.slots[i] for i in layout.active]
        aggregator = settings.aggregator
        if aggregator is None:
            return average(settings, collectives, session.name, slots, gradients, all_here)
        if not layout.packings:  # nothing has any elements
            return gradients
        memory = shared(layout.memory, layout.past, seen, collectives, session.name)
        predivide = settings.gradient_predivide_factor

        def step() -> GraphStep:
            return GraphStep(collectives, aggregator, len(layout.labels), session.name)

        def with_all() -> Any:
            given = dict(zip(layout.active, gradients, strict=True))
            return step().aggregate(layout.packings, layout.choice.schedule, predivide, unscale, memory, given)

        if layout.joined_packings is None:
            outcome = with_all()
        else:
            packings = layout.joined_packings

            def without_some() -> Any:
                given = {slot.index: slot.dense(g) for slot, g in zip(slots, gradients, strict=True)}
                found = step().aggregate(packings, ONLY_SUMS.schedule, predivide, unscale, memory, given)
                results = [slot.normal(result) for slot, result in zip(slots, found.gradients, strict=True)]
                return found._replace(gradients=results)

            outcome = Outcome(*tf.cond(all_here, with_all, without_some))
        for name, value in outcome.memory.items():
            layout.memory[name].assign(value)
        session.seen.keep({**outcome.seen, "all here": all_here})
        return list(outcome.gradients)

    # --- beside steps ---------------------------------------------------------------------------

    def stray(self, how: str) -> None:
        """Tell all ranks that this one took a step along gradients that were never aggregated, and raise the error."""
        if not self.settings.process_set.included():
            return
        with tf.init_scope():
            session = self.session()
        session.flags.stray(how)

    @property
    def report(self) -> Report | None:
        """The report on the last step; None before the first and without an aggregator."""
        if self._session is None or self._session.last is None:
            return None
        return self._session.seen.report(self._session.last)

    def state_dict(self) -> dict[str, Any]:
        """The aggregator's memory, as numbers and arrays."""
        return self._memories.state_dict()

    def gather_history(self) -> None:
        """Hold the mean gradients of earlier steps of all ranks, until the next step. All ranks call this together."""
        if self._session is not None:
            self._memories.gather_history(self._session.collectives, self._session.name)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned, saved by any number of workers."""
        self._memories.load_state_dict(state)

    def reset(self) -> None:
        """Forget what was agreed on, as when workers have come or gone; keep what was learnt."""
        self._memories.reset()
        self._generation.assign_add(1)
        self._session = None
