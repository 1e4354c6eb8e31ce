"""The layout that ranks agree on for one list of parameters: slots, packings and schedule.

It is made once, in Python, even while a graph is traced (``tf.init_scope`` leads out of the graph). Every rank traces
at its first step, so every rank is there. Another trace of the same parameters, for a batch of another size, finds the
layout made and talks to nobody: ranks need not retrace together.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import tensorflow as tf

from .. import agreement
from ..collectives import host_name
from ..collectives.horovod_tensorflow import HorovodTensorFlow, make_variable
from ..costs import Choice
from ..engine.history import Place, intervals_of
from ..engine.session import ONLY_SUMS, Arrival, Parameter, agree, canonical_names, choose_schedule, describe
from ..engine.settings import Settings, check_members
from ..schedules import SCHEDULES
from .memory import Memories, Past
from .packing import DensePacking, Gradient, Packing, Slot, pack
from .variables import is_trainable, is_variable, key_of, native

__all__ = ["Layout", "check_granularity", "lay_out"]


@dataclass
class Layout:
    """The outcome of ranks' agreement on one list of parameters."""

    slots: list[Slot]
    #: Indices of slots for which some rank had a gradient.
    active: list[int]
    packings: list[Packing]
    #: The packings for when a rank has joined; None if the others need only sums anyway.
    joined_packings: list[Packing] | None
    #: One label for each group of parameters, which tells it from the others.
    labels: tuple[Hashable, ...]
    choice: Choice
    #: Stands for the settings and parameters that ranks have in common.
    digest: int
    #: 1 for this rank and 0 for the others, int64. A variable, because TensorFlow would evaluate a
    #: collective of constants once and for all.
    here: tf.Variable
    #: How many steps were taken since ranks laid this out together, int64. Each layout counts its own, because each
    #: has variables of its own to compare.
    count: tf.Variable
    #: Indices of the slots whose variables are compared between ranks.
    compared: list[int]
    #: The aggregator's memory of these groups.
    memory: dict[str, tf.Variable]
    #: Its history, where it has one.
    past: Past | None = None
    #: For eager code: the graph of a step, and that of the digests of the variables.
    compiled: Any = None
    digests: Any = None


def lay_out(
    settings: Settings,
    collectives: HorovodTensorFlow,
    name: str,
    gradients: Sequence[Gradient | None],
    variables: Sequence[Any],
    *,
    loss_scaling: bool,
    meet: Callable[[int], None],
    memories: Memories,
) -> Layout:
    """Agree with the other ranks on slots, packings and schedule, and make them.

    ``meet`` makes sure that all ranks lay out now, and ``memories`` has the variables for the groups' memory.
    """
    keys = [key_of(variable, i) for i, variable in enumerate(variables)]
    group_of, groups = settings.group_parameters(keys)
    # Of a layer, whichever are trained.
    labels = tuple(keys) if settings.granularity == "layer" else tuple(range(groups))
    names = canonical_names([_name(variable, i) for i, variable in enumerate(variables)])
    slots = [
        Slot(i, key, name, *_shape_and_type(variable, gradient), group_of[key])
        for i, (key, name, variable, gradient) in enumerate(zip(keys, names, variables, gradients, strict=True))
    ]
    parameters = [Parameter(slot.key, slot.name, slot.dtype.name, slot.shape, slot.group) for slot in slots]
    description = describe(settings, parameters, op=settings.op, loss_scaling=loss_scaling)
    digest = agreement.digest(description)
    meet(digest)
    mine = Arrival(
        digest,
        host_name(),
        sparse=[i for i, g in enumerate(gradients) if isinstance(g, tf.IndexedSlices)],
        active=[i for i, g in enumerate(gradients) if g is not None],
    )
    arrivals = agree(collectives, mine, description, name)
    # A parameter may have a sparse gradient on one rank, and a dense one or none on another.
    for index in {i for arrival in arrivals for i in arrival.sparse}:
        slots[index] = replace(slots[index], sparse=True)
    active = sorted({i for arrival in arrivals for i in arrival.active})
    used = [slots[i] for i in active]
    choice = choose_schedule(
        settings,
        collectives,
        [arrival.host for arrival in arrivals],
        sum(slot.length * slot.dtype.size for slot in used if not slot.sparse),
        tf.zeros(()),
        name,
    )

    aggregator = settings.aggregator
    history = 0 if aggregator is None else aggregator.history

    def packings_for(schedule_name: str, slots: Sequence[Slot]) -> list[Packing]:
        return pack(
            f"{name}.{schedule_name}",
            slots,
            SCHEDULES[schedule_name](collectives, history=history),
            bucket_bytes=settings.bucket_bytes,
            together=settings.shared_buckets([slot.key for slot in slots]),
            compression=settings.compression,
        )

    packings = packings_for(choice.schedule, used) if aggregator is not None else []
    joined_packings, past = None, None
    only_sums = choice.schedule == ONLY_SUMS.schedule and not any(slot.sparse for slot in used)
    if aggregator is not None and not aggregator.needs and not only_sums:
        joined_packings = packings_for(ONLY_SUMS.schedule, [replace(slot, sparse=False) for slot in used])
    if history:

        def compare(memory: tuple[int, int], held: Sequence[tuple[int, int]]) -> list[Arrival]:
            return agree(collectives, replace(mine, memory=memory, held=held), description, name)

        lengths, places = _places(used, packings)
        past = memories.resume(labels, lengths, places, collectives, name, settings.process_set.ranks, compare)
    with tf.device("cpu"):
        here = make_variable(tf.one_hot(collectives.rank, collectives.size, dtype=tf.int64))
        count = make_variable(tf.zeros((), tf.int64))
    return Layout(
        slots,
        active,
        packings,
        joined_packings,
        labels,
        choice,
        digest,
        here,
        count,
        _compared(settings, variables, slots),
        memories.of(labels, collectives.size) | ({} if past is None else past.variables),
        past,
    )


def _places(slots: Sequence[Slot], packings: Sequence[Packing]) -> tuple[list[int], list[Place]]:
    """The lengths of the dense gradients, and where in all of them the elements of each packing lie."""
    dense = [slot for slot in slots if not slot.sparse]
    lengths = [slot.length for slot in dense]
    intervals = {slot.index: interval for slot, interval in zip(dense, intervals_of(lengths), strict=True)}
    keepers = [(packing.slots, packing.kept) for packing in packings if isinstance(packing, DensePacking)]
    return lengths, [Place(kept, [intervals[slot.index] for slot in members]) for members, kept in keepers if kept]


def check_granularity(settings: Settings, variables: Sequence[Any]) -> None:
    """Refuse a granularity that names variables which are not among these, before the first layout.

    Later some may be frozen, and what is frozen now may be trained later.
    """
    if not isinstance(settings.granularity, str):
        named = [each for group in settings.granularity for each in group if is_trainable(each.parameter)]
        check_members("granularity", named, {key_of(variable, i) for i, variable in enumerate(variables)})


def _compared(settings: Settings, variables: Sequence[Any], slots: Sequence[Slot]) -> list[int]:
    """The slots whose variables are compared between ranks; a mere tensor has no value to keep equal."""
    if not settings.check_replicas:
        return []
    differing = settings.differing
    return [
        slot.index
        for slot, variable in zip(slots, variables, strict=True)
        if is_variable(variable) and slot.key not in differing
    ]


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
