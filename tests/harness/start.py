"""Become another program, after arranging that it dies with its parent and, on a rank, that its output is kept.

    python start.py launcher PARENT command...
    python start.py rank RANK_VARIABLE FOLDER command...

A program of its own instead of a `preexec_fn`: that one runs Python between fork and exec, in a process that may
hold a framework's threads. Run by path and free of imports from the harness, so it starts fast.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1


def die_with_parent(number: signal.Signals) -> None:
    """Have the kernel send this process a signal when its parent ends, however it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))


def keep_output(folder: Path, rank: int) -> None:
    """Send this process's output, and its children's, to files named after its rank."""
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(folder / f"rank{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, descriptor)
        os.close(file)


def main() -> None:
    kind, *rest = sys.argv[1:]
    if kind == "launcher":
        parent, *command = rest
        # SIGTERM: launchers then end their ranks and tidy up.
        die_with_parent(signal.SIGTERM)
        if os.getppid() != int(parent):
            sys.exit("the test process ended before its job began")
    else:
        variable, folder, *command = rest
        die_with_parent(signal.SIGKILL)
        keep_output(Path(folder), int(os.environ[variable]))
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
