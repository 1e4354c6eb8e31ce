"""One rank: whole training steps with averaging and with AdaCons, and what memory they take.

The peer is plain Horovod in PyTorch, DDP's own hook in DDP, FSDP's own reduce-scatter in FSDP, and in
Keras, where plain Horovod does nothing, this package's optimizer without an aggregator. All train by
plain SGD, the cheapest optimizer, so that nothing hides what aggregation costs.
"""

from __future__ import annotations

import math
import os
import resource
import socket
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.ranks import Group, arguments, hand_over, take_turns

RATE = 1e-4

#: A training step, what it takes to know whether replicas are equal, and how many parameters it trains.
Trainer = tuple[Callable[[], object], Callable[[], object], int]
#: Makes one, by the names of model and contender.
MakeTrainer = Callable[[str, str], Trainer]


def with_torch(folder: Path) -> tuple[Group, MakeTrainer]:
    import horovod.torch as hvd
    import torch

    import adacons_hvd.torch as adacons
    from adacons_hvd.ops.torch import digest
    from benchmarks.models import make

    hvd.init()
    torch.set_num_threads(1)

    def trainer(name: str, contender: str) -> Trainer:
        model, loss = make(name, hvd.rank())
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        if contender == "average":
            optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
        else:
            optimizer = adacons.DistributedOptimizer(
                optimizer, model.named_parameters(), aggregator=adacons.AdaCons(), schedule=contender
            )

        def once() -> None:
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()

        return once, lambda: int(digest(model.parameters())), sum(p.numel() for p in model.parameters())

    return hvd, trainer


def with_ddp(folder: Path) -> tuple[Group, MakeTrainer]:
    import torch
    from torch.nn.parallel import DistributedDataParallel

    import adacons_hvd.ddp as adacons
    from adacons_hvd import AdaCons
    from adacons_hvd.ops.torch import digest
    from benchmarks.models import make

    world = over_gloo(folder)

    def trainer(name: str, contender: str) -> Trainer:
        inner, loss = make(name, world.rank())
        model = DistributedDataParallel(inner)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        if contender != "average":
            adacons.attach(model, optimizer, AdaCons(), schedule=contender)

        def once() -> None:
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()

        return once, lambda: int(digest(model.parameters())), sum(p.numel() for p in model.parameters())

    return world, trainer


def with_fsdp(folder: Path) -> tuple[Group, MakeTrainer]:
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    import adacons_hvd.fsdp as adacons
    from adacons_hvd import AdaCons
    from adacons_hvd.ops.torch import digest
    from benchmarks.models import make

    world = over_gloo(folder)
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))

    def trainer(name: str, contender: str) -> Trainer:
        model, loss = make(name, world.rank())
        for layer in model.children():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        if contender != "average":
            adacons.attach(model, optimizer, AdaCons())

        def once() -> None:
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()

        shards = [p.to_local() for p in model.parameters()]  # type: ignore[attr-defined]
        return once, lambda: int(digest(shards)), sum(p.numel() for p in model.parameters())

    return world, trainer


def over_gloo(folder: Path) -> Group:
    """The ranks that mpirun has started, as a process group of PyTorch's."""
    import torch
    import torch.distributed as dist

    card = next((name for _, name in socket.if_nameindex() if name == "card"), "lo")
    os.environ["GLOO_SOCKET_IFNAME"] = card
    rank, size = (int(os.environ[f"OMPI_COMM_WORLD_{name}"]) for name in ("RANK", "SIZE"))
    dist.init_process_group("gloo", init_method=f"file://{folder / 'ranks'}", rank=rank, world_size=size)
    torch.set_num_threads(1)

    class World:
        rank = staticmethod(dist.get_rank)
        barrier = staticmethod(dist.barrier)

        @staticmethod
        def allgather_object(value: object) -> list[object]:
            values: list[object] = [None] * size
            dist.all_gather_object(values, value)
            return values

    return World()


def with_keras(folder: Path) -> tuple[Group, MakeTrainer]:
    import horovod.tensorflow as hvd
    import keras
    import tensorflow as tf

    import adacons_hvd.keras as adacons
    from adacons_hvd.ops.tensorflow import digest
    from benchmarks.keras_models import make

    hvd.init()

    def trainer(name: str, contender: str) -> Trainer:
        model, loss, inputs, labels = make(name, hvd.rank())
        aggregator = None if contender == "average" else adacons.AdaCons()
        optimizer = keras.optimizers.SGD(RATE)
        if aggregator is None:
            optimizer = adacons.DistributedOptimizer(optimizer)
        else:
            optimizer = adacons.DistributedOptimizer(optimizer, aggregator=aggregator, schedule=contender)
        model.compile(optimizer, loss)
        values = [v.value for v in model.trainable_variables]
        compared = tf.function(lambda: digest([value.read_value() for value in values]))
        parameters = sum(math.prod(v.shape) for v in model.trainable_variables)
        return lambda: model.train_on_batch(inputs, labels), lambda: int(compared()), parameters

    class World:
        rank = staticmethod(hvd.rank)
        allgather_object = staticmethod(hvd.allgather_object)

        @staticmethod
        def barrier() -> None:
            hvd.allreduce(tf.zeros(()), name="benchmark.barrier")

    return World(), trainer


def main() -> None:
    case, results = arguments()
    prepare = {"torch": with_torch, "ddp": with_ddp, "fsdp": with_fsdp, "keras": with_keras}[case["framework"]]
    group, trainer = prepare(results.parent)
    # One model after the other may be measured in a process; what memory each takes only if it is the first.
    trainers = {contender: trainer(case["model"], contender) for contender in case["contenders"]}
    times = take_turns(group, {name: once for name, (once, _, _) in trainers.items()}, case["turns"], case["seconds"])
    compare = list(trainers.values())[-1][1]
    compare()
    comparison = min(_seconds(compare) for _ in range(20))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (parameters,) = {parameters for _, _, parameters in trainers.values()}
    found = {
        "times": times,
        "peak": max(group.allgather_object(peak)),
        "parameters": parameters,
        "comparison": comparison,
    }
    hand_over(group, results, found)


def _seconds(once: Callable[[], object]) -> float:
    start = time.perf_counter()
    once()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
