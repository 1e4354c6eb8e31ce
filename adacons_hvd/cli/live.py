"""One of the processes of ``adacons doctor``'s live check: does what training does, and prints how it went.

A script that launchers start by its path. It names a framework and a launcher on its command line, and says every
outcome in a line that starts with MARK, because launchers mix their own lines in.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from typing import Any

MARK = "adacons-live: "

#: Elements of the gradients for which the choice of a schedule is shown: 40 kB, 4 MB, 16 MB.
SIZES = (10_000, 1_000_000, 4_000_000)
SCHEDULES = ("two-pass", "one-pass", "gather")
#: The gradients of the two ranks in steps whose result is checked.
GRADIENTS = [[2.0, 0.5, -1.0], [1.5, 1.0, 0.0]]


def main(framework: str, launcher: str) -> None:
    try:
        if launcher == "torchrun":
            ddp()
        else:
            {"torch": horovod_torch, "tensorflow": horovod_tensorflow}[framework](launcher)
    except Exception as error:
        say(kind="failed", error=_in_one_line(error))
        raise


def say(**what: Any) -> None:
    print(MARK + json.dumps(what), flush=True)


def _in_one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def attempt(kind: str, name: str, works: Callable[[], bool]) -> None:
    """Say whether something works; an exception is an answer."""
    try:
        answer = None if works() else "gave a wrong result"
    except Exception as error:
        answer = _in_one_line(error)
    say(kind=kind, name=name, error=answer)


def horovod(hvd: Any, launcher: str, ones: Callable[[int], Any], numbers: Callable[[Any], list[float]]) -> None:
    """Horovod's operations, with tensors that ``ones`` makes and ``numbers`` reads."""
    hvd.init()
    say(kind="started", rank=hvd.rank(), size=hvd.size(), nccl=bool(hvd.nccl_built()))
    if not {"mpi": hvd.mpi_enabled, "gloo": hvd.gloo_enabled}[launcher]():
        raise RuntimeError(f"Horovod does not use {launcher}, though {launcher} started it")
    mine = ones(hvd.size()) * (hvd.rank() + 1)
    everyone = [float(rank + 1) for rank in range(hvd.size())]
    total = [sum(everyone)] * hvd.size()
    attempt("operation", "allreduce", lambda: numbers(hvd.allreduce(mine, op=hvd.Sum, name="sum")) == total)
    attempt("operation", "allgather", lambda: numbers(hvd.allgather(mine[:1], name="all")) == everyone)
    attempt("operation", "alltoall", lambda: numbers(hvd.alltoall(mine, name="parts")) == everyone)
    attempt("operation", "broadcast", lambda: numbers(hvd.broadcast(mine, 0, name="first")) == [1.0] * hvd.size())


def steps(step: Callable[[str], list[float]], wanted: list[float]) -> None:
    """A step in every schedule, whose result must be ``wanted``."""
    for schedule in SCHEDULES:
        attempt("schedule", schedule, functools.partial(_agrees, step, schedule, wanted))


def _agrees(step: Callable[[str], list[float]], schedule: str, wanted: list[float]) -> bool:
    return all(abs(a - b) <= 1e-5 for a, b in zip(step(schedule), wanted, strict=True))


def horovod_torch(launcher: str) -> None:
    import torch

    import adacons_hvd.torch as hvd
    from adacons_hvd import Curvature

    horovod(hvd, launcher, torch.ones, torch.Tensor.tolist)
    gradients = torch.tensor(GRADIENTS)

    def step(schedule: str) -> list[float]:
        parameter = torch.nn.Parameter(torch.zeros(3))
        sgd = torch.optim.SGD([parameter], lr=1.0)
        optimizer = hvd.DistributedOptimizer(sgd, [("p", parameter)], aggregator=hvd.AdaCons(), schedule=schedule)
        (parameter * gradients[hvd.rank()]).sum().backward()
        optimizer.step()
        return (-parameter).tolist()

    steps(step, hvd.AdaCons()(gradients).tolist())

    def report(elements: int, aggregator: Any) -> Any:
        parameter = torch.nn.Parameter(torch.zeros(elements))
        sgd = torch.optim.SGD([parameter], lr=1.0)
        optimizer = hvd.DistributedOptimizer(sgd, [(f"p{elements}", parameter)], aggregator=aggregator)
        parameter.sum().backward()
        optimizer.step()
        return optimizer.report

    for elements in SIZES:
        chosen, curvature = report(elements, hvd.AdaCons()), report(elements, Curvature()).reason
        say(kind="choice", bytes=4 * elements, schedule=chosen.schedule, reason=chosen.reason, curvature=curvature)
    say(kind="ended", rank=hvd.rank())
    hvd.shutdown()


def horovod_tensorflow(launcher: str) -> None:
    import tensorflow as tf

    import adacons_hvd.tensorflow
    from adacons_hvd import AdaCons

    hvd: Any = adacons_hvd.tensorflow
    horovod(hvd, launcher, tf.ones, lambda tensor: list(map(float, tensor.numpy())))
    gradients = tf.constant(GRADIENTS)

    def step(schedule: str) -> list[float]:
        parameter = tf.Variable(tf.zeros(3))
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(parameter * gradients[hvd.rank()])
        tape = hvd.DistributedGradientTape(tape, aggregator=AdaCons(), schedule=schedule)
        return list(map(float, tape.gradient(loss, [parameter])[0].numpy()))

    steps(step, list(map(float, AdaCons()(gradients).numpy())))
    say(kind="ended", rank=hvd.rank())
    hvd.shutdown()


def ddp() -> None:
    import torch
    import torch.distributed as dist

    import adacons_hvd.ddp
    from adacons_hvd import AdaCons

    dist.init_process_group("gloo")
    say(kind="started", rank=dist.get_rank(), size=dist.get_world_size(), nccl=dist.is_nccl_available())
    gradients = torch.tensor(GRADIENTS)

    def step(schedule: str) -> list[float]:
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 1, bias=False))
        parameter = model.module.weight
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        adacons_hvd.ddp.attach(model, optimizer, AdaCons(), schedule=schedule)
        before = parameter[0].tolist()
        model(gradients[dist.get_rank()]).sum().backward()
        optimizer.step()
        return [a - b for a, b in zip(before, parameter[0].tolist(), strict=True)]

    steps(step, AdaCons()(gradients).tolist())
    say(kind="ended", rank=dist.get_rank())
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
