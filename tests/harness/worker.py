"""A rank of a pool: runs the functions the test process sends, one after the other.

    python -m harness.worker ADDRESS RANK_VARIABLE SIZE LAUNCHER FOLDER [TEMPLATE ...]

The launched process has another one made, which runs the functions: by a fork of its own, or of a template (see
:mod:`harness.template`). It only watches itself: it tells the test process how the other ended (a killed process
cannot), ends the way that one did so that the launcher sees it too, and kills it when the test process goes away, even
while it hangs in a collective.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any, NoReturn

import cloudpickle

from harness import inside, template
from harness.start import die_with_parent, keep_output


def main() -> None:
    address, variable, size, launcher, folder, *templates = sys.argv[1:]
    rank = int(os.environ[variable])
    die_with_parent(signal.SIGKILL)
    keep_output(Path(folder), rank)
    arguments = [address, str(rank), size, launcher, folder]
    if templates:
        how_it_ends = template.ask(templates, rank, "harness.worker", *arguments)
    else:
        child = os.fork()
        if not child:
            die_with_parent(signal.SIGKILL)
            work(*arguments)
            return

        def how_it_ends() -> int:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    watch(how_it_ends, rank, address)


def work(address: str, rank: str, size: str, launcher: str, folder: str) -> None:
    """Run the functions that the test process sends, until it sends no more."""
    # On this signal the stack of every thread goes to a file: where a rank hangs.
    stacks = (Path(folder) / f"rank{rank}.stack").open("w")
    faulthandler.register(signal.SIGUSR1, stacks)
    if launcher == "mpi":
        # Before Horovod, so that MPI is always initialised the same way: by mpi4py, with THREAD_MULTIPLE.
        import mpi4py.MPI  # noqa: F401

        # While one rank waits for another it keeps its processor busy, which another stream of tests has a use for.
        os.nice(10)
    connection = Client(address, "AF_UNIX")
    connection.send(("worker", int(rank), os.getpid()))
    exchange = over_mpi if launcher == "mpi" else OverConnection(connection)
    inside.enter(inside.Place(int(rank), int(size), launcher, exchange))
    serve(connection)


def watch(how_it_ends: Callable[[], int], rank: int, address: str) -> NoReturn:
    """Tell the test process how the worker ends, and end in the same way."""
    connection = Client(address, "AF_UNIX")
    connection.send(("watcher", rank, os.getpid()))

    def end_when_test_process_ends() -> None:
        try:
            connection.recv()
        except (EOFError, OSError):
            # The worker is killed with its watcher.
            os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=end_when_test_process_ends, daemon=True).start()
    code = how_it_ends()
    with contextlib.suppress(OSError):  # The test process ended first, then.
        connection.send(code)
    template.end_like_it(code)


def serve(connection: Connection) -> None:
    while True:
        try:
            message = connection.recv()
        except (EOFError, OSError):
            os._exit(1)  # The test process is gone; no orderly shutdown, the other ranks may be gone too.
        if message is None:
            return
        folders, call = message
        sys.path.extend(folder for folder in folders if folder not in sys.path)
        connection.send(perform(call))


def perform(call: bytes) -> tuple[Any, ...]:
    """("returned", pickled value) or ("raised", summary, traceback)."""
    try:
        function, args, kwargs = pickle.loads(call)
        value = function(*args, **kwargs)
    # Whatever ends the function is the test's to see, sys.exit() included.
    except BaseException as error:
        name = f"{type(error).__name__}: {error}".rstrip(": ")
        summary = f"called sys.exit({error.code!r})" if isinstance(error, SystemExit) else f"raised {name}"
        # From the function on; this file's own frame explains nothing.
        below = error.__traceback__ and error.__traceback__.tb_next
        return ("raised", summary, "".join(traceback.format_exception(type(error), error, below)))
    try:
        return ("returned", cloudpickle.dumps(value))
    except Exception as error:
        return ("raised", f"returned a {type(value).__name__} that cannot be sent: {error}", traceback.format_exc())


def over_mpi(value: Any) -> list[Any]:
    from mpi4py import MPI

    return MPI.COMM_WORLD.allgather(value)


class OverConnection:
    """Exchange values through the test process, which passes on every rank's to every rank."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def __call__(self, value: Any) -> list[Any]:
        self.connection.send(("gather", cloudpickle.dumps(value)))
        return [pickle.loads(part) for part in self.connection.recv()]


if __name__ == "__main__":
    main()
