"""The scripts of the trainers' pages run on two processes, as a reader would run them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "docs"))

from blocks import python_blocks  # noqa: E402

SCRIPTS = python_blocks("trainers")
#: What is added to a script: the ranks compare the parameters it has trained.
COMPARE = f"""
import sys
sys.path.append({str(HERE)!r})
from page_job import compare
compare(globals())
"""


def test_each_page_has_a_script_of_at_most_forty_lines():
    assert {"lightning.md", "transformers.md", "accelerate.md", "ray.md"} == {block.page for block in SCRIPTS}
    for block in SCRIPTS:
        assert len(block.code.splitlines()) <= 40, block


@pytest.mark.ranks(2, launcher="torchrun", pool="trainers")
@pytest.mark.time_limit(120)
@pytest.mark.parametrize("block", [b for b in SCRIPTS if b.page != "ray.md"], ids=str)
def test_a_script(cluster, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = cluster.script(block.code + COMPARE)
    assert result.exit_code == 0, result
    assert result.stdout[0].splitlines()[-1] == "equal bits", result
    assert "spread" in result.stdout[0]
