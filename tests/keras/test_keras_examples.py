"""The example: a plain Horovod script, and the two lines that make it aggregate."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "keras_regression.py"
DIFF = SCRIPT.with_suffix(".diff")


def changed_lines(diff: str) -> list[str]:
    return [line for line in diff.splitlines() if re.match(r"[-+](?![-+])", line)]


def test_the_readme_shows_the_two_lines():
    changed = changed_lines(DIFF.read_text())
    assert [line[0] for line in changed] == ["-", "+", "-", "+"]
    blocks = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert changed in [changed_lines(block) for block in blocks]


@pytest.mark.ranks(2, launcher="mpi", pool="tensorflow")
@pytest.mark.time_limit(180)
@pytest.mark.parametrize("ours", [False, True])
def test_ranks_end_with_the_same_weights_only_with_this_package(cluster, tmp_path, ours):
    script = tmp_path / "script.py"
    shutil.copy(SCRIPT, script)
    if ours:
        subprocess.run(["patch", "--fuzz=0", script, DIFF], check=True, timeout=10)
    result = cluster.script(script, forked=True)
    assert result.exit_code == 0, str(result)
    ends = {line.split(" ends at ")[1] for out in result.stdout for line in out.splitlines() if " ends at " in line}
    assert (len(ends) == 1) == ours
