"""One rank: a gradient of d elements through Horovod's average, its Adasum, the paper's procedure,
every schedule and every aggregator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import horovod.torch as hvd
import torch

import adacons_hvd.torch as adacons
from adacons_hvd import Aggregator, Curvature, NormalizedMean
from benchmarks.phases import take_apart
from benchmarks.ranks import arguments, hand_over, take_turns

#: A layer's worth of elements: gradients come in pieces.
PIECE = 1 << 20

#: Contenders with the schedule that ``auto`` takes for them.
AGGREGATORS: dict[str, Aggregator] = {
    "AdaCons": adacons.AdaCons(),
    "NormalizedMean": NormalizedMean(),
    "Curvature, past only": Curvature(workers=False),
    "Curvature": Curvature(memory=8),
}


def pieces(length: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(hvd.rank())
    sizes = [min(PIECE, length - start) for start in range(0, length, PIECE)]
    return [torch.randn(size, generator=generator) + 0.1 for size in sizes]


def average(length: int, op: object = hvd.Average, compression: object = None) -> Callable[[], object]:
    """Horovod's own reduction, in place, as its optimizer does it."""
    gradients = pieces(length)

    def once() -> None:
        handles = [hvd.allreduce_async_(g, name=f"benchmark.{op}.{i}", op=op) for i, g in enumerate(gradients)]
        for handle in handles:
            hvd.synchronize(handle)

    return once


def paper(length: int) -> Callable[[], object]:
    """The procedure of the paper's sample: average, inner products, scale, sum."""
    gradient = torch.cat(pieces(length))

    def once() -> torch.Tensor:
        mean = hvd.allreduce(gradient, name="benchmark.paper.mean", op=hvd.Average)
        own = torch.stack([torch.dot(gradient, mean), gradient.norm()])
        dots, norms = hvd.allgather(own[None], name="benchmark.paper.scalars").T
        alpha = dots / norms
        weight = (alpha / alpha.sum() / norms)[hvd.rank()]
        return hvd.allreduce(gradient * weight, name="benchmark.paper.sum", op=hvd.Sum)

    return once


def ours(length: int, schedule: str, fp16: bool = False, aggregator: Aggregator = AGGREGATORS["AdaCons"]) -> Any:
    """The optimizer whose ``synchronize()`` is timed. The schedule ``hosts`` is what ``workers="host"`` does."""
    parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in pieces(length)]
    for parameter, gradient in zip(parameters, pieces(length), strict=True):
        parameter.grad = gradient
    return adacons.DistributedOptimizer(
        torch.optim.SGD(parameters, lr=0.1),
        aggregator=aggregator,
        schedule="auto" if schedule == "hosts" else schedule,
        workers="host" if schedule == "hosts" else "rank",
        compression=adacons.Compression.fp16 if fp16 else adacons.Compression.none,
    )


def main() -> None:
    case, results = arguments()
    hvd.init()
    torch.set_num_threads(1)
    answers = []
    for length in case["lengths"]:
        contenders: dict[str, Callable[[], object]] = {"average": average(length)}
        optimizers = {}
        for name in case["contenders"]:
            if name == "adasum":
                contenders[name] = average(length, hvd.Adasum)
            elif name == "paper":
                contenders[name] = paper(length)
            elif name in AGGREGATORS:
                optimizers[name] = ours(length, "auto", aggregator=AGGREGATORS[name])
                contenders[name] = optimizers[name].synchronize
            else:
                schedule, _, fp16 = name.partition("+")
                optimizers[name] = ours(length, schedule, bool(fp16))
                contenders[name] = optimizers[name].synchronize
        times = take_turns(hvd, contenders, case["turns"], case["seconds"])
        choices = {name: asdict(o.report.choice) for name, o in optimizers.items() if o.report}
        phases = {name: take_apart(optimizers[name].synchronize, 5) for name in ("auto", "fast") if name in optimizers}
        answers.append({"length": length, "times": times, "choices": choices, "phases": phases})
        # Gradients of one length are gone before the next are made.
        del contenders, optimizers
    hand_over(hvd, results, answers)


if __name__ == "__main__":
    main()
