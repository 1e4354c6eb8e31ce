"""The GPU tests find out once which Horovod there is, and whether ranks can share the GPU over NCCL."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from gpu_job import DEVICE, LOOPBACK
from harness.launchers import program

_HOROVOD = """
import horovod.torch as hvd
print(hvd.gloo_built(), hvd.nccl_built() > 0)
"""

_TWO_RANKS = """
import os
import torch
import torch.distributed as dist
os.environ["NCCL_HOSTID"] = "rank" + os.environ["RANK"]
dist.init_process_group("nccl")
sum = torch.ones(1000, device="cuda")
dist.all_reduce(sum)
assert sum.tolist() == [2.0] * 1000, sum
dist.destroy_process_group()
"""


def _run(command: list[str], seconds: float) -> tuple[str, str]:
    """Run a command; return what it printed, and what was wrong with it, if anything."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env={**os.environ, **LOOPBACK})
    except subprocess.TimeoutExpired:
        return "", f"no end after {seconds:g} s"
    lines = done.stderr.strip().splitlines()
    errors = [line for line in lines if "Error" in line] or lines or [f"exit code {done.returncode}"]
    return done.stdout, errors[-1] if done.returncode else ""


@pytest.fixture(scope="session")
def horovod_kind() -> str:
    """How the installed Horovod moves what is on a GPU: "nccl", or "staged" through the host."""
    printed, wrong = _run([sys.executable, "-c", _HOROVOD], 120)
    if wrong:
        pytest.skip(f"no Horovod for PyTorch: {wrong}")
    gloo, nccl = printed.split()
    if gloo != "True":
        pytest.skip("this Horovod was built without Gloo, which starts the ranks")
    return "nccl" if nccl == "True" and DEVICE == "cuda" else "staged"


@pytest.fixture(scope="session")
def nccl_shares_the_gpu(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Why ranks cannot share the GPU over NCCL; empty if they can."""
    script = tmp_path_factory.mktemp("nccl") / "two_ranks.py"
    script.write_text(_TWO_RANKS)
    _, wrong = _run([program("torchrun"), "--standalone", "--nproc-per-node", "2", str(script)], 60)
    return f"two ranks cannot share the GPU over NCCL: {wrong}" if wrong else ""
