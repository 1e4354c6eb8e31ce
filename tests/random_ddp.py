"""The random jobs of `random_cases`, taken with PyTorch's DistributedDataParallel. Runs on the ranks."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import harness
import numpy as np
import random_cases
import torch
import torch.distributed as dist
from random_cases import Case, array
from torch.nn.parallel import DistributedDataParallel

import adacons_hvd.ddp
from adacons_hvd import AdaCons


class Given(torch.nn.Module):
    """Parameters whose gradients can be chosen."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        super().__init__()
        self.all = torch.nn.ParameterList(parameters)

    def forward(self) -> list[torch.Tensor]:
        return [p.clone() for p in self.all]


def run(case: Case) -> Counter[str]:
    """Train, compare, and count what was met."""
    # DDP does not notice when layers are frozen, and has no compression here.
    case = replace(case, sparse=[], frozen={}, fp16=False, missing=[])
    if "complex64" in case.types:
        # Where passes are added up, DDP multiplies by a complex one, of which an infinity becomes NaN.
        case = replace(case, passes=1)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    me = harness.rank()
    parameters = [
        torch.nn.Parameter(torch.ones(s, dtype=getattr(torch, k))) for s, k in zip(case.shapes, case.types, strict=True)
    ]
    model = DistributedDataParallel(Given(parameters), bucket_cap_mb=case.options["bucket_bytes"] / 2**20)
    optimizer = getattr(torch.optim, case.optimizer)(parameters, lr=0.01)
    granularity = random_cases.pick(case.granularity, parameters)
    aggregator = AdaCons(**case.aggregator, nonfinite=case.nonfinite)
    schedule = case.options["schedule"]
    adacons_hvd.ddp.attach(model, optimizer, aggregator, schedule=schedule, granularity=granularity)
    raw, found = [], []
    with model.join():
        for step in range(case.steps[me]):
            optimizer.zero_grad()
            mine = [np.zeros(0)] * len(parameters)
            for turn in range(case.passes):
                values = [random_cases.gradient(case, step, turn, me, i) for i in range(len(parameters))]
                last = turn == case.passes - 1
                error = _backward(model, values, last)
                mine = [array(v, p) + (m if turn else 0) for v, p, m in zip(values, parameters, mine, strict=True)]
            raw.append(mine)
            found.append(error or [array(p.grad, p) for p in parameters])
            if not error:
                optimizer.step()
    memory = optimizer.state_dict()["adacons"]
    return random_cases.judged(case, raw, found, [array(p, p) for p in parameters], memory)


def _backward(model: Any, gradients: list[Any], last: bool) -> str:
    """One backward pass with these gradients; the error it ended with."""
    with nullcontext() if last else model.no_sync():
        try:
            torch.autograd.backward(model(), gradients)
        except FloatingPointError as error:
            return str(error)
    return ""
