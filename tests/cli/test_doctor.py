"""`adacons doctor` on this machine, with its real launchers."""

from __future__ import annotations

import json
import os
from importlib import metadata

import pytest
from command import adacons, answer, assert_one_sentence

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


def test_tensorflow_is_checked_too(tmp_path):
    found = answer("doctor", "--frameworks", "tensorflow", "--launchers", "gloo", folder=tmp_path)
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


def test_a_cluster_of_nobody(tmp_path):
    assert_one_sentence(adacons("doctor", "--no-live", "--workers", "0", folder=tmp_path), "--workers", "positive")
