"""`adacons doctor` on this machine, with its real launchers."""

from __future__ import annotations

import json
import os
from importlib import metadata

import pytest
from command import adacons, answer, assert_one_sentence

from adacons_hvd.cli import built

OPERATIONS = {"allreduce", "allgather", "alltoall", "broadcast"}
SCHEDULES = {"two-pass", "one-pass", "gather"}


def test_a_healthy_machine(tmp_path):
    found = answer("doctor", "--frameworks", "torch", folder=tmp_path)
    assert found["installed"]["torch"] == metadata.version("torch")
    assert found["installed"]["horovod"] == metadata.version("horovod")
    assert found["launchers"]["horovodrun"].endswith("horovodrun")
    assert found["works"] is True
    checks = {check["launcher"]: check for check in found["checks"]}
    assert set(checks) == {"mpi", "gloo", "torchrun"}
    for launcher, check in checks.items():
        assert check["error"] is None
        assert set(check["operations"]) == (set() if launcher == "torchrun" else OPERATIONS)
        assert set(check["schedules"]) == SCHEDULES
        assert not any({**check["operations"], **check["schedules"]}.values())
    # What a real optimizer chose on real processes, for three sizes under each of Horovod's launchers.
    assert len(found["choices"]) == 6
    for choice in found["choices"]:
        assert choice["schedule"] in choice["reason"]
        assert "2 workers on 1 host" in choice["reason"]
        # Of the schedules that can have a history.
        assert "should take" in choice["curvature"]
        assert "two-pass" not in choice["curvature"]


def test_tensorflow_is_checked_too(tmp_path):
    # Not under horovodrun, which imports TensorFlow once more before it starts anything.
    found = answer("doctor", "--frameworks", "tensorflow", "--launchers", "mpi", folder=tmp_path)
    (check,) = found["checks"]
    assert set(check["operations"]) == OPERATIONS
    assert set(check["schedules"]) == SCHEDULES


def test_a_horovod_that_does_not_load_is_reported(tmp_path):
    """As after an update of the framework: the compiled part no longer fits."""
    broken = tmp_path / "site" / "horovod"
    (broken / "torch").mkdir(parents=True)
    (broken / "__init__.py").write_text("")
    (broken / "torch" / "__init__.py").write_text("raise ImportError('undefined symbol: _ZN5torch3jit')")
    env = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])}
    arguments = ["doctor", "--frameworks", "torch", "--launchers", "mpi"]
    done = adacons(*arguments, "--json", folder=tmp_path, env=env)
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert found["works"] is False
    assert "undefined symbol" in found["checks"][0]["error"]
    assert any("horovod_build --install" in line for line in found["advice"])


@pytest.mark.parametrize(
    ("network", "schedule"), [(["--per-host", "1", "--gbits", "1"], "one-pass"), (["--per-host", "8"], "two-pass")]
)
def test_a_cluster_that_is_not_at_hand(network, schedule, tmp_path):
    found = answer("doctor", "--no-live", "--workers", "64", *network, folder=tmp_path)
    assert found["checks"] == []
    largest = max(found["choices"], key=lambda choice: choice["bytes"])
    assert largest["schedule"] == schedule
    shown = adacons("doctor", "--no-live", "--workers", "64", *network, folder=tmp_path)
    assert shown.returncode == 0
    assert largest["reason"].removeprefix("auto: ") in " ".join(shown.stdout.split())
    assert "with Curvature(): one-pass should take" in shown.stdout


def test_a_cluster_of_nobody(tmp_path):
    assert_one_sentence(adacons("doctor", "--no-live", "--workers", "0", folder=tmp_path), "--workers", "positive")


SAID = {
    "pytorch": "2.14.1",
    "dummy": "none",
    "cxx_compiler": "GNU 12.2.0",
    "pytorch_cxx_standard": "20",
    "cuda": "13.0.88",
    "nccl": "23007",
    "cuda_architectures": "sm_80,sm_90,compute_90",
}
SMI = '#!/bin/sh\necho "NVIDIA H100 80GB HBM3, {capability}, 580.95.05"\n'


def gpu_machine(folder, said, capability):
    """A Horovod that says how it was built, and a driver's program that names one GPU."""
    (folder / "site" / "horovod").mkdir(parents=True)
    (folder / "site" / "horovod" / "__init__.py").write_text("")
    (folder / "site" / "horovod" / "metadata.json").write_text(json.dumps(said))
    (folder / "bin").mkdir()
    (folder / "bin" / "nvidia-smi").write_text(SMI.format(capability=capability))
    (folder / "bin" / "nvidia-smi").chmod(0o755)
    return {
        "PATH": os.pathsep.join([str(folder / "bin"), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(folder / "site"), os.environ.get("PYTHONPATH", "")]),
    }


def test_how_horovod_was_built_is_shown(tmp_path):
    env = gpu_machine(tmp_path, SAID, "9.0")
    found = json.loads(adacons("doctor", "--no-live", "--json", folder=tmp_path, env=env).stdout)
    assert found["horovod"]["compiler"] == "GNU 12.2.0"
    assert found["horovod"]["standard"] == {"torch": "20"}
    assert found["horovod"]["nccl"] == "2.30.7"
    assert found["horovod"]["architectures"] == ["sm_80", "sm_90", "compute_90"]
    (gpu,) = found["machine"]["gpus"]
    assert gpu == {"name": "NVIDIA H100 80GB HBM3", "architecture": "sm_90", "driver": "580.95.05"}
    assert not any("compiled for" in line for line in found["advice"])
    shown = " ".join(adacons("doctor", "--no-live", folder=tmp_path, env=env).stdout.split())
    for text in ("GCC 12.2.0, C++20 for torch", "13.0.88, for sm_80, sm_90, compute_90", "2.30.7", "driver 580.95.05"):
        assert text in shown


def test_a_gpu_that_was_not_compiled_for(tmp_path):
    env = gpu_machine(tmp_path, SAID | {"cuda_architectures": "sm_80,sm_86"}, "9.0")
    found = json.loads(adacons("doctor", "--no-live", "--json", folder=tmp_path, env=env).stdout)
    assert any("compiled for sm_80, sm_86, not for the sm_90 here" in line for line in found["advice"])


def test_a_horovod_without_cuda_beside_a_gpu(tmp_path):
    env = gpu_machine(tmp_path, {"pytorch": "2.13.0", "cxx_compiler": "GNU 12.2.0"}, "8.0")
    found = json.loads(adacons("doctor", "--no-live", "--json", folder=tmp_path, env=env).stdout)
    assert any("built without CUDA" in line and "--nccl" in line for line in found["advice"])


@pytest.mark.parametrize(
    ("loaded", "expected"),
    [
        ({"/a/libnccl.so.2": "2.30.7"}, None),
        ({"/a/libnccl.so.2": "2.28.9"}, "built with NCCL 2.30.7, and 2.28.9 is loaded (/a/libnccl.so.2)"),
        ({"/a/libnccl.so.2": "2.30.7", "/b/libnccl.so.2": "2.28.9"}, "Two NCCLs are loaded in one process"),
        ({}, None),
    ],
)
def test_an_nccl_other_than_the_one_built_with(loaded, expected):
    horovod = {"nccl": "2.30.7", "architectures": [], "cuda": "13.0.88", "compiler": "GNU 12.2.0"}
    found = built.warnings(horovod, [], loaded)
    assert (found == []) if expected is None else (expected in found[0])
