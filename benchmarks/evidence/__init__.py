"""Does adaptive consensus help? The studies behind ``docs/evidence.md``: ``python -m benchmarks.evidence``.

Workers are simulated: one process computes a gradient for each of them and hands the N x d matrix
to an aggregator, the same object that a training job would use. Every method is compared at its
own best learning rate, and with controls that isolate what consensus itself adds.
"""
