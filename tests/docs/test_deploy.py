"""The files for clusters, as far as they can be checked without one."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from blocks import ROOT

DEPLOY = ROOT / "docs" / "deploy"

SCRIPT = """
import torch
import adacons_hvd.torch as hvd

hvd.init()
model = torch.nn.Linear(3, 1)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), aggregator=hvd.AdaCons())
model(torch.randn(8, 3)).square().mean().backward()
optimizer.step()
print(f"rank {hvd.rank()} of {hvd.size()} ended well", flush=True)
"""


def test_every_file_is_shown_on_the_page():
    page = (ROOT / "docs" / "deploying.md").read_text()
    for file in DEPLOY.iterdir():
        if file.is_file():
            assert f"deploy/{file.name}" in page


def test_the_slurm_script_runs(tmp_path):
    """As Slurm would run it, on the one host there is."""
    (tmp_path / "train.py").write_text(SCRIPT)
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SLURM_NTASKS": "2",
        "SLURM_CPUS_PER_TASK": "1",
        "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", ""),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "OMPI_MCA_btl_vader_single_copy_mechanism": "none",
    }
    done = subprocess.run(
        ["bash", DEPLOY / "slurm.sbatch", "train.py"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert f"rank {rank} of 2 ended well" in done.stdout


def test_the_slurm_options_are_ones_that_sbatch_has():
    lines = (DEPLOY / "slurm.sbatch").read_text().splitlines()
    options = [line.split()[1].split("=")[0] for line in lines if line.startswith("#SBATCH")]
    assert set(options) <= {
        "--job-name",
        "--nodes",
        "--ntasks-per-node",
        "--gpus-per-node",
        "--cpus-per-task",
        "--time",
    }
    # Slurm stops reading options at the first command.
    assert max(i for i, line in enumerate(lines) if line.startswith("#SBATCH")) < lines.index("set -euo pipefail")


# The fields of an MPIJob v2beta1 and of the pods in it that the manifest uses, and the types of their values.
CONTAINER = {
    "name": str,
    "image": str,
    "securityContext": {"runAsUser": int},
    "env": [{"name": str, "value": str}],
    "command": [str],
    "args": [str],
    "resources": {"limits": {"nvidia.com/gpu": int}},
    "volumeMounts": [{"name": str, "mountPath": str}],
}
POD = {"spec": {"containers": [CONTAINER], "volumes": [{"name": str, "emptyDir": {"medium": str}}]}}
REPLICAS = {"replicas": int, "template": POD}
MPIJOB = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str},
    "spec": {
        "slotsPerWorker": int,
        "sshAuthMountPath": str,
        "runPolicy": {"cleanPodPolicy": str, "backoffLimit": int},
        "mpiReplicaSpecs": {"Launcher": REPLICAS, "Worker": REPLICAS},
    },
}


def assert_fits(value: Any, shape: Any, where: str = "") -> None:
    if isinstance(shape, dict):
        assert isinstance(value, dict), where
        for key, inner in value.items():
            assert key in shape, f"{where} has no field {key}"
            assert_fits(inner, shape[key], f"{where}.{key}")
    elif isinstance(shape, list):
        assert isinstance(value, list), where
        for item in value:
            assert_fits(item, shape[0], where)
    else:
        assert type(value) is shape, f"{where} must be a {shape.__name__}"


def test_the_mpijob_has_the_fields_of_its_api():
    job = yaml.safe_load((DEPLOY / "mpijob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v2beta1", "MPIJob")
    assert_fits(job, MPIJOB)
    spec = job["spec"]
    launcher, worker = (spec["mpiReplicaSpecs"][name] for name in ("Launcher", "Worker"))
    assert launcher["replicas"] == 1
    (starts,), (trains,) = (side["template"]["spec"]["containers"] for side in (launcher, worker))
    command = starts["command"]
    assert int(command[command.index("-np") + 1]) == worker["replicas"] * spec["slotsPerWorker"]
    assert trains["resources"]["limits"]["nvidia.com/gpu"] == spec["slotsPerWorker"]
    mounted = {mount["name"] for mount in trains["volumeMounts"]}
    assert mounted == {volume["name"] for volume in worker["template"]["spec"]["volumes"]}
    assert (ROOT / starts["args"][1]).exists(), "the image has the repository's examples"


def parameters_of(module: str, *path: str) -> set[str]:
    """The parameters of a function or method, from its source: its module needs Ray or Spark to be imported."""
    horovod = importlib.util.find_spec("horovod")
    assert horovod is not None
    assert horovod.submodule_search_locations
    file = Path(horovod.submodule_search_locations[0]).parent / f"{module.replace('.', '/')}.py"
    tree: Any = ast.parse(file.read_text())
    for name in path:
        (tree,) = (node for node in tree.body if getattr(node, "name", None) == name)
    arguments = tree.args
    return {argument.arg for argument in (*arguments.args, *arguments.kwonlyargs)}


@pytest.mark.parametrize(
    ("call", "signature"),
    [
        ("RayExecutor", ("horovod.ray.runner", "RayExecutor", "__init__")),
        ("RayExecutor.create_settings", ("horovod.ray.runner", "RayExecutor", "create_settings")),
        ("executor.run", ("horovod.ray.runner", "RayExecutor", "run")),
        ("horovod.spark.run", ("horovod.spark.runner", "run")),
    ],
)
def test_a_job_calls_horovod_as_it_wants_to_be_called(call, signature):
    tree = ast.parse((DEPLOY / "job.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == call]
    assert calls
    for node in calls:
        assert {keyword.arg for keyword in node.keywords} <= parameters_of(*signature)


@pytest.mark.ranks(2, launcher="gloo")
def test_what_a_job_trains_with_trains(cluster):
    """The function that Ray and Spark would call on every worker."""
    source = (DEPLOY / "job.py").read_text()
    (function,) = (ast.unparse(n) for n in ast.parse(source).body if getattr(n, "name", "") == "train")

    def train() -> float:
        namespace: dict[str, Any] = {}
        exec(function, namespace)
        loss: float = namespace["train"](learning_rate=1e-2)
        return loss

    assert all(loss < 20 for loss in cluster.run(train))
