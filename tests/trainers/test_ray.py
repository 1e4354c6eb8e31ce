"""Ray Train's TorchTrainer with two workers: a job that fails and goes on, and the page's script."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "docs"))

from blocks import python_blocks  # noqa: E402

(SCRIPT,) = (block for block in python_blocks("trainers") if block.page == "ray.md")

#: Around the page's loop: the workers compare the parameters of the model that was attached to.
COMPARED = """
import ray
ray.init(num_cpus=2, include_dashboard=False)


def compared(config):
    import page_job

    real, seen = adacons_hvd.ddp.attach, []

    def attach(model, *args, **kwargs):
        seen.append(model)
        return real(model, *args, **kwargs)

    adacons_hvd.ddp.attach = attach
    train_loop(config)
    (model,) = seen
    page_job.compare({"model": model})


TorchTrainer(compared"""


@pytest.fixture
def run(tmp_path):
    """Runs a program with a Ray of its own, in the test's folder, and returns what it printed."""
    # The paths of sockets must be short.
    short = tempfile.mkdtemp(prefix="ray", dir="/tmp")

    def run_it(*arguments: str) -> str:
        ours = {
            "HOME": str(tmp_path),
            "RAY_TMPDIR": short,
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), str(HERE.parents[1])]),
        }
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**os.environ, **ours},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=150,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    yield run_it
    shutil.rmtree(short, ignore_errors=True)


def test_a_job_goes_on_from_its_checkpoint_bit_for_bit(run, tmp_path):
    printed = run(str(HERE / "ray_job.py"), str(tmp_path))
    assert "a worker fails" in printed
    assert "begins with batch 6" in printed
    assert {path.read_text() for path in (tmp_path / f"worker {n}" for n in range(2))} == {"equal bits"}


def test_the_script(run, tmp_path):
    assert SCRIPT.code.count("\nTorchTrainer(train_loop") == 1
    code = SCRIPT.code.replace("\nTorchTrainer(train_loop", COMPARED)
    (tmp_path / "train.py").write_text(code)
    printed = run("train.py")
    assert "equal bits" in printed
    assert "spread" in printed
