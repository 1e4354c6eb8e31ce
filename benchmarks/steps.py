"""One rank: whole training steps with plain Horovod and with AdaCons, and what memory they take."""

from __future__ import annotations

import resource
from collections.abc import Callable

import horovod.torch as hvd
import torch

import adacons_hvd.torch as adacons
from benchmarks.models import make
from benchmarks.ranks import arguments, hand_over, take_turns


def trainer(name: str, contender: str) -> Callable[[], object]:
    model, loss = make(name, hvd.rank())
    # Plain SGD, the cheapest optimizer, so that nothing hides what aggregation costs.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    if contender == "average":
        optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    else:
        optimizer = adacons.DistributedOptimizer(
            optimizer, model.named_parameters(), aggregator=adacons.AdaCons(), schedule=contender
        )

    def once() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return once


def main() -> None:
    case, results = arguments()
    hvd.init()
    torch.set_num_threads(1)
    # One model after the other may be measured in a process; what memory each takes only if it is the first.
    contenders = {contender: trainer(case["model"], contender) for contender in case["contenders"]}
    times = take_turns(contenders, case["turns"], case["seconds"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peaks = hvd.allgather(torch.tensor([peak]), name="benchmark.memory").tolist()
    parameters = sum(p.numel() for p in make(case["model"], 0)[0].parameters())
    hand_over(results, {"times": times, "peak": max(peaks), "parameters": parameters})


if __name__ == "__main__":
    main()
