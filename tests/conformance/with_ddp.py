"""PyTorch's DistributedDataParallel takes cases."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from typing import Any

import harness
import numpy as np
import of_torch
import torch
import torch.distributed as dist
from cases import Case, Options, Seen, array, gradient, judged, no_options, pick
from guards import ALONE, Stray
from of_torch import Given
from torch.nn.parallel import DistributedDataParallel

import adacons_hvd.ddp
from adacons_hvd import AdaCons


def fitting(case: Case) -> Case:
    """Without what DDP does not notice, frozen layers, and what it does in its own way."""
    options = {name: case.options[name] for name in ("schedule", "bucket_bytes")}
    case = replace(case, options=options, sparse=[], frozen={}, fp16=False, missing=[], groups=None)
    # Where passes are added up, DDP multiplies by a complex one, of which an infinity becomes NaN.
    return replace(case, passes=1) if any("complex" in kind for kind in case.types) else case


def run(case: Case) -> Counter[str]:
    """Train, compare, and count what was met."""
    of_torch.meet()
    me = harness.rank()
    parameters = [
        torch.nn.Parameter(torch.ones(s, dtype=getattr(torch, k))) for s, k in zip(case.shapes, case.types, strict=True)
    ]
    model = DistributedDataParallel(Given(parameters), bucket_cap_mb=case.options["bucket_bytes"] / 2**20)
    optimizer: Any = getattr(torch.optim, case.optimizer)(parameters, lr=0.01)
    granularity = pick(case.granularity, parameters)
    aggregator = AdaCons(**case.aggregator, nonfinite=case.nonfinite)
    schedule = case.options["schedule"]
    adacons_hvd.ddp.attach(model, optimizer, aggregator, schedule=schedule, granularity=granularity)
    raw, seen = {}, {}
    for epoch in case.times(me):
        with model.join():
            for step in epoch:
                optimizer.zero_grad()
                mine = [np.zeros(0)] * len(parameters)
                for turn in range(case.passes):
                    values = [gradient(case, step, turn, me, i) for i in range(len(parameters))]
                    last = turn == case.passes - 1
                    error = _backward(model, values, last)
                    mine = [array(v, p) + (m if turn else 0) for v, p, m in zip(values, parameters, mine, strict=True)]
                raw[step] = mine
                seen[step] = Seen(error) if error else Seen.of([array(p.grad, p) for p in parameters], optimizer.report)
                if not error:
                    optimizer.step()
    memory = optimizer.state_dict()["adacons"]
    # Who has run out of data keeps the others company, so nothing changes for them.
    return judged(case, raw, seen, [array(p, p) for p in parameters], memory, only_sums_once_joined=False)


#: The arguments of which ranks may disagree.
ARGUMENTS = {"aggregator", "schedule", "granularity", "grad_scaler", "check_replicas", "may_differ"}


OPTIMIZERS = ("Adam",)
#: The first step of a new DistributedDataParallel has other buckets.
ROUNDING = 1e-11
SAYS_WHO_LEADS = of_torch.SAYS_WHO_LEADS


#: How many seconds a training's ranks wait for one that does not come.
PATIENCE = 20.0


class Training(of_torch.ModelTraining):
    """A training with these options, which are told of the parameters. Ranks meet when it is made."""

    def __init__(self, options: Options = no_options, optimizer: str = "Adam") -> None:
        super().__init__(optimizer)
        # A group of its own, because a message that others wait for in vain leaves it of no use.
        group = dist.new_group(timeout=timedelta(seconds=PATIENCE))
        self.model = DistributedDataParallel(Given(self.parameters), process_group=group)
        self.optimizer = self.plain(self.parameters)
        given = {"aggregator": AdaCons(momentum=0.9), "schedule": "one-pass", **options(self.parameters)}
        adacons_hvd.ddp.attach(self.model, self.optimizer, **given)

    def until_all_are_out_of_data(self) -> Any:
        return self.model.join()


def through_the_module(training: Training, number: int) -> None:
    training.backward(number, training.model.module)
    training.optimizer.step()


def under_no_sync(training: Training, number: int) -> None:
    with training.model.no_sync():
        training.backward(number)
    training.optimizer.step()


def more_after_the_aggregation(training: Training, number: int) -> None:
    training.backward(number)
    sum(output.sum() for output in training.model.module()).backward()
    training.optimizer.step()


def in_a_closure(training: Training, number: int) -> None:
    training.optimizer.step(lambda: training.backward(number, training.model.module))


def in_a_compiled_step(training: Training, number: int) -> None:
    compiled = torch.compile(lambda: training.optimizer.step(), backend="eager")
    training.step(number)
    compiled()  # along the same gradients once more: no harm
    training.backward(number, training.model.module)
    compiled()


NOT_AGGREGATED = "the last backward() failed, ran under no_sync(), or went through the module inside"
STRAYS = {
    "through the module": Stray(through_the_module, NOT_AGGREGATED),
    "under no_sync": Stray(under_no_sync, NOT_AGGREGATED),
    "along refused gradients": of_torch.REFUSED,
    # Ranks have taken a step together before.
    "more after the aggregation": Stray(more_after_the_aggregation, NOT_AGGREGATED, (ALONE,), untouched=False),
    "in a closure": Stray(in_a_closure, NOT_AGGREGATED, (ALONE,), untouched=False),
    "in a compiled step": Stray(in_a_compiled_step, NOT_AGGREGATED, (ALONE,), untouched=False),
}
TELLS_HOW, COMPARES_AVERAGED = True, False
#: Others have waited in vain for its messages, so DDP is in the middle of a step.
OUTLIVES_A_RANK = False
FOUND = 2
OUT_OF_DATA_IS_TOLD = True


def _backward(model: Any, gradients: list[Any], last: bool) -> str:
    """One backward pass with these gradients; the error it ended with."""
    with nullcontext() if last else model.no_sync():
        try:
            torch.autograd.backward(model(), gradients)
        except FloatingPointError as error:
            return str(error)
    return ""
