"""Every code block of README and documentation that can run is run."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import harness
import pytest
from blocks import BLOCKS, ROOT, Block, python_blocks

from adacons_hvd.cli import main, make_parser

#: Blocks that show lines of a script which the page leaves to the reader.
FRAGMENTS = {
    "README.md": "adacons_hvd.ddp.attach(",
    "elastic.md": "@hvd.elastic.run",
    "tensorflow.md": "hvd.load_model(",
    "transformers.md": "class MyTrainer(AggregationMixin",
}


def is_fragment(block: Block) -> bool:
    words = FRAGMENTS.get(block.page)
    return block.how == "fragment" or (block.how == "" and words is not None and words in block.code)


@pytest.mark.parametrize(
    "block", [b for b in (*python_blocks(), *python_blocks("continue")) if not is_fragment(b)], ids=str
)
def test_in_one_process(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block.code, str(block), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python" and is_fragment(b)], ids=str)
def test_a_fragment_compiles(block):
    compile(block.code, str(block), "exec")


def run_on_this_rank(code: str, name: str, folder: str) -> dict[str, object]:
    """Run a block and see what it leaves, on every rank."""
    import hashlib
    import os

    os.chdir(folder)
    namespace: dict = {"__name__": "__main__"}
    exec(compile(code, name, "exec"), namespace)
    held = namespace.get("model") or namespace.get("weights")
    if hasattr(held, "get_weights"):
        arrays = held.get_weights()
    elif hasattr(held, "parameters"):
        arrays = [p.detach().numpy() for p in held.parameters()]
    else:
        arrays = [held.numpy()]
    bits = b"".join(array.tobytes() for array in arrays)
    return {"digests": harness.gather(hashlib.sha256(bits).hexdigest())}


def check_on_ranks(cluster, block, folder):
    for result in cluster.run(run_on_this_rank, block.code, str(block), str(folder)):
        assert len(set(result["digests"])) == 1, "ranks ended with different parameters"


@pytest.mark.ranks(2, launcher="gloo")
@pytest.mark.parametrize("block", python_blocks(launcher="gloo", pool=""), ids=str)
def test_on_two_ranks(cluster, block, tmp_path):
    check_on_ranks(cluster, block, tmp_path)
    assert ("log_reports" in block.code) == (tmp_path / "run.jsonl").exists()


@pytest.mark.ranks(2, launcher="gloo", pool="tensorflow")
@pytest.mark.parametrize("block", python_blocks(launcher="gloo", pool="tensorflow"), ids=str)
def test_on_two_ranks_with_tensorflow(cluster, block, tmp_path):
    check_on_ranks(cluster, block, tmp_path)
    assert ("keras_callback" in block.code) == (tmp_path / "run.jsonl").exists()


@pytest.mark.ranks(2, launcher="torchrun")
@pytest.mark.parametrize("block", python_blocks(launcher="torchrun"), ids=str)
def test_under_torchrun(cluster, block, tmp_path):
    code = block.code.replace('"run.jsonl"', repr(str(tmp_path / "run.jsonl")))
    result = cluster.script(code, forked=True)
    assert result.exit_code == 0, result
    assert (tmp_path / "run.jsonl").read_text().startswith('{"time"')


def test_every_kind_of_block_is_run_somewhere():
    """A comment that is misspelt would otherwise leave a block out."""
    known = {"", "continue", "fragment", "probe", "trainers"}
    for block in BLOCKS:
        assert block.how in known or "ranks=2" in block.how.split(), f"{block}: what is {block.how!r}?"
        assert block.language in {"python", "sh", "diff", "text"}, f"{block}: nothing runs {block.language}"
    assert len(python_blocks(launcher="gloo", pool="")) >= 2
    assert len(python_blocks(launcher="gloo", pool="tensorflow")) >= 2
    assert len(python_blocks(launcher="torchrun")) >= 1


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "sh"], ids=str)
def test_commands(block):
    """Shell understands them, and those of ours are what our parser understands."""
    subprocess.run(["bash", "-n"], input=block.code, text=True, timeout=20, check=True)
    for line in block.code.splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["adacons"]:
            assert make_parser().parse_args(words[1:])


def test_the_diff_is_that_of_the_example():
    def changes(text: str) -> list[str]:
        return [line for line in text.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]

    (block,) = (block for block in BLOCKS if block.language == "diff" and block.page == "migrating.md")
    assert changes(block.code) == changes((ROOT / "examples" / "fashion_mnist.diff").read_text())


def test_the_probe_of_the_documentation(tmp_path, monkeypatch, capsys):
    (block,) = python_blocks("probe")
    (tmp_path / "my_model.py").write_text(block.code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert main(["probe", "my_model:make", "--workers", "4", "--batch-sizes", "8", "--steps", "0", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert 0 < row["cosine"] < 1
