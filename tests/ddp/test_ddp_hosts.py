"""Hosts as workers over DDP. The environment says what torchrun would say on hosts of two ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.time_limit(120)


@contextmanager
def hosts_of(per_host: int) -> Iterator[None]:
    """Hosts with so many ranks each; the last one may have fewer."""
    import harness

    first = harness.rank() // per_host * per_host
    told = {"LOCAL_RANK": harness.rank() - first, "LOCAL_WORLD_SIZE": min(per_host, harness.size() - first)}
    before = {name: os.environ[name] for name in told}
    os.environ.update({name: str(value) for name, value in told.items()})
    try:
        yield
    finally:
        os.environ.update(before)


def beside_the_oracle() -> list[Any]:
    """Train with several aggregators and options, of which the oracle is given the hosts' averages."""
    import oracle
    from ddp_job import network, train

    from adacons_hvd import AdaCons, Curvature

    class OfHosts:
        """An oracle for the averages of hosts of two ranks."""

        def __init__(self, kind: Any = oracle.Oracle, **settings: Any) -> None:
            self.judge = kind(**settings)

        def __call__(self, gradients: Any) -> Any:
            pairs = zip(gradients[::2], gradients[1::2], strict=True)
            return self.judge([(first + second) / 2 for first, second in pairs])

    curvature = {"kind": oracle.CurvatureOracle, "memory": 3, "damping": 0.5}
    cases: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
        (AdaCons(momentum=0.9), {"momentum": 0.9}, {}),
        (AdaCons(scale="average"), {"scale": "average"}, {"passes": 2, "options": {"bucket_cap_mb": 25}}),
        (AdaCons(), {}, {"granularity": "layer", "groups": lambda names: [[i] for i in range(len(names))]}),
        (Curvature(memory=3, damping=0.5), curvature, {"options": {"static_graph": True}}),
    ]
    found = []
    with hosts_of(2):
        for seed, (aggregator, settings, options) in enumerate(cases):
            optimizer = train(
                network(seed, torch.float64),
                aggregator=aggregator,
                steps=6,
                tolerance=1e-12,
                oracle_settings={"oracle": OfHosts, **settings},
                workers="host",
                **options,
            )
            found.append((optimizer.report.schedule, optimizer.report.choice.hosts))
    return found


@pytest.mark.ranks(4, launcher="torchrun")
def test_hosts_agree_with_the_oracle(cluster):
    assert cluster.run(beside_the_oracle) == [[("hosts", ((0, 1), (2, 3)))] * 4] * 4


def refusals() -> dict[str, str]:
    """Whatever does not go with hosts, tried one after the other."""
    import harness
    from ddp_job import loss_of, network, wrap

    import adacons_hvd.ddp
    from adacons_hvd import AdaCons

    def tried(module: Any = None, per_host: int = 2, through: Any = None, aggregator: Any = None) -> str:
        model = wrap(module or network())
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.02)
        try:
            with hosts_of(per_host):
                adacons_hvd.ddp.attach(model, optimizer, aggregator or AdaCons(), workers="host")
            if through is not None:
                through(model, optimizer)
        except (ArithmeticError, NotImplementedError, RuntimeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    def joined(model: Any, optimizer: Any) -> None:
        with model.join():
            for step in range(2 + harness.rank() % 2):
                loss_of(model, step).backward()

    def spoilt(model: Any, optimizer: Any) -> None:
        with torch.no_grad():
            if harness.rank() == 3:
                next(model.parameters()).fill_(float("nan"))
        loss_of(model, 0).backward()

    return {
        "unequal": tried(per_host=3),
        "sparse": tried(torch.nn.Embedding(5, 2, sparse=True)),
        "joined": tried(through=joined),
        "spoilt": tried(through=spoilt, aggregator=AdaCons(nonfinite="raise")),
    }


@pytest.mark.ranks(4, launcher="torchrun")
def test_what_does_not_go_with_hosts_is_refused_on_all_ranks(cluster):
    for found in cluster.run(refusals):
        assert 'ValueError: workers="host" needs equally many ranks' in found["unequal"]
        assert "host 0 has ranks 0-2, host 1 has rank 3" in found["unequal"]
        assert found["sparse"].startswith('NotImplementedError: workers="host" averages no sparse gradients')
        assert found["joined"].startswith('RuntimeError: workers="host" takes gradients of all ranks of a host')
        assert found["spoilt"].startswith("FloatingPointError: the gradient of rank 2 or 3 holds NaN")
