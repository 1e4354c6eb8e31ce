"""FSDP's features work with an aggregator: mixed precision, loss scales, unused units, other weights."""

from __future__ import annotations

import copy

import pytest

pytestmark = [pytest.mark.ranks(2, launcher="torchrun"), pytest.mark.time_limit(120)]


def mixed(param: str, reduce: str | None) -> list[float]:
    """How far gradients are off the oracle's, of a twin that computes in the narrow type."""
    import oracle
    import torch
    from fsdp_job import UNITS, assert_same_everywhere, attached, everyone, loss_of, network, off, sharded, whole
    from torch.distributed.fsdp import MixedPrecisionPolicy

    narrow = getattr(torch, param)
    policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=reduce and getattr(torch, reduce))
    twin, judge = network(3, narrow), oracle.Grouped(UNITS)
    model = sharded(network(3, torch.float32), mp_policy=policy)
    optimizer = attached(model, lambda ps: torch.optim.SGD(ps, lr=0.02))
    far = []
    for step in range(4):
        with torch.no_grad():
            for p, q in zip(twin.parameters(), whole(model.parameters()), strict=True):
                p.copy_(q)
        optimizer.zero_grad()
        twin.zero_grad()
        loss_of(model, step, torch.float32).backward()
        loss_of(lambda x: twin(x.to(narrow)), step, torch.float32).backward()
        expected = judge(everyone([p.grad.double().numpy() for p in twin.parameters()]))
        gradients = whole([p.grad for p in model.parameters()])
        assert all(g.dtype == torch.float32 for g in gradients)
        far.append(off(gradients, [torch.from_numpy(e) for e in expected]))
        optimizer.step()
    assert_same_everywhere(whole(model.parameters()))
    return far


@pytest.mark.parametrize(
    ("param", "reduce", "tolerance"),
    [("bfloat16", "float32", 1e-6), ("bfloat16", None, 1e-2), ("float16", None, 1e-3)],
)
def test_mixed_precision(cluster, param, reduce, tolerance):
    for far in cluster.run(mixed, param, reduce):
        assert max(far) <= tolerance


def scaled(tell: bool) -> tuple[float, str]:
    """How far a step under a loss scale is off one without."""
    import torch
    from fsdp_job import attached, loss_of, network, off, sharded, whole

    from adacons_hvd.agreement import DisagreementError

    found = []
    for scale in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        model = sharded(network(5, torch.float32))
        optimizer = attached(model, lambda ps: torch.optim.SGD(ps, lr=0.1), grad_scaler=scale if tell else None)
        for step in range(3):
            optimizer.zero_grad()
            loss = loss_of(model, step, torch.float32)
            if scale is None:
                loss.backward()
                optimizer.step()
                continue
            scale.scale(loss).backward()
            try:
                scale.step(optimizer)
            except DisagreementError as error:
                return 0.0, str(error)
            scale.update()
        found.append(whole(model.parameters()))
    return off(*found), ""


def test_a_loss_scale_changes_nothing(cluster):
    for far, message in cluster.run(scaled, True):
        assert far < 1e-6
        assert not message


def test_a_scaler_that_attach_was_not_told_of_is_refused(cluster):
    for _, message in cluster.run(scaled, False):
        assert "a GradScaler unscales the gradients, but attach() was given no grad_scaler" in message


def compiled() -> float:
    """A compiled model goes on from the state of one that is not: how far apart they end."""
    import torch
    from fsdp_job import attached, loss_of, network, off, sharded, whole

    model, other = sharded(network(5)), sharded(network(5))
    fast = torch.compile(other)
    optimizer, resuming = attached(model), attached(fast)

    def step(trained, optimizer, number):
        optimizer.zero_grad()
        loss_of(trained, number).backward()
        optimizer.step()

    for number in range(2):
        step(model, optimizer, number)
    other.load_state_dict(model.state_dict())
    resuming.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # which would share momentum
    for number in range(2, 4):
        step(model, optimizer, number)
        step(fast, resuming, number)
    assert resuming.report.steps == 4
    return off(whole(other.parameters()), whole(model.parameters()))


def test_a_compiled_model(cluster):
    for far in cluster.run(compiled):
        assert far < 1e-12


