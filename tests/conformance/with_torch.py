"""PyTorch over Horovod takes cases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import harness
import of_torch
import torch
from cases import Case, Options, Seen, array, gradient, joining, judged, no_options, pick
from guards import Stray

import adacons_hvd.torch as hvd
from adacons_hvd.collectives.shared import memory_device
from adacons_hvd.torch import reducer


def fitting(case: Case) -> Case:
    """The binding has everything."""
    return case


def run(case: Case) -> Counter[str]:
    """Train, compare, and count what was met."""
    # Every third case goes as if ranks could not share memory: by MPI, or by Horovod alone.
    with mock.patch.object(reducer, "memory_device", (lambda: -1) if case.seed % 3 == 0 else memory_device):
        return _run(case)


def _run(case: Case) -> Counter[str]:
    hvd.init()
    me = harness.rank()
    kinds = [getattr(torch, kind) for kind in case.types]
    parameters = [torch.nn.Parameter(torch.ones(s, dtype=k)) for s, k in zip(case.shapes, kinds, strict=True)]
    optimizer = hvd.DistributedOptimizer(
        getattr(torch.optim, case.optimizer)(parameters, lr=0.01),
        [(f"p{i}", p) for i, p in enumerate(parameters)],
        aggregator=hvd.AdaCons(**case.aggregator, nonfinite=case.nonfinite),
        compression=hvd.Compression.fp16 if case.fp16 else hvd.Compression.none,
        granularity=pick(case.granularity, parameters),
        groups=pick(case.groups, parameters),
        **case.options,
    )
    raw, seen = {}, {}
    for epoch in case.times(me):
        for step in epoch:
            for number, (start, duration) in case.frozen.items():
                parameters[number].requires_grad_(not start <= step < start + duration)
            optimizer.zero_grad()
            for turn in range(case.passes):
                _backward(case, parameters, step, turn)
            raw[step] = [array(p.grad, p) for p in parameters]
            was_sparse = [p.grad is not None and p.grad.is_sparse for p in parameters]
            seen[step] = _step_and_see(optimizer, parameters)
            for p, sparse in zip(parameters, was_sparse, strict=True):
                # Frozen parameters stay out, and what was sparse still is.
                assert p.requires_grad or p.grad is None
                assert not sparse or p.grad.is_sparse
        hvd.join()
        if case.epochs > 1:
            # Who left early has missed steps; as in plain Horovod, scripts make parameters equal before the next epoch.
            for number, p in enumerate(parameters):
                hvd.broadcast_(p.data, root_rank=case.last_to_join, name=f"parameter.{number}")
    memory = optimizer.state_dict()["adacons"]
    return judged(case, raw, seen, [array(p, p) for p in parameters], memory)


#: The arguments of which ranks may disagree.
ARGUMENTS = {
    *("aggregator", "schedule", "granularity", "groups", "compression", "bucket_bytes", "sparse_as_dense"),
    *("gradient_predivide_factor", "overlap", "grad_scaler", "check_replicas", "may_differ"),
}
FP16 = hvd.Compression.fp16


#: Not NAdam, whose float32 product PyTorch loads as float64 where parameters are; see test_torch_optimizer.py.
OPTIMIZERS = ("MomentumSGD", "AdamW", "RMSprop", "Adagrad", "Adam")
ROUNDING = 0.0
SAYS_WHO_LEADS = of_torch.SAYS_WHO_LEADS


class Training(of_torch.Training):
    """A training with these options, which are told of the parameters."""

    def __init__(self, options: Options = no_options, optimizer: str = "Adam") -> None:
        super().__init__(optimizer)
        hvd.init()
        given = {"aggregator": hvd.AdaCons(momentum=0.9), "schedule": "one-pass", **options(self.parameters)}
        plain = self.plain(self.parameters)
        #: As a profiler or a trainer may keep it.
        self.kept_step = plain.step
        self.optimizer = hvd.DistributedOptimizer(plain, zip("ab", self.parameters, strict=True), **given)

    def until_all_are_out_of_data(self) -> Any:
        return joining(hvd.join)


def after_backward(step: Callable[[Training], Any]) -> Callable[[Training, int], None]:
    def take(training: Training, number: int) -> None:
        training.backward(number)
        step(training)

    return take


AROUND = "something called SGD.step() instead of the distributed optimizer's step"
ANOTHER = "Adam, an optimizer that is not distributed, was used for parameters of the distributed one"
STRAYS = {
    "kept step": Stray(after_backward(lambda t: t.kept_step()), AROUND),
    "step of the class": Stray(after_backward(lambda t: torch.optim.SGD.step(t.optimizer)), AROUND),
    "compiled step": Stray(after_backward(lambda t: torch.compile(t.kept_step, backend="eager")()), AROUND),
    "plain optimizer": Stray(after_backward(lambda t: torch.optim.Adam(t.parameters).step()), ANOTHER, untouched=False),
}
TELLS_HOW, COMPARES_AVERAGED = True, False
OUTLIVES_A_RANK = True
FOUND = 2
OUT_OF_DATA_IS_TOLD = False


def _backward(case: Case, parameters: list[torch.Tensor], step: int, turn: int) -> None:
    outputs, gradients = [], []
    for number, p in enumerate(parameters):
        value = gradient(case, step, turn, harness.rank(), number)
        if value is None or not p.requires_grad:
            continue
        if number in case.sparse:
            # Every row twice and one not at all; what is sparse is added up by the optimizer, not by autograd.
            rows = torch.arange(len(p) - 1).repeat(2)
            outputs.append(torch.nn.functional.embedding(rows, p, sparse=True))
            value = value[:-1].repeat(2, 1)
        else:
            outputs.append(p.clone())
        gradients.append(value)
    if outputs:
        torch.autograd.backward(outputs, gradients)


def _step_and_see(optimizer: Any, parameters: list[torch.Tensor]) -> Seen:
    before = optimizer.report
    try:
        optimizer.synchronize()
    except FloatingPointError as error:
        return Seen(str(error))
    # While all parameters are frozen nothing is aggregated, and the report is that of an earlier step.
    report = None if optimizer.report is before else optimizer.report
    seen = Seen.of([array(p.grad, p) for p in parameters], report)
    with optimizer.skip_synchronize():
        optimizer.step()
    return seen
