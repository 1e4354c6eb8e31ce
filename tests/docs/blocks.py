"""The code blocks of the documentation, and how each of them is to be run.

A comment in the line above a block says so, where it is not simply run in this process:

    <!-- ranks=2 launcher=gloo pool=tensorflow -->    on real processes
    <!-- continue -->                                 after the block before it, in the same process
    <!-- probe -->                                    as a module for `adacons probe`
    <!-- trainers -->                                 on two processes, by tests/trainers: it needs what .venv has not
    <!-- fragment -->                                 only compiled: it needs what is not there
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_BLOCK = re.compile(
    r"^(?:<!-- (?P<how>[^\n]*?) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    how: str
    code: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def option(self, name: str, default: str = "") -> str:
        found = re.search(rf"{name}=(\w+)", self.how)
        return found[1] if found else default


def blocks_of(page: Path) -> list[Block]:
    """Every block of a page; one that continues another has that one's code before its own."""
    text = page.read_text(encoding="utf-8")
    found: list[Block] = []
    for match in _BLOCK.finditer(text):
        code, how = match["code"], match["how"] or ""
        if how == "continue":
            code = found[-1].code + code
        line = text.count("\n", 0, match.start("code"))
        found.append(Block(page.name, line, match["language"], how, code))
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def python_blocks(how: str = "", **options: str) -> list[Block]:
    """Those of this kind: marked ``how``, or to be run on ranks with these options."""
    found = [block for block in BLOCKS if block.language == "python"]
    if options:
        return [
            b for b in found if "ranks=" in b.how and all(b.option(k, _DEFAULTS[k]) == v for k, v in options.items())
        ]
    return [block for block in found if block.how == how]


_DEFAULTS = {"launcher": "gloo", "pool": ""}
