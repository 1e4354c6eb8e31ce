"""All of ``horovod.tensorflow.keras``, with an optimizer that aggregates under Keras 3.

import adacons_hvd.tensorflow.keras as hvd        # was: import horovod.tensorflow.keras as hvd
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any

# First, because it raises an error where tf.keras cannot be used.
from ...keras.tensorflow_backend import broadcast_global_variables as broadcast_global_variables

# isort: split

import tensorflow as tf
from horovod.tensorflow.keras import *  # noqa: F403
from horovod.tensorflow.keras import Average, Compression, ProcessSet, global_process_set

from ...aggregators import AdaCons as AdaCons
from ...aggregators import Aggregator
from ...engine.replicas import CHECK_REPLICAS
from ...engine.settings import BUCKET_BYTES
from ...keras.backends import uses_keras_2
from ...keras.public import distribute, keep_local, make_load_model

# From now on steps are watched, whichever optimizer takes them.
import_module("adacons_hvd.keras.legacy" if uses_keras_2() else "adacons_hvd.keras.optimizer")

# Horovod's modules of these names are here already, and would be what `from . import` finds.
callbacks = import_module(".callbacks", __name__)
elastic = import_module(".elastic", __name__)


def DistributedOptimizer(  # noqa: N802 - Horovod's name
    optimizer: Any,
    name: str | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    sparse_as_dense: bool = False,
    gradient_predivide_factor: float = 1.0,
    op: int = Average,
    backward_passes_per_step: int = 1,
    average_aggregated_gradients: bool = False,
    num_groups: int = 0,
    groups: int | list[list[Any]] | None = None,
    process_set: ProcessSet = global_process_set,
    scale_local_gradients: bool = True,
    *,
    aggregator: Aggregator | None = None,
    schedule: str = "auto",
    granularity: str | Sequence[Sequence[Any]] = "model",
    bucket_bytes: int = BUCKET_BYTES,
    check_replicas: int = CHECK_REPLICAS,
    may_differ: Iterable[Any] = (),
    workers: str = "rank",
) -> Any:
    """Wrap an optimizer so that its steps use the gradients of all workers.

    Without an ``aggregator`` gradients are averaged, by Horovod's own reduction (Horovod's own
    optimizer does not do that under Keras 3, nor anything else). With one they are combined by it.
    For ``model.fit`` and for loops of your own that call ``apply`` or ``apply_gradients``.

    Args:
        optimizer: the optimizer to wrap, of Keras 3 or of ``tf_keras``; a ``LossScaleOptimizer``,
            too. It must not be used any more; both share one state.
        name: of no effect, since operations are numbered.
        device_dense, device_sparse, sparse_as_dense, process_set: as in Horovod.
        compression: ``Compression.fp16`` sends half-precision gradients. A compressor of your own
            is applied to every gradient and undone before it is sent, so that what it loses
            counts as lost; it does not shorten the messages.
        gradient_predivide_factor: as in Horovod, for the sums that ``two-pass`` makes.
        op: must stay Horovod's ``Average`` if there is an aggregator, which takes its place.
        backward_passes_per_step: how many steps to add gradients up for before they are sent and
            applied, as in Horovod. Keras' own ``gradient_accumulation_steps`` works as well.
        average_aggregated_gradients: whether such a sum is divided by the number of its steps.
        num_groups: Horovod's older name for an integer ``groups``.
        groups: which gradients travel together, as in Horovod. This says nothing about weights;
            see ``granularity``.
        scale_local_gradients: as in Horovod: whether the gradients of local variables are divided
            by the number of workers.
        aggregator: for example ``AdaCons()``.
        schedule: how gradients move. ``"auto"`` takes the cheapest of ``"two-pass"``,
            ``"one-pass"`` and ``"gather"``, whose result is the same; ``"fast"`` may also take
            ``"half"`` or ``"sketch"``, whose weights are nearly so. Both measure what the cluster
            can do.
        granularity: which parameters share one weight per worker: ``"model"`` (all, as in the
            paper), ``"layer"`` (every tensor has its own), or lists of variables (those in no
            list form one more group).
        bucket_bytes: how much gradient makes one message.
        check_replicas: every how many steps ranks compare the variables they train, and all raise an
            error if these differ; 0 never.
        may_differ: variables that are meant to differ between ranks, left out of that. Local
            variables are left out by themselves.
        workers: must stay ``"rank"``. Hosts can be workers with PyTorch over Horovod and with DDP.

    The returned optimizer has four more attributes: ``aggregator``; ``report``, a
    :class:`adacons_hvd.report.Report` on the last step, or None; ``register_local_var``, as in
    Horovod; and ``gather_history()``, which all ranks call before one of them saves what an
    aggregator with a history, as ``Curvature``, remembers. What Keras saves of it is what it
    would save of the wrapped optimizer, and beside that the aggregator's memory.

    Start this with ``horovodrun -np 2 python script.py``:

    >>> import keras, numpy
    >>> import adacons_hvd.tensorflow.keras as hvd
    >>> from adacons_hvd import AdaCons
    >>> hvd.init()
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(), aggregator=AdaCons())
    >>> model.compile(optimizer, loss="mse")
    >>> history = model.fit(numpy.ones((8, 3)), numpy.ones((8, 1)), verbose=0)
    >>> optimizer.report.fallbacks
    0
    """
    return distribute(**locals())


def PartialDistributedOptimizer(optimizer: Any, *args: Any, local_layers: Any = None, **kwargs: Any) -> Any:  # noqa: N802
    """:func:`DistributedOptimizer`, but the variables of ``local_layers`` stay each rank's own."""
    return keep_local(DistributedOptimizer(optimizer, *args, **kwargs), local_layers)


load_model = make_load_model(lambda: tf.keras, DistributedOptimizer, Compression.none)
