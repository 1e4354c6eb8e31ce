"""Horovod with CUDA tensors: the schedules beside the oracle, and the same bits on all ranks.

Which Horovod is installed decides how they travel: over NCCL, or staged through the host where it was built without
GPU operations. Ranks share one GPU; see `gpu_job`.
"""

from __future__ import annotations

from typing import Any

import pytest
from gpu_job import DEVICE, TOLERANCES, why_not

if why_not():
    pytest.skip(why_not(), allow_module_level=True)

pytestmark = [
    pytest.mark.ranks(2, 4, launcher="gloo", pool="gpu"),
    pytest.mark.time_limit(90),
]


@pytest.fixture(autouse=True)
def _can_run(request: pytest.FixtureRequest, horovod_kind: str) -> None:
    """Skip where the ranks of this Horovod cannot share the GPU."""
    if horovod_kind == "nccl" and request.getfixturevalue("cluster").ranks > 1:
        reason = request.getfixturevalue("nccl_shares_the_gpu")
        if reason:
            pytest.skip(reason)


def train(
    schedule: str,
    dtype_name: str = "float32",
    *,
    model_name: str = "network",
    steps: int = 5,
    passes: int = 1,
    oracle_settings: dict[str, Any] | None = None,
    layers: bool = False,
    **arguments: Any,
) -> tuple[list[float], str]:
    """Errors of every step, and the schedule that was used."""
    import gpu_job
    import torch

    hvd = gpu_job.horovod()
    model = gpu_job.network(getattr(torch, dtype_name)) if model_name == "network" else gpu_job.Embedding()
    parameters = list(model.parameters())
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(parameters, lr=0.02),
        model.named_parameters(),
        backward_passes_per_step=passes,
        **{"aggregator": hvd.AdaCons(), "schedule": schedule, "bucket_bytes": 400, **arguments},
    )
    record = gpu_job.Record(parameters)
    for step in range(steps):
        optimizer.zero_grad()
        for number in range(passes):
            gpu_job.loss_of(model, gpu_job.batch(step * passes + number, parameters[-1].dtype)).backward()
        record.before(gpu_job.gradients_of(parameters))
        optimizer.synchronize()
        record.after(gpu_job.gradients_of(parameters))
        with optimizer.skip_synchronize():
            optimizer.step()
    gpu_job.assert_equal_bits(parameters)
    groups = [[number] for number in range(len(parameters))] if layers else None
    return record.errors(groups, **(oracle_settings or {})), optimizer.report.schedule


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("schedule", ["two-pass", "one-pass", "gather"])
def test_a_step_is_the_oracles(cluster, schedule, dtype):
    for errors, used in cluster.run(train, schedule, dtype):
        assert used == schedule
        assert max(errors) < TOLERANCES[dtype], errors


@pytest.mark.parametrize(
    ("arguments", "oracle_settings"),
    [
        ({"granularity": "layer", "layers": True}, {}),
        ({"passes": 2}, {}),
        ({"overlap": False}, {}),
        ({"bucket_bytes": 1 << 20, "gradient_predivide_factor": 2.0}, {}),
        ({"schedule": "auto"}, {}),
    ],
    ids=["layers", "two-passes", "no-overlap", "predivide", "auto"],
)
def test_so_it_is_with_what_else_can_be_asked_for(cluster, arguments, oracle_settings):
    arguments = {"schedule": "two-pass", **arguments}
    for errors, _ in cluster.run(train, **arguments, oracle_settings=oracle_settings):
        assert max(errors) < TOLERANCES["float32"], errors


def curvature(schedule: str, settings: dict[str, Any]) -> list[float]:
    """Errors of the steps of an aggregator that keeps mean gradients."""
    import oracle

    from adacons_hvd import Curvature

    return train(
        schedule,
        aggregator=Curvature(**settings),
        oracle_settings={"oracle": oracle.CurvatureOracle, **settings},
        steps=12,
    )[0]


@pytest.mark.parametrize("settings", [{"memory": 4}, {"memory": 4, "workers": False, "length": "agreement"}], ids=str)
@pytest.mark.parametrize("schedule", ["one-pass", "gather"])
def test_curvature_is_the_oracles(cluster, schedule, settings):
    for errors in cluster.run(curvature, schedule, settings):
        assert max(errors) < TOLERANCES["float32"], errors


@pytest.mark.parametrize("schedule", ["two-pass", "gather"])
def test_sparse_gradients_are_the_oracles(cluster, schedule):
    for errors, _ in cluster.run(train, schedule, model_name="embedding"):
        assert max(errors) < TOLERANCES["float32"], errors


