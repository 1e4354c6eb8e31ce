"""The ``adacons`` command: look before and while you train.

- ``adacons doctor``: what is installed here and works, and which schedule would be chosen.
- ``adacons probe module:function``: would AdaCons differ from averaging on your model and data?
- ``adacons watch run.jsonl``: a logged run (see :mod:`adacons_hvd.logging`) in the terminal, while it goes on.
- ``adacons plot run.jsonl``: the same as pictures.

Each has ``--help``, and ``--json`` for programs. Neither this module nor ``--help`` imports a
framework.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .. import __version__
from . import doctor, plot, probe, watch
from .errors import CommandError

__all__ = ["main", "make_parser"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 if something does not work, 2 if misused."""
    options = make_parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except CommandError as error:
        if options.traceback:
            raise
        print(f"adacons: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return code


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command's arguments."""
    parser = argparse.ArgumentParser(prog="adacons", description="Look before and while you train with AdaCons.")
    parser.add_argument("--version", action="version", version=f"adacons_hvd {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (doctor, probe, watch, plot):
        name, summary = module.__name__.rpartition(".")[2], (module.__doc__ or "").partition("\n")[0]
        command = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
        command.add_argument("--json", action="store_true", help="print the result as JSON")
        command.add_argument("--traceback", action="store_true", help="show where an error came from")
        command.set_defaults(run=module.run)
    return parser
