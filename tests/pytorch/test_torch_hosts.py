"""Hosts as workers: the aggregator combines the averages of hosts, whatever the number of ranks on each."""

from __future__ import annotations

import re
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
    import harness
    import numpy as np
    import oracle
    import torch
    from torch_job import Batches, array, assert_equal_bits, loss_of, network

    import adacons_hvd.torch as hvd
    from adacons_hvd import AdaCons, Curvature, Mean

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


def message_of(action: Any) -> str:
    """The error that this rank raised, which all do; it is for the caller to say which."""
    try:
        action()
    except (ArithmeticError, NotImplementedError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def refusals() -> dict[str, str]:
    """Whatever goes with ranks alone, tried one after the other."""
    import harness
    import torch
    from torch_job import assert_equal_bits

    import adacons_hvd.torch as hvd
    from adacons_hvd import AdaCons

    def tried(
        change: Any = None, sparse: bool = False, aggregator: Any = None, leaves_at: int = -1, **options: Any
    ) -> str:
        torch.manual_seed(0)
        table = torch.nn.Embedding(9, 4, sparse=sparse)
        optimizer = wrapped(table.parameters(), aggregator or AdaCons(), **options)

        def step() -> None:
            for number in range(3):
                if number == leaves_at and harness.rank() == 3:
                    hvd.join()
                    return
                optimizer.zero_grad()
                table(torch.arange(number, 5) + harness.rank()).square().sum().backward()
                if change is not None:
                    change(number, table.weight.grad)
                optimizer.step()

        message = message_of(step)
        if message == "no error" and leaves_at < 0:
            assert_equal_bits([table.weight])
        return message

    def spoil(number: int, gradient: torch.Tensor) -> None:
        if number == 1 and harness.rank() == 3:
            gradient[0, 0] = float("nan")

    found = {
        "sparse": tried(sparse=True),
        "sparse as dense": tried(sparse=True, sparse_as_dense=True),
        "spoilt": tried(spoil, aggregator=AdaCons(nonfinite="raise")),
        "differ": tried(workers="host" if harness.rank() else "rank"),
        "exclude": message_of(lambda: wrapped([torch.zeros(1)], AdaCons(nonfinite="exclude"))),
        "schedule": message_of(lambda: wrapped([torch.zeros(1)], AdaCons(), schedule="gather")),
        "workers": message_of(lambda: wrapped([torch.zeros(1)], AdaCons(), workers="hosts")),
    }

    found["joined"] = tried(leaves_at=1)
    if harness.rank() != 3:
        hvd.join()
    return found


@pytest.mark.ranks(4, launcher="mpi-hosts")
def test_what_goes_with_ranks_alone_is_refused_on_all_ranks(cluster):
    results = cluster.run(refusals)
    expected = {
        "sparse": "NotImplementedError: workers=.host. averages no sparse gradients",
        "sparse as dense": "no error",
        "spoilt": "FloatingPointError: the gradient of rank 2 or 3 holds NaN",
        "differ": "DisagreementError: .*workers.*rank 0",
        "exclude": "ValueError: nonfinite=.exclude. is for workers=.rank.",
        "schedule": "ValueError: workers=.host. has a schedule of its own",
        "workers": "ValueError: workers must be .rank. or .host., got .hosts.",
        "joined": "RuntimeError: workers=.host. goes on only while no rank has called hvd.join",
    }
    for rank, found in enumerate(results):
        for what, message in found.items():
            wanted = "no error" if (rank, what) == (3, "joined") else expected[what]
            assert re.match(wanted, message, re.DOTALL), f"rank {rank}, {what}: {message}"


def resumed() -> list[Any]:
    """A state goes from hosts to ranks and back: what was remembered of two workers is resized to four, and so on."""
    import harness
    from torch_job import Batches, assert_equal_bits, loss_of, network

    from adacons_hvd import AdaCons

    found, state = [], None
    for seed, workers in enumerate(["host", "rank", "host"]):
        model, batches = network(0), Batches(seed)
        optimizer = wrapped(model.parameters(), AdaCons(), workers=workers)
        if state is not None:
            optimizer.load_state_dict(state)
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model, batches).backward()
            optimizer.step()
        assert_equal_bits(list(model.parameters()))
        state = optimizer.state_dict()
        everyone = harness.gather(state["adacons"])
        assert len({str(each) for each in everyone}) == 1
        found.append((optimizer.report.steps, len(optimizer.report.weights[0]), state["adacons"]["curve"].shape[1]))
    return found


@pytest.mark.ranks(4, launcher="mpi-hosts")
def test_a_state_goes_from_hosts_to_ranks_and_back(cluster):
    assert cluster.run(resumed) == [[(2, 2, 2), (4, 4, 4), (6, 2, 2)]] * 4


def half_precision() -> list[float]:
    """What hosts make of half-precision gradients, beside the same in single precision."""
    import torch
    from torch_job import Batches, array, assert_equal_bits, loss_of, network

    import adacons_hvd.torch as hvd
    from adacons_hvd import AdaCons

    def result(compression: Any = None, dtype: Any = torch.float32) -> Any:
        model, batches = network(0, dtype), Batches(0, dtype)
        optimizer = wrapped(model.parameters(), AdaCons(), compression=compression)
        loss_of(model, batches).backward()
        optimizer.step()
        assert_equal_bits(list(model.parameters()))
        return [array(p.grad, p) for p in model.parameters()]

    import oracle

    exact = result()
    return [oracle.error(result(hvd.Compression.fp16), exact), oracle.error(result(dtype=torch.bfloat16), exact)]


@pytest.mark.ranks(4, launcher="gloo-hosts")
def test_half_precision(cluster):
    for half, brain in cluster.run(half_precision):
        assert 0 < half < 2e-3
        assert 0 < brain < 3e-2


def alone_or_unequal() -> tuple[str, list[str], Any]:
    """One step, the warnings that came, and the report if there is one."""
    import warnings

    from torch_job import Batches, assert_equal_bits, loss_of, network

    from adacons_hvd import AdaCons

    model = network()
    optimizer = wrapped(model.parameters(), AdaCons())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss_of(model, Batches()).backward()
        message = message_of(optimizer.step)
        if message == "no error":
            assert_equal_bits(list(model.parameters()))
    report = optimizer.report
    return message, [str(each.message) for each in caught], report and (report.schedule, report.weights, report.norms)


@pytest.mark.ranks(3, launcher="mpi-hosts")
def test_hosts_with_unequal_numbers_of_ranks_are_refused(cluster):
    for message, _, report in cluster.run(alone_or_unequal):
        assert message.startswith('ValueError: workers="host" needs equally many ranks on every host, but host 0 has ')
        assert "host 0 has ranks 0-1, host 1 has rank 2" in message
        assert report is None


@pytest.mark.ranks(2, launcher="mpi")
def test_a_single_host_is_a_single_worker_and_says_so(cluster):
    for message, caught, (schedule, weights, norms) in cluster.run(alone_or_unequal):
        assert message == "no error"
        assert any("all ranks are on one host" in text for text in caught)
        assert schedule == "hosts"
        assert weights[0] == [pytest.approx(1 / norms[0][0])]


@pytest.mark.ranks(2, launcher="gloo-hosts")
def test_a_host_for_each_rank_makes_ranks_the_workers(cluster):
    for message, caught, (schedule, weights, _) in cluster.run(alone_or_unequal):
        assert (message, caught) == ("no error", [])
        assert schedule in ("gather", "one-pass", "two-pass")
        assert len(weights[0]) == 2
