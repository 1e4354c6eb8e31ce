"""Try schedules out, where a step of each takes no time to speak of.

A step of a few milliseconds is Python more than anything else, and processes that wake each other up, of which rates
(:mod:`adacons_hvd.calibration`) know little. So its schedules take a few steps in turns, with a gradient of ones.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping

from ..aggregators import AdaCons
from ..calibration import python_seconds, slowest
from ..collectives import Collectives
from ..ops import Tensor, ops_for
from ..schedules import SCHEDULES, Bucket, DenseBucket, Segment, Step

__all__ = ["is_short", "trial"]

#: Bytes of the largest gradient with which schedules are tried out, and how many messages it may be; and seconds that
#: one of them must be expected to take at most. With a noisy neighbour what takes five is expected to take fifty.
_LARGEST = 8 << 20
_MESSAGES = 8
_LONGEST = 0.05
_TURNS = 11


def is_short(expected: Mapping[str, float], workers: int, size: float, bucket: float, reference: Tensor) -> bool:
    """Whether schedules may be tried out that are expected to take so many seconds, for ``size`` bytes of gradient.

    What runs on a device or in a graph is not.
    """
    short = 0 < size <= min(_LARGEST, _MESSAGES * bucket) and min(expected.values()) <= _LONGEST
    return workers > 1 and short and ops_for(reference).on_host(reference)


def trial(
    names: Iterable[str], collectives: Collectives, size: float, bucket: float, reference: Tensor, name: str
) -> dict[str, float]:
    """Seconds that a step of each of these schedules takes, the same on every worker.

    ``size`` is that of the gradient in bytes, which is sent in messages of ``bucket`` bytes; ``name`` is a prefix for
    the names of collectives.
    """
    steps = {which: _step(which, collectives, size, bucket, reference, f"{name}.{which}") for which in names}
    seconds: dict[str, list[float]] = {which: [] for which in steps}
    for turn in range(1 + _TURNS):
        for which, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:  # the first one also sets things up
                seconds[which].append(time.perf_counter() - start)
    # A binding's own Python takes about as long as that of the step it calls.
    binding = python_seconds(collectives.size, reference)
    # A quarter was quicker, because steps get quicker as ranks settle on their processors.
    mine = [binding + statistics.quantiles(seconds[which], n=4)[0] for which in steps]
    found = dict(zip(steps, slowest(collectives, mine, reference, f"{name}.seconds"), strict=True))
    if collectives.direct is not None:
        collectives.direct.forget(name)
    return found


def _step(
    which: str, collectives: Collectives, size: float, bucket: float, reference: Tensor, name: str
) -> Callable[[], None]:
    """A step by that schedule, with what workers tell each other in it."""
    ops, direct = ops_for(reference), collectives.direct
    schedule = SCHEDULES[which](collectives)
    buckets: list[Bucket] = []
    left = max(1, int(size) // 4)
    while left > 0:
        length = min(left, max(1, int(min(bucket, size)) // 4))
        left -= length
        flat = ops.gradient(ops.zeros((-(-length // schedule.multiple) * schedule.multiple,), reference) + 1)
        segments = [Segment(0, length, 0)]
        buckets.append(DenseBucket(f"{name}.{len(buckets)}", flat, segments, schedule))
    step = Step(collectives, AdaCons(), 1, name)
    memory = step.run(buckets, {})[0].memory
    flags = ops.zeros((1,), reference)

    def once() -> None:
        if direct is not None and direct.prepare(flags, f"{name}.flags"):
            direct.sum(flags, f"{name}.flags")
            direct.sum(flags, f"{name}.flags")  # as ranks confirm that they have everyone's
        step.run(buckets, memory)

    return once
