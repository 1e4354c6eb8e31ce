"""TorchJD's weightings on a cluster give what TorchJD's aggregators give in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchjd import aggregation

from adacons_hvd.aggregators import from_torchjd

#: Weightings, and the aggregators of TorchJD's that they belong to.
PAIRS = {
    "UPGrad": ("UPGradWeighting()", "UPGrad()"),
    "MGDA": ("MGDAWeighting(epsilon=0.01)", "MGDA(epsilon=0.01)"),
    "DualProj": ("DualProjWeighting()", "DualProj()"),
    "AlignedMTL": ("AlignedMTLWeighting()", "AlignedMTL()"),
}


def made(text: str) -> Any:
    return eval(f"aggregation.{text}", {"aggregation": aggregation})


def conflicting(seed: int = 0) -> torch.Tensor:
    """Gradients some of which point against others."""
    return torch.randn(4, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", PAIRS)
def test_in_one_process(name):
    weighting, aggregator = map(made, PAIRS[name])
    ours = from_torchjd(weighting)
    for seed in range(3):
        gradients = conflicting(seed)
        torch.testing.assert_close(ours(gradients), aggregator(gradients), rtol=1e-9, atol=1e-12)


def test_random_numbers_are_everyones_and_nobodys():
    gradients = conflicting()
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        ours = from_torchjd(aggregation.RandomWeighting())
        results.append([ours(gradients) for _ in range(2)])
        assert torch.equal(torch.random.get_rng_state(), before)
    for here, there in zip(*results, strict=True):
        assert torch.equal(here, there)
    assert not torch.equal(results[0][0], results[0][1])


def test_a_worker_that_is_left_out():
    gradients = conflicting()
    gradients[1, 0] = float("nan")
    ours = from_torchjd(aggregation.UPGradWeighting(), nonfinite="exclude")
    torch.testing.assert_close(ours(gradients), aggregation.UPGrad()(gradients[[0, 2, 3]]), rtol=1e-9, atol=1e-12)


def test_ranks_can_tell_settings_apart():
    text = repr(from_torchjd(aggregation.MGDAWeighting(epsilon=0.5)))
    assert text == "from_torchjd(MGDAWeighting(epsilon=0.5, max_iters=100), nonfinite='propagate')"
    assert "pref_vector=tensor([1., 2.])" in repr(from_torchjd(aggregation.UPGradWeighting(torch.tensor([1.0, 2.0]))))


def test_refusals():
    with pytest.raises(ValueError, match="PCDWeighting keeps a state of its own"):
        from_torchjd(aggregation.PCDWeighting())
    with pytest.raises(TypeError, match="must be a Weighting of TorchJD's"):
        from_torchjd(aggregation.UPGrad())


def trained(name: str, granularity: str) -> float:
    """How far DDP's gradients are off TorchJD's own aggregation of all workers' gradients."""
    import harness
    import oracle
    from ddp_job import array, assert_equal_bits, loss_of, network, wrap

    import adacons_hvd.ddp

    weighting, aggregator = map(made, PAIRS[name])
    model, twin = wrap(network(0, torch.float64)), network(0, torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    adacons_hvd.ddp.attach(model, optimizer, from_torchjd(weighting), granularity=granularity)
    for step in range(3):
        optimizer.zero_grad()
        twin.zero_grad()
        with torch.no_grad():
            for p, q in zip(twin.parameters(), model.parameters(), strict=True):
                p.copy_(q)
        loss_of(model, step).backward()
        loss_of(twin, step).backward()
        rows = harness.gather([array(p.grad, p) for p in twin.parameters()])
        optimizer.step()
    assert_equal_bits(model.parameters())
    groups = [[k] for k in range(6)] if granularity == "layer" else [list(range(6))]
    expected: list[Any] = [None] * 6
    for group in groups:
        matrix = torch.stack([torch.cat([torch.from_numpy(row[k]).reshape(-1) for k in group]) for row in rows])
        parts = aggregator(matrix).split([rows[0][k].size for k in group])
        for k, part in zip(group, parts, strict=True):
            expected[k] = part.view(rows[0][k].shape).numpy()
    return oracle.error([p.grad.numpy() for p in model.parameters()], expected)


@pytest.mark.ranks(3, launcher="torchrun")
@pytest.mark.parametrize(("name", "granularity"), [("UPGrad", "model"), ("UPGrad", "layer"), ("MGDA", "model")])
def test_on_a_cluster(cluster, name, granularity):
    for far in cluster.run(trained, name, granularity):
        assert far < 1e-9
