"""A small training job that something happens to. Run by the launcher, once per fault.

    python job.py PLAN         # PLAN is JSON, see the defaults below

Which rank it happens to, in which step and in which phase of it, is the plan's. Rank 0 of a job that ends well prints
`finished` and a digest of the parameters, which must be the one of a job that nothing happened to.
"""

import hashlib
import json
import os
import signal
import sys
import time

import torch
from phases import watch

import adacons_hvd.torch as hvd

PLAN = {
    "phase": None,  # one of phases.PHASES
    "what": "kill",  # "kill", "stop" (until somebody sends SIGCONT) or a number of seconds to sleep
    "rank": 1,
    "step": 3,
    "steps": 6,
    "pause": 0.0,  # seconds after every step
    "env": {},  # for Horovod; horovodrun overrides some of what it is given
} | json.loads(sys.argv[1])

os.environ.update(PLAN["env"])
hvd.init()
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 3))
step = 0


def reached(phase):
    if (phase, step, hvd.rank()) != (PLAN["phase"], PLAN["step"], PLAN["rank"]):
        return
    print(f"{phase}: {PLAN['what']}", flush=True)
    if PLAN["what"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif PLAN["what"] == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        time.sleep(PLAN["what"])


class Inner(torch.optim.SGD):
    def step(self, closure=None):
        reached("optimizer step")
        return super().step(closure)


watch(reached)
optimizer = hvd.DistributedOptimizer(
    Inner(model.parameters(), lr=0.01), model.named_parameters(), aggregator=hvd.AdaCons(), schedule="one-pass"
)
# The first layer's gradient is the last that backward computes.
model[0].bias.register_hook(lambda gradient: reached("backward"))
draw = torch.Generator().manual_seed(hvd.rank())
for step in range(PLAN["steps"]):
    optimizer.zero_grad()
    x = torch.randn(16, 20, generator=draw)
    (model(x) - 4 - x.sum(1, keepdim=True)).square().mean().backward()
    optimizer.step()
    print(f"step {step} at {time.time()}", flush=True)
    time.sleep(PLAN["pause"])
bits = hashlib.sha256(repr([p.tolist() for p in model.parameters()]).encode()).hexdigest()
print("finished", bits, flush=True)
