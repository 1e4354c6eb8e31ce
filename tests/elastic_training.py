"""An elastic job that tells all it does, and what all it did is held against the oracle.

Every worker tells its gradients, what became of them, and its parameters, step by step. `run` starts the job, and
`check` and `check_commits` go through what was told.
"""

from __future__ import annotations

import json

import numpy as np
import oracle

# Stages are what lies between changes of the workers. A model with three optimizers; the last is made anew in each
# stage, as scripts do that make theirs inside of the training function. (Horovod's own, the one without an aggregator,
# cannot be: its hooks outlive it.)
SCRIPT = """
import hashlib, json, os, signal, sys, time
import torch
import adacons_hvd.torch as hvd
from adacons_hvd import AdaCons, Curvature
from adacons_hvd.insight import SickWorkers
from harness.elastic import tell
from phases import watch

plan = json.loads(sys.argv[1])
hvd.init()
torch.manual_seed(os.getpid())  # nobody begins with what the others have
body = torch.nn.Linear(4, 3).double()
middle = torch.nn.Linear(3, 3).double()
head = torch.nn.Linear(3, 1).double()
model = torch.nn.Sequential(body, middle, head)

def optimizer_of(part, aggregator, cls, **options):
    inner = cls(part.parameters(), lr=0.01, **options)
    named = [(name, p) for name, p in model.named_parameters() if any(p is q for q in part.parameters())]
    schedule = plan["schedule"] if plan["aggregator"] else {}
    return hvd.DistributedOptimizer(inner, named, aggregator=aggregator if plan["aggregator"] else None, **schedule)

def flat(part, of):
    return torch.cat([of(p).reshape(-1) for p in part.parameters()]).tolist()

def bits():
    values = flat(model, lambda p: p.detach())
    return hashlib.sha256(json.dumps([float(v).hex() for v in values]).encode()).hexdigest()

def reached(phase):
    if [state.stage, state.count, hvd.rank(), hvd.size(), phase] in plan["deaths"]:
        os.kill(os.getpid(), signal.SIGKILL)

class Inner(torch.optim.AdamW):
    def step(self, closure=None):
        reached("optimizer step")
        return super().step(closure)

watch(reached)
# With weight decay, because Horovod's broadcast_optimizer_state moves the parameters of newcomers then.
# Watched, which changes nothing: what is watched of workers begins afresh, and what AdaCons remembers does not.
optimizer = optimizer_of(body, SickWorkers(AdaCons(momentum=0.9)), Inner, weight_decay=0.5)
# Its history is spread over the workers.
curved = optimizer_of(middle, Curvature(memory=4), torch.optim.SGD)

def second_optimizer():
    return optimizer_of(head, AdaCons(momentum=0.0), torch.optim.SGD)

plain_second = None if plan["aggregator"] else second_optimizer()

@hvd.elastic.run
def train(state):
    tell(enter=state.step, bits=bits())
    second = plain_second or second_optimizer()
    workers = hvd.allgather_object(os.getpid(), name="workers")
    if workers != state.workers:
        state.workers, state.stage, state.count = workers, state.stage + 1, 0
    while [state.stage, state.count] != [len(plan["sizes"]) - 1, 6] and state.step < 3000:
        draw = torch.Generator().manual_seed(1000 * state.step + hvd.rank())
        x = torch.randn(8, 4, generator=draw, dtype=torch.float64)
        optimizer.zero_grad()
        curved.zero_grad()
        second.zero_grad()
        loss = (model(x) - 4 - (1 + 0.3 * hvd.rank()) * x.sum(1, keepdim=True)).square().mean()
        parameters = list(model.parameters())
        own = dict(zip(parameters, torch.autograd.grad(loss, parameters, retain_graph=True)))
        place = dict(stage=state.stage, rank=hvd.rank(), size=hvd.size())
        tell(begun=state.step + 1, raw=[flat(part, own.get) for part in (body, middle, head)], **place)
        loss.backward()
        reached("backward")
        found = []
        for part, one in ((body, optimizer), (middle, curved), (head, second)):
            one.synchronize()
            found.append(flat(part, lambda p: p.grad))
            with one.skip_synchronize():
                one.step()
        state.step += 1
        state.count += 1
        tell(done=state.step, found=found, bits=bits(), **place)
        if state.step % 2 == 0:
            tell(committing=state.step, bits=bits())
            state.commit()
        time.sleep(0.05)

state = hvd.elastic.TorchState(model=model, optimizer=optimizer, curved=curved, step=0, workers=[], stage=-1, count=0)
train(state)
if plan["aggregator"]:
    tell(report=optimizer.report.as_dict())
tell(end=True)
"""