def sparse_alone(steps: int) -> list[list[float]]:
    """Train an embedding alone, whose weights every rank computes for itself; returns them."""
    import gpu_job
    import torch

    hvd = gpu_job.horovod()
    table = torch.nn.Embedding(200, 64, sparse=True, device=gpu_job.DEVICE)
    hvd.broadcast_parameters(table.state_dict(), 0)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(table.parameters(), lr=0.02), table.named_parameters(), aggregator=hvd.AdaCons()
    )
    generator = torch.Generator().manual_seed(hvd.rank())
    for _ in range(steps):
        optimizer.zero_grad()
        # Most rows are touched by all ranks: many additions whose order matters.
        rows = torch.randint(200, (4000,), generator=generator).to(gpu_job.DEVICE)
        target = torch.randn(4000, 64, generator=generator).to(gpu_job.DEVICE)
        (table(rows) - target - 1).square().sum().backward()
        optimizer.step()
        gpu_job.assert_equal_bits(list(table.parameters()))
    return optimizer.report.weights


def test_weights_that_every_rank_computes_for_itself_are_the_same_bits(cluster):
    weights = cluster.run(sparse_alone, 8)
    assert all(w == weights[0] for w in weights), weights


def approximate(schedule: str) -> list[float]:
    """The errors of a schedule whose first pass is not exact, on gradients long enough for it."""
    import gpu_job
    import torch

    hvd = gpu_job.horovod()
    shared = torch.Generator().manual_seed(1)
    own = torch.Generator().manual_seed(2 + hvd.rank())
    parameters = [torch.nn.Parameter(torch.zeros(shape, device=gpu_job.DEVICE)) for shape in ((300, 1000), (50,))]
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(parameters, lr=1.0),
        aggregator=hvd.AdaCons(momentum=0.0, scale="average"),
        schedule=schedule,
        bucket_bytes=1 << 19,
    )
    record = gpu_job.Record(parameters)
    for _ in range(3):
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=own) * (1 + hvd.rank())
            parameter.grad = (torch.randn(parameter.shape, generator=shared) + noise).to(gpu_job.DEVICE)
        record.before(gpu_job.gradients_of(parameters))
        optimizer.step()
        record.after(gpu_job.gradients_of(parameters))
    gpu_job.assert_equal_bits(parameters)
    return record.errors(momentum=0.0, scale="average")


@pytest.mark.parametrize(("schedule", "tolerance"), [("half", 1e-4), ("sketch", 0.03)])
def test_approximate_schedules_are_nearly_the_oracles(cluster, schedule, tolerance):
    for errors in cluster.run(approximate, schedule):
        assert 0 < max(errors) < tolerance, errors


def mixed_precision(schedule: str, dtype_name: str) -> tuple[list[float], float, float]:
    """Train under autocast with a loss scale that overflows once; errors, and the scale before and after that."""
    import gpu_job
    import torch

    hvd = gpu_job.horovod()
    model = gpu_job.network(width=64)
    parameters = list(model.parameters())
    dtype = getattr(torch, dtype_name)
    scaler = torch.amp.GradScaler(gpu_job.DEVICE, init_scale=2.0**12, enabled=dtype == torch.float16)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(parameters, lr=0.02),
        model.named_parameters(),
        aggregator=hvd.AdaCons(),
        schedule=schedule,
        grad_scaler=scaler,
    )
    record = gpu_job.Record(parameters)

    def step(number: int, factor: float) -> None:
        optimizer.zero_grad()
        with torch.autocast(gpu_job.DEVICE, dtype):
            loss = gpu_job.loss_of(model, gpu_job.batch(number)) * factor
        scaler.scale(loss).backward()
        scale = scaler.get_scale()
        if factor == 1:
            record.before(gpu_job.gradients_of(parameters), scale)
        optimizer.synchronize()
        if factor == 1:
            record.after(gpu_job.gradients_of(parameters), scale)
        scaler.unscale_(optimizer)
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()

    for number in range(4):
        step(number, 1)
    before = scaler.get_scale()
    if scaler.is_enabled():
        # On one rank alone, but all leave this step out.
        kept = [p.detach().clone() for p in parameters]
        step(4, float("inf") if hvd.rank() == 1 else 2.0)
        assert all(torch.equal(p, k) for p, k in zip(parameters, kept, strict=True))
    gpu_job.assert_equal_bits(parameters)
    return record.errors(), before, scaler.get_scale()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("schedule", ["two-pass", "one-pass"])
