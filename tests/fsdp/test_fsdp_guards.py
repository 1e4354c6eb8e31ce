"""Models that cannot be aggregated are refused in a sentence, on all ranks; checkpoints lose nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest

pytestmark = [pytest.mark.ranks(2, launcher="torchrun"), pytest.mark.time_limit(120)]


def refused(case: str) -> str:
    """The error of an ``attach()`` that makes no sense."""
    import harness
    import torch
    import torch.distributed as dist
    from fsdp_job import attached, momentum, network, sharded, start
    from torch.distributed.fsdp import fully_shard

    import adacons_hvd.fsdp
    from adacons_hvd import AdaCons, Curvature
    from adacons_hvd.agreement import DisagreementError

    mesh, aggregator, options = start(), None, {}
    model: Any = network()
    if case == "one replica":
        model = fully_shard(model, mesh=start(1))
    elif case == "replicas of one rank":
        model = fully_shard(model, mesh=start(2))
    elif case == "tensor parallel":
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        both = dist.init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, both["tp"], {"0": ColwiseParallel()})
        model = fully_shard(model, mesh=both["dp"])
    elif case == "replicate":
        from torch.distributed._composable.replicate_with_fsdp import replicate

        model = replicate(model, mesh=mesh)
    elif case == "partly sharded":
        fully_shard(model[0], mesh=mesh)
    elif case == "alone":
        group = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
        model = fully_shard(model, mesh=dist.DeviceMesh.from_group(group, "cpu"))
    elif case != "not sharded":
        model = sharded(model)
    optimizer = momentum(model.parameters())
    if case == "granularity":
        options["granularity"] = "model"
    elif case == "hosts":
        options["workers"] = "host"
    elif case == "twice":
        attached(model)
    elif case == "factor":
        model.set_gradient_divide_factor(3.0)
    elif case == "history":
        aggregator = Curvature(memory=2)
    elif case == "optimizer":
        optimizer = momentum(network().parameters())
    elif case == "one rank fails":
        optimizer = momentum((network() if harness.rank() else model).parameters())
    with pytest.raises((ValueError, TypeError, DisagreementError)) as raised:
        adacons_hvd.fsdp.attach(model, optimizer, aggregator or AdaCons(), **options)
    assert torch.is_grad_enabled()
    return str(raised.value)


REFUSALS = {
    "one replica": "there is a single replica, and nobody to agree with",
    "replicas of one rank": "FSDP scatters nothing among a single rank",
    "tensor parallel": "with tensor parallelism a worker's gradient is spread",
    "replicate": "unit (root) lives on the mesh",
    "partly sharded": "4 of the model's parameters, the first of them 2.weight, belong to no unit",
    "alone": "FSDP scatters nothing among a single rank",
    "not sharded": "no module of Sequential was given to fully_shard()",
    "granularity": "granularity must be \"unit\", got 'model'",
    "hosts": 'workers="host" is for PyTorch over Horovod and for DDP',
    "twice": "has another reduce-scatter than FSDP's own",
    "factor": "set_gradient_divide_factor(3.0)",
    "history": "needs the mean gradients of earlier steps",
    "optimizer": "the optimizer has none of the model's parameters",
    "one rank fails": "the optimizer has none of the model's parameters",
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(cluster, case):
    for message in cluster.run(refused, case):
        assert REFUSALS[case] in message


def replaced() -> str:
    from fsdp_job import attached, loss_of, network, sharded
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter

    from adacons_hvd.engine.replicas import StrayStepError

    model = sharded(network())
    optimizer = attached(model)
    model[2].set_custom_reduce_scatter(DefaultReduceScatter())
    loss_of(model, 0).backward()
    with pytest.raises(StrayStepError) as error:
        optimizer.step()
    return str(error.value)


def test_a_reduction_that_was_replaced(cluster):
    for message in cluster.run(replaced):
        assert "since attach(), unit 2 was given another reduce-scatter" in message


# --- checkpoints --------------------------------------------------------------------------------


def resumed(folder: str, how: str) -> None:
    """Train, save, train on; then load in another model and train on: the same bits."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from fsdp_job import attached, loss_of, network, sharded, whole
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    def make(parameters: Any) -> torch.optim.Optimizer:
        kind = torch.optim.SGD if "sgd" in how else torch.optim.Adam
        return kind(parameters, lr=0.01)

    def train(model: Any, optimizer: Any, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()

    options = StateDictOptions(full_state_dict="full" in how, flatten_optimizer_state_dict="flat" in how)
    model = sharded(network(1))
    optimizer = attached(model, make)
    train(model, optimizer, range(3))
    # A full state shares memory with the optimizer's own.
    weights, state = copy.deepcopy(get_state_dict(model, optimizer, options=options))
    if "full" not in how:
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    train(model, optimizer, range(3, 6))

    other = sharded(network(2))
    resuming = attached(other, make)
    if "full" not in how:
        weights, state = get_state_dict(other, resuming, options=options)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(other, resuming, model_state_dict=weights, optim_state_dict=state, options=options)
    train(other, resuming, range(3, 6))
    assert resuming.report.steps == 6
    for p, q in zip(whole(model.parameters()), whole(other.parameters()), strict=True):
        assert torch.equal(p, q)
    dist.barrier()


@pytest.mark.parametrize("how", ["adam", "sgd", "adam, full", "adam, flat"])
def test_checkpoints_by_torchs_distributed_checkpoint(cluster, how, tmp_path):
    cluster.run(resumed, str(tmp_path / "checkpoint"), how)


def by_fewer(folder: str) -> list[int]:
    """Three ranks save after three steps; two of them load and take one more."""
    import harness
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from fsdp_job import attached, loss_of, network, sharded, start, whole
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.fsdp import fully_shard

    model = sharded(network(1))
    optimizer = attached(model)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)

    start()
    pair = dist.new_group([0, 1])
    if harness.rank() == 2:
        return []
    mesh = dist.DeviceMesh.from_group(pair, "cpu")
    model = network(1)
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = attached(model)
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder, process_group=pair)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    loss_of(model, 0).backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in whole(model.parameters()))
    memory = optimizer.report.decision.memory
    return [optimizer.report.steps, *memory["curve"].shape, int(memory["updates"].min())]


@pytest.mark.ranks(3, launcher="torchrun")
def test_another_number_of_workers(cluster, tmp_path):
    assert cluster.run(by_fewer, str(tmp_path / "state")) == [[4, 3, 2, 4], [4, 3, 2, 4], []]
