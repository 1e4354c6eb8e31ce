"""DDP with CUDA tensors, over Gloo and over NCCL: the schedules beside the oracle, the same bits, nothing waits."""

from __future__ import annotations

from typing import Any

import pytest
from gpu_job import DEVICE, TOLERANCES, why_not

if why_not():
    pytest.skip(why_not(), allow_module_level=True)

BACKENDS = ("gloo", "nccl")
SCHEDULES = ("two-pass", "one-pass", "gather")

pytestmark = [
    pytest.mark.ranks(2, 4, launcher="torchrun", pool="gpu"),
    pytest.mark.time_limit(90),
    pytest.mark.parametrize("backend", BACKENDS),
]


@pytest.fixture(autouse=True)
def _can_run(request: pytest.FixtureRequest, backend: str) -> None:
    """Skip where ranks cannot share the GPU over this backend."""
    if backend == "nccl" and DEVICE != "cuda":
        pytest.skip("NCCL is for GPUs")
    if backend == "nccl" and request.getfixturevalue("cluster").ranks > 1:
        reason = request.getfixturevalue("nccl_shares_the_gpu")
        if reason:
            pytest.skip(reason)


_groups: dict[str, Any] = {}


def wrap(module: Any, backend: str, **options: Any) -> Any:
    """The module as a DDP model whose gradients travel over that backend, in several buckets."""
    import gpu_job
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    gpu_job.be_a_host()
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    if backend not in _groups:
        _groups[backend] = dist.group.WORLD if backend == "gloo" else dist.new_group(backend=backend)
    options = {"bucket_cap_mb": 0.0004, "process_group": _groups[backend], **options}
    return DistributedDataParallel(module, **options)


def train(
    backend: str,
    schedule: str,
    dtype_name: str = "float32",
    *,
    sparse: bool = False,
    layers: bool = False,
    autocast: str = "",
    stream: bool = False,
    curvature: dict[str, Any] | None = None,
    steps: int = 5,
) -> tuple[list[float], str]:
    """Errors of every step, and the schedule that was used.

    A twin that knows nothing of DDP computes each rank's own gradients on the same data.
    """
    import contextlib
    import copy

    import gpu_job
    import oracle
    import torch

    import adacons_hvd.ddp
    from adacons_hvd import AdaCons, Curvature

    device = gpu_job.DEVICE
    dtype = getattr(torch, dtype_name)
    module = gpu_job.Embedding() if sparse else gpu_job.network(dtype)
    twin = copy.deepcopy(module)
    with gpu_job.side_stream() if stream else contextlib.nullcontext():
        model = wrap(module, backend)
        parameters = list(module.parameters())
        optimizer: Any = torch.optim.SGD(parameters, lr=0.02)
        precision = getattr(torch, autocast) if autocast else torch.float16
        scaler = torch.amp.GradScaler(device, init_scale=2.0**12, enabled=autocast == "float16")
        adacons_hvd.ddp.attach(
            model,
            optimizer,
            AdaCons() if curvature is None else Curvature(**curvature),
            schedule=schedule,
            granularity="layer" if layers else "model",
            grad_scaler=scaler if autocast else None,
        )
        record = gpu_job.Record(parameters)
        for step in range(steps):
            optimizer.zero_grad()
            twin.zero_grad()
            for some in (model, twin):
                with torch.autocast(device, precision, enabled=bool(autocast)):
                    loss = gpu_job.loss_of(some, gpu_job.batch(step, dtype))
                scaler.scale(loss).backward()
            scale = scaler.get_scale()
            record.before(gpu_job.gradients_of(list(twin.parameters())), scale)
            record.after(gpu_job.gradients_of(parameters), scale)
            scaler.step(optimizer)
            scaler.update()
            twin.load_state_dict(module.state_dict())
    gpu_job.assert_equal_bits(parameters)
    groups = [[number] for number in range(len(parameters))] if layers else None
    settings = {} if curvature is None else {"oracle": oracle.CurvatureOracle, **curvature}
    return record.errors(groups, **settings), optimizer.report.schedule


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_step_is_the_oracles(cluster, backend, schedule, dtype):
    for errors, used in cluster.run(train, backend, schedule, dtype):
        assert used == schedule
        assert max(errors) < TOLERANCES[dtype], errors


@pytest.mark.parametrize(
    "arguments",
    [
        {"layers": True},
        {"sparse": True},
        {"stream": True},
        {"autocast": "float16"},
        {"autocast": "bfloat16"},
        {"schedule": "auto"},
        {"curvature": {"memory": 4}, "steps": 12},
        {"curvature": {"memory": 4, "workers": False}, "steps": 12, "schedule": "gather"},
        {"curvature": {"memory": 2}, "steps": 12, "autocast": "float16"},
    ],
    ids=["layers", "sparse", "side-stream", "float16", "bfloat16", "auto", "curvature", "past", "curvature-float16"],
)
def test_so_it_is_with_what_else_can_be_asked_for(cluster, backend, arguments):
    for errors, _ in cluster.run(train, backend, **{"schedule": "one-pass", **arguments}):
        assert max(errors) < TOLERANCES["float32"], errors


def does_not_wait(backend: str, schedule: str | None) -> None:
    import gpu_job
    import torch

    import adacons_hvd.ddp
    from adacons_hvd import AdaCons

    model = wrap(gpu_job.network(width=64), backend)
    batches = [gpu_job.batch(step) for step in range(8)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    if schedule:
        adacons_hvd.ddp.attach(model, optimizer, AdaCons(), schedule=schedule)
    gpu_job.wait_for_nobody(optimizer, lambda step: gpu_job.loss_of(model, batches[step]).backward())
    gpu_job.assert_equal_bits(list(model.parameters()))


@pytest.mark.ranks(1, 2, 4, launcher="torchrun", pool="gpu")
@pytest.mark.parametrize("schedule", [None, *SCHEDULES, "half", "sketch"])
def test_no_step_waits_for_the_gpu(cluster, backend, schedule):
    if backend == "gloo" and DEVICE == "cuda":
        pytest.skip("Gloo's own threads wait for the GPU")
    cluster.run(does_not_wait, backend, schedule)
