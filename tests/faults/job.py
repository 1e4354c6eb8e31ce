"""A small job of any binding, with trainings that something happens to, one after the other. Run by the launcher.

    python job.py PLAN         # PLAN is JSON, see the defaults below

Which rank it happens to, in which step and in which phase of it, is the plan's. A rank whose training ends well prints
`finished` and a digest of the parameters, which must be that of a training to which nothing happened.
"""

import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

from harness.inside import Place, enter
from phases import watch

PLAN = {
    "binding": "with_torch",  # a module of tests/conformance
    "phase": None,  # "between steps"; in PyTorch "optimizer step", too, and over Horovod one of phases.PHASES
    # In each training: "kill", "stop" (for good), "pause" (to be stopped for two seconds), how long to sleep, or None.
    "what": ["kill"],
    "rank": 1,
    "step": 3,
    "steps": 6,
    "pause": 0.0,  # seconds after every step
    "timeout": None,  # how many seconds Gloo waits for a rank
    "env": {},  # for Horovod; horovodrun overrides some of what it is given
} | json.loads(sys.argv[1])
RANK = int(next(os.environ[name] for name in ("OMPI_COMM_WORLD_RANK", "HOROVOD_RANK", "RANK") if name in os.environ))
os.environ.update(PLAN["env"])
if PLAN["timeout"]:
    os.environ["HOROVOD_GLOO_TIMEOUT_SECONDS"] = str(PLAN["timeout"])
step, what = 0, None


def reached(phase):
    global what
    if what is None or (phase, step, RANK) != (PLAN["phase"], PLAN["step"], PLAN["rank"]):
        return
    print(f"{phase}: {what}", flush=True)
    happens, what = what, None
    if happens == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif happens in ("stop", "pause"):
        if happens == "pause":
            subprocess.Popen(["sh", "-c", f"sleep 2; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        time.sleep(happens)


def watched_sgd():
    """The name of an optimizer of PyTorch that says when it takes its step."""
    import torch

    class WatchedSGD(torch.optim.SGD):
        def step(self, closure=None):
            reached("optimizer step")
            return super().step(closure)

    torch.optim.WatchedSGD = WatchedSGD
    return WatchedSGD.__name__


sys.path.insert(0, str(Path(__file__).parents[1] / "conformance"))
# By its rank a training has its gradients. What ranks tell each other here goes through the binding alone.
enter(Place(RANK, 2, "", lambda value: [value]))
binding = importlib.import_module(PLAN["binding"])
of_pytorch = hasattr(binding, "of_torch")
if PLAN["binding"] == "with_torch":
    watch(reached)
elif of_pytorch and PLAN["timeout"]:
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=PLAN["timeout"]))
    binding.PATIENCE = PLAN["timeout"]  # DDP's groups are its own


def train(what_happens):
    global step, what
    what = what_happens
    training = binding.Training(optimizer=watched_sgd() if of_pytorch else binding.OPTIMIZERS[0])
    if PLAN["binding"] == "with_torch":
        # Of the parameters the first one's gradient is the last that backward computes.
        training.parameters[0].register_hook(lambda gradient: reached("backward"))
    for step in range(PLAN["steps"]):
        reached("between steps")
        training.step(step)
        print(f"step {step} at {time.time()}", flush=True)
        time.sleep(PLAN["pause"])
    bits = hashlib.sha256(b"".join(value.tobytes() for value in training.values()))
    print("finished", bits.hexdigest(), flush=True)


for what_happens in PLAN["what"]:
    train(what_happens)
