"""``DistributedGradientTape``: Horovod's, with an aggregator."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import horovod.tensorflow as hvd
import tensorflow as tf
from horovod.tensorflow.compression import Compression
from horovod.tensorflow.mpi_ops import ProcessSet, global_process_set

from ..aggregators import Aggregator, pack_memory
from ..costs import Network
from ..engine.replicas import CHECK_REPLICAS
from ..engine.settings import BUCKET_BYTES, Settings, groups_or_number
from ..report import Report
from .checkpoints import StateBase
from .packing import Gradient
from .reducer import Reducer
from .variables import VARIABLES, key_of, native

__all__ = ["DistributedGradientTape", "PartialDistributedGradientTape", "TapeState"]


@tf.autograph.experimental.do_not_convert
def DistributedGradientTape(  # noqa: N802 - Horovod's name
    gradtape: tf.GradientTape,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    sparse_as_dense: bool = False,
    op: int = hvd.Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: int | list[list[Any]] | None = None,
    process_set: ProcessSet = global_process_set,
    scale_local_gradients: bool = True,
    *,
    aggregator: Aggregator | None = None,
    schedule: str | Network = "auto",
    granularity: str | Sequence[Sequence[Any]] = "model",
    bucket_bytes: int = BUCKET_BYTES,
    check_replicas: int = CHECK_REPLICAS,
    may_differ: Iterable[Any] = (),
    workers: str = "rank",
    name: str = "",
) -> tf.GradientTape:
    """Wrap a tape so that its gradients are those of all workers.

    Without an ``aggregator`` gradients are averaged, or whatever ``op`` says, by Horovod's own
    reduction. With one they are combined by it. Works eagerly and inside a ``tf.function``, with
    TensorFlow's variables and with those of Keras 3 (which Horovod's own tape does not accept).

    Args:
        gradtape: the tape to wrap; it must not be used any more.
        device_dense, device_sparse, sparse_as_dense, process_set: as in Horovod.
        compression: ``Compression.fp16`` sends half-precision gradients. A compressor of your own
            is applied to every gradient and undone before it is sent, so that what it loses
            counts as lost; it does not shorten the messages.
        op: must stay Horovod's ``Average`` if there is an aggregator, which takes its place.
        gradient_predivide_factor: as in Horovod, for the sums that ``two-pass`` makes.
        num_groups: Horovod's older name for an integer ``groups``.
        groups: which gradients travel together, as in Horovod. This says nothing about weights;
            see ``granularity``.
        scale_local_gradients: as in Horovod: whether the gradients of local sources are divided
            by the number of workers.
        aggregator: for example ``AdaCons()``. What it remembers belongs to the variables: another
            tape with equal settings for the same variables goes on from there, so it makes no
            difference that a new tape is made every step.
        schedule: how gradients move. ``"auto"`` takes the cheapest of ``"two-pass"``,
            ``"one-pass"`` and ``"gather"``, whose result is the same; ``"fast"`` may also take
            ``"half"`` or ``"sketch"``, whose weights are nearly so. Both measure what the cluster
            can do; a :class:`adacons_hvd.costs.Network` in their place gives figures to go by.
        granularity: which parameters share one weight per worker: ``"model"`` (all, as in the
            paper), ``"layer"`` (every tensor has its own), or lists of variables (those in no
            list form one more group).
        bucket_bytes: how much gradient makes one message.
        check_replicas: every how many steps ranks compare the variables they are asked about, and all
            raise a ``ReplicaError`` if these differ (inside a ``tf.function`` of yours an
            ``InvalidArgumentError`` with the same text); 0 never.
        may_differ: variables that are meant to differ between ranks, left out of that.
        workers: must stay ``"rank"``. Hosts can be workers with PyTorch over Horovod and with DDP.
        name: tells apart tapes that take other gradients of the same variables, as of two losses.

    The returned tape has one more attribute, ``report``: a :class:`adacons_hvd.report.Report` on
    the last step, or None.

    Start this with ``horovodrun -np 2 python script.py``:

    >>> import tensorflow as tf
    >>> import adacons_hvd.tensorflow as hvd
    >>> from adacons_hvd import AdaCons
    >>> hvd.init()
    >>> weights = tf.Variable([1.0, 2.0])
    >>> with tf.GradientTape() as tape:
    ...     loss = tf.reduce_sum(weights**2)
    >>> tape = hvd.DistributedGradientTape(tape, aggregator=AdaCons(scale="average"))
    >>> tape.gradient(loss, [weights])[0].numpy()
    array([2., 4.], dtype=float32)
    """
    settings = Settings.checked(
        VARIABLES,
        hvd,
        aggregator=aggregator,
        schedule=schedule,
        granularity=granularity,
        compression=compression,
        gradient_predivide_factor=gradient_predivide_factor,
        groups=groups_or_number(groups, num_groups),
        sparse_as_dense=sparse_as_dense,
        process_set=process_set,
        bucket_bytes=bucket_bytes,
        op=op,
        device_dense=device_dense,
        device_sparse=device_sparse,
        check_replicas=check_replicas,
        may_differ=may_differ,
        workers=workers,
    )
    # As in Horovod, the result is of a new class derived from the tape's own, and it takes over
    # what the tape has recorded.
    base = type(gradtape)
    wrapped: Any = object.__new__(type(base.__name__, (_Aggregating, base), {"_base": base}))
    wrapped.__dict__.update(gradtape.__dict__)
    wrapped._settings = settings
    wrapped._name = name
    wrapped._reducer = None
    wrapped._local_sources = set()
    wrapped.process_set = process_set
    wrapped.scale_local_gradients = scale_local_gradients
    wrapped.aggregator = aggregator
    return wrapped


@tf.autograph.experimental.do_not_convert
def PartialDistributedGradientTape(  # noqa: N802 - Horovod's name
    gradtape: tf.GradientTape,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    sparse_as_dense: bool = False,
    op: int = hvd.Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: int | list[list[Any]] | None = None,
    process_set: ProcessSet = global_process_set,
    local_layers: Any = None,
    scale_local_gradients: bool = True,
    **ours: Any,
) -> tf.GradientTape:
    """:func:`DistributedGradientTape`, but the variables of ``local_layers`` stay each rank's own."""
    tape: Any = DistributedGradientTape(
        gradtape,
        device_dense,
        device_sparse,
        compression,
        sparse_as_dense,
        op,
        gradient_predivide_factor,
        num_groups,
        groups,
        process_set,
        scale_local_gradients,
        **ours,
    )
    for variable in variables_of(local_layers):
        tape.register_local_source(variable)
    return tape


