"""A rank of a script's job that is forked from a process which has imported what the script does.

    python -m harness.forked RANK_VARIABLE FOLDER TEMPLATE TEMPLATE SCRIPT ARGUMENT ...

The launched process watches it, and ends when and as it does.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path

from harness import template
from harness.start import die_with_parent, keep_output


def main() -> None:
    variable, folder, *rest = sys.argv[1:]
    templates, script = rest[:2], rest[2:]
    rank = int(os.environ[variable])
    die_with_parent(signal.SIGKILL)
    keep_output(Path(folder), rank)
    template.end_like_it(template.ask(templates, rank, "harness.forked", *script)())


def work(script: str, *arguments: str) -> None:
    """Run the script as Python does."""
    sys.argv[:] = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
