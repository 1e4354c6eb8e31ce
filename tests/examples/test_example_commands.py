"""The commands of docs/examples.md are those that the scripts understand."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.replace("\\\n", "").splitlines() if line]
SCRIPTS = {
    "linear_regression",
    "linear_regression_keras",
    "image_classification",
    "vision_transformer",
    "bert_pretraining",
    "recommendation",
    "object_detection",
}


class ParsedError(Exception):
    """The command line was understood; what follows is no matter of this test."""


def script_of(command: str) -> tuple[str, list[str]]:
    words = shlex.split(command)
    number = next(number for number, word in enumerate(words) if word.endswith(".py"))
    assert words[0] == "horovodrun"
    assert words[number - 1] == "python"
    assert (ROOT / words[number]).exists()
    return Path(words[number]).stem, words[number + 1 :]


def test_every_script_has_a_command_for_both_sizes():
    of_size = {"full": set(), "small": set()}
    for script, words in map(script_of, COMMANDS):
        of_size["full" if "--full" in words else "small"].add(script)
    assert of_size["small"] == SCRIPTS
    assert of_size["full"] == SCRIPTS - {"linear_regression_keras"}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_understood(monkeypatch, command):
    name, words = script_of(command)
    script = importlib.import_module(name)
    parse = script.parse

    def check(parser, **full):
        monkeypatch.setattr("sys.argv", [f"{name}.py", *words])
        # argparse takes defaults for arguments that it does not have.
        assert full.keys() <= {action.dest for action in parser._actions}
        parse(parser, **full)
        raise ParsedError

    monkeypatch.setattr(script, "parse", check)
    with pytest.raises(ParsedError):
        script.main()
