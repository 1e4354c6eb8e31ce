"""An elastic job of PyTorch over Horovod, whose course is the plan's. Run by the launcher."""

import hashlib
import json
import os
import time

import torch
from harness.elastic import Course, tell
from phases import watch

import adacons_hvd.torch as hvd
from adacons_hvd import AdaCons, Curvature
from adacons_hvd.insight import SickWorkers

# A model with three optimizers; the last is made anew in each stage, as scripts do that make theirs inside of the
# training function. (Horovod's own, the one without an aggregator, cannot be: its hooks outlive it.)
hvd.init()
torch.manual_seed(os.getpid())  # nobody begins with what the others have
body = torch.nn.Linear(4, 3).double()
middle = torch.nn.Linear(3, 3).double()
head = torch.nn.Linear(3, 1).double()
model = torch.nn.Sequential(body, middle, head)


def flat(part, of):
    return torch.cat([of(p).reshape(-1) for p in part.parameters()]).tolist()


def bits():
    values = flat(model, lambda p: p.detach())
    return hashlib.sha256(json.dumps([float(v).hex() for v in values]).encode()).hexdigest()


course = Course(hvd, bits)
plan = {"aggregator": True, "schedule": "auto"} | course.plan
watch(course.reached)


def optimizer_of(part, aggregator, schedule, cls, **options):
    inner = cls(part.parameters(), lr=0.01, **options)
    named = [(name, p) for name, p in model.named_parameters() if any(p is q for q in part.parameters())]
    if not plan["aggregator"]:
        return hvd.DistributedOptimizer(inner, named)
    return hvd.DistributedOptimizer(inner, named, aggregator=aggregator, schedule=schedule)


class Inner(torch.optim.AdamW):
    def step(self, closure=None):
        course.reached("optimizer step")
        return super().step(closure)


# With weight decay, because Horovod's broadcast_optimizer_state moves the parameters of newcomers then.
# Watched, which changes nothing: what is watched of workers begins afresh, and what AdaCons remembers does not.
optimizer = optimizer_of(body, SickWorkers(AdaCons(momentum=0.9)), plan["schedule"], Inner, weight_decay=0.5)
# Its history is spread over the workers.
curved = optimizer_of(middle, Curvature(memory=4), "one-pass", torch.optim.SGD)


def second_optimizer():
    return optimizer_of(head, AdaCons(momentum=0.0), plan["schedule"], torch.optim.SGD)


plain_second = None if plan["aggregator"] else second_optimizer()


@hvd.elastic.run
def train(state):
    course.enter(state, hvd.allgather_object(os.getpid(), name="workers"))
    second = plain_second or second_optimizer()
    while not course.over:
        draw = torch.Generator().manual_seed(1000 * state.step + hvd.rank())
        x = torch.randn(8, 4, generator=draw, dtype=torch.float64)
        optimizer.zero_grad()
        curved.zero_grad()
        second.zero_grad()
        loss = (model(x) - 4 - (1 + 0.3 * hvd.rank()) * x.sum(1, keepdim=True)).square().mean()
        parameters = list(model.parameters())
        own = dict(zip(parameters, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True))
        course.begin(raw=[flat(part, own.get) for part in (body, middle, head)])
        loss.backward()
        course.reached("backward", together=True)
        found = []
        for part, one in ((body, optimizer), (middle, curved), (head, second)):
            one.synchronize()
            found.append(flat(part, lambda p: p.grad))
            with one.skip_synchronize():
                one.step()
        if course.end(found=found, steps=optimizer.report.steps if plan["aggregator"] else None):
            state.commit()
        time.sleep(0.05)


train(hvd.elastic.TorchState(model=model, optimizer=optimizer, curved=curved, **Course.FIELDS))
if plan["aggregator"]:
    tell(report=optimizer.report.as_dict())
tell(end=True)