def run(cluster, folder, hosts, sizes, *, aggregator=True, deaths=(), changes=(), schedule=None, seconds=180):
    """A job whose number of workers goes through `sizes`.

    `changes` are the hosts after 3 steps of each stage, None for no change; `deaths` are lists of a stage, how many
    steps of it have been done, a rank, the number of workers, and a phase.
    """
    options = {"schedule": schedule} if schedule else {}
    plan = {"sizes": sizes, "aggregator": aggregator, "deaths": list(deaths), "schedule": options}
    with cluster.elastic(SCRIPT, folder, hosts=hosts, args=[json.dumps(plan)]) as job:
        for stage, new_hosts in enumerate(changes):
            if new_hosts is None:
                continue
            job.wait_until(lambda told: done_in(told, stage) >= 3 * sizes[stage], 180)  # noqa: B023
            job.hosts = new_hosts
        result = job.result(seconds)
    assert result.exit_code == 0, result
    assert sum("end" in fact for fact in result.told) == sizes[-1], result
    return result.told


def done_in(told, stage):
    """How many steps the workers have done in this stage, all together."""
    return sum("done" in fact and fact["stage"] == stage for fact in told)


def check(told, sizes, aggregator=True):
    """Hold what was told against the oracle; returns how many steps were begun and had to be done again."""
    begun, done = {}, {}
    for fact in told:
        for kind, steps in (("begun", begun), ("done", done)):
            if kind in fact:
                steps.setdefault((fact["stage"], fact[kind]), {})[fact["rank"]] = fact
    for stage, size in enumerate(sizes):
        assert {fact["size"] for (where, _), facts in done.items() if where == stage for fact in facts.values()} == {
            size
        }
    memories = {0: (None, [])}  # by step: what the oracles remember after it
    redone = 0
    for (stage, step), facts in sorted(begun.items()):
        redone += (stage + 1, step) in begun
        finished = done.get((stage, step), {})
        if not finished:
            assert (stage + 1, step) in begun, f"step {step} was lost"
            continue
        assert len({fact["bits"] for fact in finished.values()}) == 1, f"parameters differ after step {step}"
        raws = [facts[rank]["raw"] for rank in range(sizes[stage])]
        momentum, means = memories[step - 1]
        judges = [oracle.Oracle(0.9), oracle.CurvatureOracle(memory=4), oracle.Oracle(0.0)]
        judges[0].m = None if momentum is None else resampled(momentum, len(raws))
        judges[1].means = list(means)
        for part, judge in enumerate(judges):
            raw = [np.array(theirs[part]) for theirs in raws]
            expected = judge(raw) if aggregator else sum(raw) / len(raw)
            for fact in finished.values():
                assert oracle.error([fact["found"][part]], [expected]) < 1e-9, f"stage {stage}, step {step}"
        memories[step] = judges[0].m, judges[1].means
    return redone


def resampled(curve, workers):
    """The momentum's curve, for another number of workers."""
    return list(np.interp(np.linspace(0, len(curve) - 1, workers), range(len(curve)), curve))


def check_commits(told):
    """Whoever begins a stage begins it with what was committed last."""
    committed = {}
    for fact in told:
        if "committing" in fact:
            committed[fact["committing"]] = fact["bits"]
        elif fact.get("enter"):
            assert fact["enter"] == max(committed)
            assert fact["bits"] == committed[fact["enter"]]
    stages = [fact["enter"] for fact in told if "enter" in fact]
    assert stages == sorted(stages)
