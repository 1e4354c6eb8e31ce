"""How gradients move: the same weights, by different sequences of collectives.

A *bucket* is a flat piece of every worker's gradient that travels as one message. A *group* is the
set of parameters that shares one weight per worker; a bucket can hold segments of several groups,
and a group can span several buckets. One step is :meth:`Step.run`:

1. every bucket's first collective begins (bindings call :meth:`Bucket.begin` as soon as backward
   has filled a bucket, long before the rest of the step);
2. each bucket yields its share of the statistics, and one small sum over the workers completes
   them;
3. the aggregator turns statistics into weights;
4. every bucket combines the gradients with the weights.

A *schedule* says what 1, 2 and 4 are. The first three compute the same thing; the others differ
from ``two-pass`` in what the first pass sends, and so know the inner products only nearly:

============  =====================================  ====================  ======================
schedule      1                                      2, local part         4
============  =====================================  ====================  ======================
``two-pass``  allreduce the gradient                 own moments           scale, allreduce
``one-pass``  alltoall: everyone's k-th shard to k   moments of the shard  combine, allgather
``gather``    allreduce everyone's rows, mostly 0    moments of it all     combine
``half``      allreduce it in half precision         own moments           scale, allreduce
``sketch``    allreduce a random sketch of it        own moments           scale, allreduce
============  =====================================  ====================  ======================

Each family has a file, with its cost beside it; ``docs/schedules.md`` compares what they send. No
framework and no communication library is named here; gradients come in through
:mod:`adacons_hvd.collectives` and arithmetic happens in :mod:`adacons_hvd.ops`.
"""

from .base import Bucket, Combination, DenseBucket, Schedule, Segment, Transfer
from .gather import Gather
from .half import HalfPass
from .hosts import HostPass
from .one_pass import OnePass, Scatter
from .sketch import Sketch
from .sparse import SparseBucket
from .step import Step
from .two_pass import TwoPass

__all__ = [
    "SCHEDULES",
    "Bucket",
    "Combination",
    "DenseBucket",
    "HostPass",
    "Scatter",
    "Schedule",
    "Segment",
    "SparseBucket",
    "Step",
    "Transfer",
]

#: Every schedule, by the name a user gives it.
SCHEDULES: dict[str, type[Schedule]] = {s.name: s for s in (TwoPass, OnePass, Gather, HalfPass, Sketch)}
