"""The examples run as their documentation says."""

from __future__ import annotations

import gzip
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
DATA = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(scope="session")
def few_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fashion-MNIST's first images of each file: to read all of them took longer than to train."""
    folder = tmp_path_factory.mktemp("fashion-mnist")
    for path in DATA.glob("*.gz"):
        header, each = (16, 28 * 28) if "images" in path.name else (8, 1)
        with gzip.open(path) as file:
            (folder / path.name).write_bytes(gzip.compress(file.read(header + 8192 * each), 1))
    return folder


def changed_lines(diff: str) -> tuple[list[str], list[str]]:
    body = [line for line in diff.splitlines() if not line.startswith(("---", "+++"))]
    return [line[1:] for line in body if line[:1] == "-"], [line[1:] for line in body if line[:1] == "+"]


@pytest.mark.ranks(2, launcher="gloo")
@pytest.mark.time_limit(180)
def test_a_plain_horovod_script_needs_two_lines(cluster, tmp_path, few_images):
    """The script as it is, then with the diff, which is the one in the README."""
    diff = (EXAMPLES / "fashion_mnist.diff").read_text()
    removed, added = changed_lines(diff)
    assert len(removed) == len(added) == 2
    readme = re.search(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert readme is not None
    assert changed_lines(readme[1]) == (removed, added)

    plain, ours = tmp_path / "plain.py", tmp_path / "ours.py"
    shutil.copy(EXAMPLES / "fashion_mnist.py", plain)
    subprocess.run(
        ["patch", "--fuzz=0", "--output", ours, plain, EXAMPLES / "fashion_mnist.diff"], check=True, timeout=10
    )
    outcomes = {}
    for script in (plain, ours):
        result = cluster.script(
            script, args=["--data", str(few_images), "--epochs", "1", "--samples", "8192"], forked=True
        )
        assert result.exit_code == 0, result.stderr
        outcomes[script.name] = float(re.search(r"test accuracy ([\d.]+)", result.stdout[0])[1])
    assert outcomes["plain.py"] != outcomes["ours.py"]
    # Both have learned; a network that has not is right one time in ten.
    assert min(outcomes.values()) > 0.6


def test_the_demo_ends_in_a_table_and_a_picture(tmp_path, few_images):
    picture = tmp_path / "curves.png"
    command = [sys.executable, EXAMPLES / "demo.py", "--workers", "2", "--steps", "12", "--picture", picture]
    command += ["--data", few_images]
    result = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "after 12 steps on 2 workers" in result.stdout
    for method in ("average", "AdaCons", "Curvature"):
        # Once with its rate and its score, and once with the workers' shares.
        assert result.stdout.count(f"│ {method} ") == 2
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_demo_says_what_is_missing(tmp_path):
    command = [sys.executable, EXAMPLES / "demo.py", "--data", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert "install Debian's package dataset-fashion-mnist" in result.stderr
    assert "Traceback" not in result.stderr
