"""A sharded model trains as an unsharded one does along the oracle's aggregate of unsharded gradients."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = [pytest.mark.time_limit(180)]
three = pytest.mark.ranks(3, launcher="torchrun")


def train(steps: int, tolerance: float, how: dict[str, Any]) -> list[Any]:
    """Train both side by side; returns the report's schedule, steps, and number of units."""
    import torch
    from fsdp_job import Twin, assert_same_everywhere, attached, loss_of, momentum, network, off, sharded, start, whole

    from adacons_hvd import AdaCons

    dtype = getattr(torch, how.get("dtype", "float64"))
    adam = how.get("adam", False)
    make = (lambda ps: torch.optim.Adam(ps, lr=0.01)) if adam else momentum
    settings, passes, clip = how.get("settings", {}), how.get("passes", 1), how.get("clip", 0)
    plain = network(7, dtype, how.get("width", 11))
    replicas = how.get("replicas", 0)
    mesh = start(replicas)
    twin = Twin(plain, make, together=mesh.size(1) if replicas else 1, **settings)
    model = sharded(plain, mesh, **how.get("options", {}))
    optimizer = attached(model, make, AdaCons(**settings))
    for step in range(steps):
        optimizer.zero_grad()
        for number in range(passes):
            model.set_requires_gradient_sync(number == passes - 1)
            loss_of(model, step * passes + number, dtype).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        twin.step(lambda m, step=step: [loss_of(m, step * passes + k, dtype) for k in range(passes)], clip)
        found = whole(model.parameters())
        far = off(found, [p.detach() for p in twin.model.parameters()])
        assert far <= tolerance, f"parameters are off by {far:.2e} after step {step}"
    assert_same_everywhere(found)
    return [optimizer.report.schedule, optimizer.report.steps, len(optimizer.report.weights)]


@pytest.mark.ranks(2, 3, 4, launcher="torchrun")
def test_parameters_are_those_of_the_oracle(cluster):
    for told in cluster.run(train, 8, 1e-11, {}):
        assert told == ["one-pass", 8, 3]


@three
@pytest.mark.parametrize(
    "how",
    [
        {"dtype": "float32"},
        {"passes": 3},
        {"clip": 0.1},
        {"adam": True, "settings": {"scale": "average"}},
        {"settings": {"momentum": 0.0, "normalize": False}},
        {"options": {"reshard_after_forward": False}},
    ],
    ids=["float32", "accumulated", "clipped", "adam", "ablation", "not resharded"],
)
def test_and_so_they_are(cluster, how):
    cluster.run(train, 6, 2e-5 if "dtype" in how else 1e-11, how)


@pytest.mark.ranks(4, launcher="torchrun")
@pytest.mark.parametrize("how", [{}, {"passes": 2}, {"clip": 0.1}], ids=["", "accumulated", "clipped"])
def test_two_replicas_of_two_shards(cluster, how):
    """The first layer's shards have 35 elements, so the replicas' parts of them are not of one length."""
    for told in cluster.run(train, 6, 1e-11, {"replicas": 2, "width": 10, **how}):
        assert told == ["one-pass", 6, 3]


@pytest.mark.soak
@pytest.mark.ranks(6, launcher="torchrun")
def test_three_replicas_whose_parts_are_not_of_one_length(cluster):
    cluster.run(train, 4, 1e-11, {"replicas": 3})
