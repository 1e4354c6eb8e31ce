"""Numbers at the ends of what can be computed with: the step does as documented, and training goes on."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.ranks(3, launcher="mpi"), pytest.mark.time_limit(120)]

SCHEDULES = ["two-pass", "one-pass", "gather"]


def gradients_of(kind, rank):
    """Return this rank's gradient in the odd step, and the element type."""
    import torch

    usual = torch.linspace(1, 2, 50) + 0.3 * torch.sin(torch.arange(50.0) * (rank + 1))
    table = {
        "all zero": (0 * usual, torch.float32),
        "one zero": (usual * (rank != 1), torch.float32),
        "one 1e10 larger": (usual * (1e10 if rank == 1 else 1.0), torch.float32),
        "denormal": (usual * 1e-40, torch.float32),
        "one denormal": (usual * (1e-40 if rank == 1 else 1.0), torch.float32),
        "squares that overflow": (usual * 1e30, torch.float32),
        "halves whose squares overflow": (usual * 2e4, torch.float16),
        "opposing": (torch.linspace(1, 2, 50) * [1.0, -1.0, 0.0][rank], torch.float32),
        "cancelling": (torch.linspace(1, 2, 50) * [2.0, -1.0, -1.0][rank], torch.float32),
        "all cancelling but little": (torch.linspace(1, 2, 50) * [2.0, -1.0, -0.99][rank], torch.float32),
    }
    return table.get(kind, (usual, torch.float32))


CANCELLING = ("opposing", "cancelling", "all cancelling but little")

# Whether the odd step is the plain average.
AVERAGED = {
    "all zero": True,
    "one zero": False,
    "one 1e10 larger": False,
    "denormal": True,
    "one denormal": False,
    "squares that overflow": True,
    "halves whose squares overflow": False,
    "opposing": True,
    "cancelling": True,
    "all cancelling but little": True,
}


def test_extreme_gradients(cluster):
    def case(kind, schedule):
        import harness
        import numpy as np
        import oracle
        import torch
        from torch_job import array, assert_equal_bits

        import adacons_hvd.torch as hvd
        from adacons_hvd import AdaCons

        hvd.init()
        dtype = gradients_of(kind, 0)[1]
        weight = torch.nn.Parameter(torch.ones(50, dtype=dtype))
        # With momentum, earlier steps decide where this one leaves it open.
        momentum = 0.0 if kind in CANCELLING else 0.9
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD([weight], lr=0.0), aggregator=AdaCons(momentum=momentum), schedule=schedule
        )
        judge = oracle.Judge(3, momentum, True, "unit")
        fell_back = []
        for step in range(5):
            optimizer.zero_grad()
            value, _ = gradients_of(kind if step == 2 else "usual", harness.rank())
            (weight * value.to(dtype)).sum().backward()
            everyone = harness.gather(array(weight.grad, weight))
            optimizer.synchronize()
            found = array(weight.grad, weight)
            with optimizer.skip_synchronize():
                optimizer.step()
            assert np.isfinite(found).all()
            # What single precision cannot square counts as zero, or as not finite; the oracle is told so.
            if step == 2 and kind == "one denormal":
                everyone[1] = 0 * everyone[1]
            before = judge.m
            expected = judge(dict(enumerate(everyone)))
            if step == 2 and kind in ("denormal", "squares that overflow"):
                judge.m, expected = before, sum(everyone) / 3
            tolerance = 1e-3 if dtype == torch.float16 else 1e-5
            allowed = tolerance * np.linalg.norm(expected) + 1e-42
            if AVERAGED[kind] and step == 2:  # what cancels leaves the roundings of what there was
                allowed += 1e-6 * max(map(np.linalg.norm, everyone))
            assert np.linalg.norm(found - expected) <= allowed, f"step {step}"
            assert_equal_bits([weight.grad, weight])
            fell_back.append(optimizer.report.fell_back[0])
            assert all(torch.isfinite(v).all() for v in optimizer._reducer.state.tensors().values())
        return fell_back

    for kind, averaged in AVERAGED.items():
        for schedule in SCHEDULES:
            for fell_back in cluster.run(case, kind, schedule):
                assert fell_back == [False, False, averaged, False, False], (kind, schedule)


def test_loss_scaling_rides_out_what_never_ends(cluster):
    """From one step on a rank's loss is NaN: no step is taken any more, on no rank, and then all take them again."""

    def case():
        import harness
        import torch
        from torch_job import Batches, assert_equal_bits, loss_of, network

        import adacons_hvd.torch as hvd
        from adacons_hvd import AdaCons

        hvd.init()
        model, batches = network(), Batches()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.01),
            model.named_parameters(),
            aggregator=AdaCons(),
            grad_scaler=scaler,
        )
        moved, curves = [], []
        for step in range(10):
            optimizer.zero_grad()
            loss = loss_of(model, batches)
            if 3 <= step < 7 and harness.rank() == 2:
                loss = loss * float("nan")
            before = [p.detach().clone() for p in model.parameters()]
            scaler.scale(loss).backward()
            optimizer.synchronize()
            scaler.unscale_(optimizer)
            with optimizer.skip_synchronize():
                scaler.step(optimizer)
            scaler.update()
            moved.append(any((b != p).any().item() for b, p in zip(before, model.parameters(), strict=True)))
            curves.append(optimizer._reducer.state.tensors()["curve"].clone())
        assert all(torch.equal(curves[2], curves[step]) for step in range(3, 7))
        assert not torch.equal(curves[2], curves[7])
        assert_equal_bits(list(model.parameters()))
        return moved, scaler.get_scale(), optimizer.report.fallbacks

    assert cluster.run(case) == [([True] * 3 + [False] * 4 + [True] * 3, 2.0**6, 4)] * 3
