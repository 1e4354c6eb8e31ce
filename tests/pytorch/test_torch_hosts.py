"""Hosts as workers: the aggregator combines the averages of hosts, whatever the number of ranks on each."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

pytestmark = pytest.mark.time_limit(120)


def wrapped(parameters: Any, aggregator: Any, **options: Any) -> Any:
    import torch

    import adacons_hvd.torch as hvd

    hvd.init()
    options = {"bucket_bytes": 256, "workers": "host", **options}
    return hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=0.02), aggregator=aggregator, **options)


def train(dtype_name: str, tolerance: float) -> list[Any]:
    """Train with several aggregators and arguments beside the oracle, of which each is given the hosts' averages."""
    import numpy as np
    import oracle
    import torch
    from torch_job import Batches, array, assert_equal_bits, loss_of, network

    import adacons_hvd.torch as hvd
    from adacons_hvd import AdaCons, Curvature, Mean

    import harness

    dtype = getattr(torch, dtype_name)
    curvature = {"oracle": oracle.CurvatureOracle, "memory": 3, "damping": 0.5}
    cases: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
        (AdaCons(momentum=0.9), {"momentum": 0.9}, {}),
        (AdaCons(momentum=0.9, scale="average"), {"momentum": 0.9, "scale": "average"}, {"granularity": "layer"}),
        (AdaCons(momentum=0.5), {"momentum": 0.5}, {"overlap": False, "bucket_bytes": 1 << 20}),
        (AdaCons(), {}, {"backward_passes_per_step": 2}),
        (Curvature(memory=3, damping=0.5), curvature, {}),
        (Mean(), {"oracle": _MeanOracle}, {}),
    ]
    reports = []
    for seed, (aggregator, settings, options) in enumerate(cases):
        model, batches = network(seed, dtype), Batches(seed, dtype)
        parameters = list(model.parameters())
        optimizer = wrapped(parameters, aggregator, **options)
        numbers = range(len(parameters))
        groups = [[i] for i in numbers] if options.get("granularity") == "layer" else [list(numbers)]
        judge = oracle.Grouped(groups, **settings)
        for step in range(6):
            optimizer.zero_grad()
            for _ in range(options.get("backward_passes_per_step", 1)):
                loss_of(model, batches).backward()
                # Before the gradients are replaced, though some of them may be on their way.
                raw = [array(p.grad, p) for p in parameters]
            optimizer.synchronize()
            everyone = harness.gather(raw)
            hosts = [everyone[first : first + 2] for first in range(0, len(everyone), 2)]
            averages = [[np.mean(pair, axis=0) for pair in zip(*host, strict=True)] for host in hosts]
            off = oracle.error([array(p.grad, p) for p in parameters], judge(averages))
            assert off <= tolerance, f"{aggregator!r}, step {step}, is off by {off:.2e}"
            with optimizer.skip_synchronize():
                optimizer.step()
        assert_equal_bits(parameters)
        reports.append((optimizer.report.schedule, optimizer.report.choice.hosts, len(optimizer.report.norms[0])))
        assert hvd.local_size() == 2
    return reports


class _MeanOracle:
    def __call__(self, gradients: Any) -> Any:
        return sum(gradients) / len(gradients)


@pytest.mark.ranks(4, 6, launcher="mpi-hosts")
@pytest.mark.time_limit(200)
def test_hosts_agree_with_the_oracle(cluster):
    count = cluster.ranks // 2
    hosts = tuple((2 * host, 2 * host + 1) for host in range(count))
    assert cluster.run(train, "float32", 1e-5) == [[("hosts", hosts, count)] * 6] * cluster.ranks


@pytest.mark.ranks(4, launcher="gloo-hosts")
@pytest.mark.time_limit(200)
def test_hosts_agree_with_the_oracle_in_float64(cluster):
    assert cluster.run(train, "float64", 1e-12) == [[("hosts", ((0, 1), (2, 3)), 2)] * 6] * 4