def branches() -> tuple[list[int], list[list[int]]]:
    """The rows of the reports of steps that use one branch or both, and how many steps each unit has had."""
    import torch
    from fsdp_job import assert_same_everywhere, attached, everyone, inputs, off, start, whole
    from oracle import Oracle
    from torch.distributed.fsdp import fully_shard

    class Branching(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.left, self.right = torch.nn.Linear(6, 3).double(), torch.nn.Linear(6, 3).double()

        def forward(self, x: torch.Tensor, both: bool) -> torch.Tensor:
            return self.left(x) + self.right(x) if both else self.left(x)

    mesh, model, twin = start(), Branching(), Branching()
    for layer in (model.left, model.right):
        fully_shard(layer, mesh=mesh)
    optimizer = attached(fully_shard(model, mesh=mesh))
    judge, rows, steps = Oracle(), [], []
    for step, both in enumerate((True, False, True)):
        for each in (model, twin):
            each.zero_grad()
            each(inputs(step, torch.float64), both).square().mean().backward()
        expected = judge(everyone(torch.cat([p.grad.reshape(-1) for p in twin.left.parameters()]).numpy()))
        found = torch.cat([g.reshape(-1) for g in whole([p.grad for p in model.left.parameters()])])
        assert off([found], [torch.from_numpy(expected)]) < 1e-11
        optimizer.step()
        rows.append(len(optimizer.report.weights))
        steps.append([int(n[0]) for n in optimizer.report.decision.memory["steps"].tolist()])
        with torch.no_grad():
            for p, q in zip(twin.parameters(), whole(model.parameters()), strict=True):
                p.copy_(q)
    assert_same_everywhere(whole(model.parameters()))
    return rows, steps


def test_units_that_a_step_leaves_out(cluster):
    for told in cluster.run(branches):
        assert told == ([2, 1, 2], [[1, 1], [2], [3, 2]])


def whole_gramian() -> float:
    """An aggregator that needs the Gramian gets the one of each unit."""
    import torch
    from fsdp_job import UNITS, attached, everyone, loss_of, network, off, sharded, whole

    from adacons_hvd import Aggregator

    class Inverse(Aggregator):
        needs_gramian = True

        def weights(self, statistics):
            gramian = statistics.gramian
            inverse = torch.linalg.inv(gramian + 0.1 * torch.eye(gramian.shape[-1], dtype=gramian.dtype))
            return inverse.sum(-1)

    twin = network()
    model = sharded(network())
    attached(model, aggregator=Inverse())
    loss_of(model, 0).backward()
    loss_of(twin, 0).backward()
    rows = everyone([p.grad for p in twin.parameters()])
    expected: list[torch.Tensor] = [torch.empty(0)] * 6
    for unit in UNITS:
        flat = torch.stack([torch.cat([row[k].reshape(-1) for k in unit]) for row in rows])
        weights = torch.linalg.inv(flat @ flat.T + 0.1 * torch.eye(len(rows), dtype=flat.dtype)).sum(-1)
        for k in unit:
            expected[k] = sum(w * row[k] for w, row in zip(weights, rows, strict=True))
    return off(whole([p.grad for p in model.parameters()]), expected)


def test_a_gramian(cluster):
    for far in cluster.run(whole_gramian):
        assert far < 1e-11


def element_wise() -> float:
    """An aggregator that looks at each element alone does so within every shard."""
    import torch
    from fsdp_job import attached, everyone, loss_of, network, off, sharded, whole

    from adacons_hvd import Aggregator

    class Largest(Aggregator):
        def combine(self, rows, present):
            return rows.amax(0)

    twin, model = network(), sharded(network())
    attached(model, aggregator=Largest())
    loss_of(model, 0).backward()
    loss_of(twin, 0).backward()
    rows = everyone([p.grad for p in twin.parameters()])
    expected = [torch.stack(same).amax(0) for same in zip(*rows, strict=True)]
    return off(whole([p.grad for p in model.parameters()]), expected)


@pytest.mark.ranks(3, launcher="torchrun")
def test_element_by_element(cluster):
    for far in cluster.run(element_wise):
        assert far == 0


def excluded() -> float:
    """A rank whose gradient of a unit is not finite is left out of that unit."""
    import harness
    import oracle
    import torch
    from fsdp_job import UNITS, attached, everyone, loss_of, network, off, sharded, whole

    from adacons_hvd import AdaCons

    twin, model = network(), sharded(network())
    attached(model, aggregator=AdaCons(nonfinite="exclude"))
    factor = float("nan") if harness.rank() == 1 else 1.0
    (loss_of(model, 0) * factor).backward()
    loss_of(twin, 0).backward()
    rows = everyone([p.grad.numpy() for p in twin.parameters()])
    expected = oracle.Grouped(UNITS)([row for rank, row in enumerate(rows) if rank != 1])
    return off(whole([p.grad for p in model.parameters()]), [torch.from_numpy(e) for e in expected])


@pytest.mark.ranks(3, launcher="torchrun")
def test_a_rank_without_a_number_is_excluded(cluster):
    for far in cluster.run(excluded):
        assert far < 1e-11