def test_mixed_precision_with_a_loss_scale(cluster, schedule, dtype):
    for errors, before, after in cluster.run(mixed_precision, schedule, dtype):
        assert max(errors) < TOLERANCES["float32"], errors
        assert after == (before / 2 if dtype == "float16" else before)


def on_a_side_stream(schedule: str) -> tuple[list[float], str]:
    import gpu_job

    with gpu_job.side_stream():
        return train(schedule)


@pytest.mark.parametrize("schedule", ["two-pass", "one-pass", "gather"])
def test_training_may_run_on_another_stream(cluster, schedule):
    for errors, _ in cluster.run(on_a_side_stream, schedule):
        assert max(errors) < TOLERANCES["float32"], errors


def resumed() -> bool:
    """Whether a training that went through a checkpoint ends with the same bits as one that did not."""
    import io

    import gpu_job
    import torch

    hvd = gpu_job.horovod()

    def make() -> tuple[Any, Any]:
        model = gpu_job.network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        return model, hvd.DistributedOptimizer(optimizer, model.named_parameters(), aggregator=hvd.AdaCons())

    def go_on(model: Any, optimizer: Any, first: int) -> None:
        for step in range(first, first + 3):
            optimizer.zero_grad()
            gpu_job.loss_of(model, gpu_job.batch(step)).backward()
            optimizer.step()

    model, optimizer = make()
    go_on(model, optimizer, 0)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    go_on(model, optimizer, 3)
    second, second_optimizer = make()
    file.seek(0)
    states = torch.load(file, map_location="cpu")
    second.load_state_dict(states["model"])
    second_optimizer.load_state_dict(states["optimizer"])
    go_on(second, second_optimizer, 3)
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), second.parameters(), strict=True))


def test_a_checkpoint_loaded_to_the_host_resumes_exactly(cluster):
    assert cluster.run(resumed) == [True] * cluster.ranks


def joined() -> float:
    """Ranks run out of data one after the other; returns what tells whether all hold the same in the end."""
    import gpu_job
    import torch

    hvd = gpu_job.horovod()
    model = gpu_job.network()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.02), model.named_parameters(), aggregator=hvd.AdaCons()
    )
    for step in range(3 + hvd.rank()):
        optimizer.zero_grad()
        gpu_job.loss_of(model, gpu_job.batch(step)).backward()
        optimizer.step()
    hvd.join(torch.cuda.current_device() if gpu_job.DEVICE == "cuda" else -1)
    hvd.broadcast_parameters(model.state_dict(), hvd.size() - 1)
    gpu_job.assert_equal_bits(list(model.parameters()))
    return float(torch.cat([p.detach().reshape(-1) for p in model.parameters()]).norm())


@pytest.mark.ranks(2, launcher="gloo", pool="gpu-join")
@pytest.mark.time_limit(30)
def test_ranks_may_run_out_of_data(cluster, request, horovod_kind):
    if horovod_kind == "nccl":
        # A rank that has joined adds zeros on one device, but flags travel on the host and gradients on the GPU.
        request.applymarker(pytest.mark.xfail(reason="hvd.join() hangs where Horovod moves gradients over NCCL"))
    norms = cluster.run(joined)
    assert norms == norms[:1] * cluster.ranks
    assert 0 < norms[0] < float("inf")


def does_not_wait(schedule: str | None) -> None:
    import gpu_job
    import torch

    hvd = gpu_job.horovod()
    model = gpu_job.network(width=64)
    batches = [gpu_job.batch(step) for step in range(8)]
    arguments = {"aggregator": hvd.AdaCons(), "schedule": schedule} if schedule else {}
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.02), model.named_parameters(), **arguments
    )
    gpu_job.wait_for_nobody(optimizer, lambda step: gpu_job.loss_of(model, batches[step]).backward())
    gpu_job.assert_equal_bits(list(model.parameters()))


@pytest.mark.ranks(1, 2, 4, launcher="gloo", pool="gpu")
@pytest.mark.parametrize("schedule", [None, "two-pass", "one-pass", "gather", "half", "sketch"])
def test_no_step_waits_for_the_gpu(cluster, horovod_kind, schedule):
    """Horovod's own thread knows when messages have arrived; what this package adds must not make the host wait."""
    if horovod_kind == "staged" and DEVICE == "cuda":
        pytest.skip("a Horovod that stages tensors through the host waits for the GPU itself")
    cluster.run(does_not_wait, schedule)