def variables_of(local_layers: Any) -> list[Any]:
    """The trainable variables of a layer, or of several."""
    if local_layers is None:
        return []
    layers: Iterable[Any] = local_layers if isinstance(local_layers, (list, tuple, set)) else [local_layers]
    layers = list(layers)
    for layer in layers:
        if not hasattr(layer, "trainable_weights"):
            raise ValueError(f"local_layers must hold Keras layers, found {type(layer).__name__}")
    return [variable for layer in layers for variable in layer.trainable_weights]


class _Aggregating(tf.GradientTape):
    """The base that is added to the tape's class. Never instantiated itself."""

    _base: type[tf.GradientTape]
    _settings: Settings
    _name: str
    _reducer: Reducer | None

    @property
    def report(self) -> Report | None:
        return None if self._reducer is None else self._reducer.report

    def register_local_source(self, source: Any) -> None:
        """Keep the gradient of this variable each rank's own."""
        self._local_sources.add(key_of(source))

    @tf.autograph.experimental.do_not_convert
    def gradient(
        self,
        target: Any,
        sources: Any,
        output_gradients: Any = None,
        use_generic_names: bool = False,
        unconnected_gradients: Any = tf.UnconnectedGradients.NONE,
    ) -> Any:
        """As the wrapped tape's, with the gradients of all workers.

        ``use_generic_names`` is Horovod's, for names that do not depend on the graph; here they
        never do.
        """
        gradients = self._base.gradient(self, target, sources, output_gradients, unconnected_gradients)
        # Keras 3's variables are no part of TensorFlow's structures.
        single = not isinstance(sources, (list, tuple, dict))
        flat_sources = [sources] if single else list(sources.values() if isinstance(sources, dict) else sources)
        flat = [gradients] if single else list(gradients.values() if isinstance(gradients, dict) else gradients)
        results = self._aggregate(flat, flat_sources)
        if single:
            return results[0]
        if isinstance(sources, dict):
            return dict(zip(sources, results, strict=True))
        return results

    def get_local_and_global_gradients(
        self, target: Any, sources: Any, output_gradients: Any = None, use_generic_names: bool = False
    ) -> tuple[list[tuple[Any, Any]], list[tuple[Any, Any]]]:
        """(variable, gradient) pairs of the local sources, and those of the others."""
        gradients = self.gradient(target, sources, output_gradients, use_generic_names)
        pairs = list(zip(sources, gradients, strict=True))
        local = [pair for pair in pairs if key_of(pair[0]) in self._local_sources]
        return local, [pair for pair in pairs if key_of(pair[0]) not in self._local_sources]

    def _aggregate(self, gradients: list[Gradient | None], sources: list[Any]) -> list[Gradient | None]:
        keys = [key_of(source, i) for i, source in enumerate(sources)]
        shared = [i for i, key in enumerate(keys) if key not in self._local_sources]
        results = [
            g if i in shared else local_gradient(g, self.process_set, self.scale_local_gradients)
            for i, g in enumerate(gradients)
        ]
        if shared:
            some = [sources[i] for i in shared]
            self._reducer = _reducer_for(self._settings, some, self._name)
            aggregated = self._reducer.reduce([gradients[i] for i in shared], some)
            for i, gradient in zip(shared, aggregated, strict=True):
                results[i] = gradient
        return results


def local_gradient(gradient: Gradient | None, process_set: ProcessSet, scale: bool) -> Gradient | None:
    """A local variable's gradient, made as long as its share of an average would be."""
    if gradient is None or not scale or not process_set.included():
        return gradient
    if isinstance(gradient, tf.IndexedSlices):
        values = gradient.values / tf.cast(process_set.size(), gradient.values.dtype)
        return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
    return gradient / tf.cast(process_set.size(), gradient.dtype)


# A tape is made anew every step, but what an aggregator remembers must not be: it belongs to the
# variables the tape is asked about.
_reducers: dict[Hashable, Reducer] = {}


def _reducer_for(settings: Settings, sources: Sequence[Any], name: str) -> Reducer:
    key = (name, settings, tuple((key_of(source, i), tuple(source.shape)) for i, source in enumerate(sources)))
    if key not in _reducers:
        _reducers[key] = Reducer(settings)
        _take_up_restored()
        variable = native(sources[0])
        if isinstance(variable, tf.Variable):
            weakref.finalize(variable, _reducers.pop, key, None)
    return _reducers[key]


# States that a checkpoint holds and that no reducer has taken up yet, by the reducers' places.
_restored: dict[int, dict[str, Any]] = {}


def _take_up_restored() -> None:
    with tf.init_scope():
        for place, reducer in enumerate(_reducers.values()):
            if place in _restored:
                reducer.load_state_dict(_restored.pop(place))


class TapeState(StateBase):
    """The memories of all tapes' aggregators, for ``tf.train.Checkpoint``.

    A tape lives for a step, so a checkpoint cannot hold it. What tapes leave behind is told apart
    by the order in which they are first used, which must be the same when training goes on.

    ``tf.train.Checkpoint(model=model, optimizer=optimizer, tapes=hvd.TapeState())``
    """

    def __init__(self) -> None:
        self._exchange = self

    def state_dict(self) -> dict[str, Any]:
        states = {**_restored, **{place: reducer.state_dict() for place, reducer in enumerate(_reducers.values())}}
        return {f"{place}/{name}": value for place, state in states.items() for name, value in state.items()}

    def gather_history(self) -> None:
        """Bring the mean gradients of earlier steps, which are spread over the ranks, to every rank.

        For aggregators with a history, as ``Curvature``. All ranks call this before one of them saves a checkpoint,
        which then holds all of them; it is good until the next step.
        """
        with tf.init_scope():
            for reducer in list(_reducers.values()):
                reducer.gather_history()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _restored.clear()
        for key, value in state.items():
            place, name = key.split("/")
            _restored.setdefault(int(place), {})[name] = value
        # What was not used by then remembers nothing.
        for unused in range(len(_reducers)):
            _restored.setdefault(unused, pack_memory({}, 0))
        _take_up_restored()
