"""A process that has imported what ranks need. A rank is forked from it, and so has nothing to import.

    python -m harness.template MODULE ...        a listening socket is its standard input

The process that a launcher starts as a rank asks here for the one that runs functions (:mod:`harness.worker`) or a
script (:mod:`harness.forked`), as may the one that is started as a launcher (:mod:`harness.launch`), and becomes its
watcher. It sends its environment and arguments, and its output; it is
told how the other one ended, and that one is killed when the watcher is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NoReturn

from harness.start import die_with_parent

#: The names by which a job's processes are found, see :mod:`harness.processes`, and the length of their values.
MARKS = {"HARNESS_SESSION": 16, "HARNESS_JOB": 16}


class Template:
    """The test process's end of a template."""

    def __init__(self, modules: tuple[str, ...], folder: Path, env: Mapping[str, str]) -> None:
        # A short-lived folder of its own: a socket's path must be short, and only this user may connect.
        self._private = tempfile.TemporaryDirectory(prefix="harness-")
        self.address = str(Path(self._private.name) / "template")
        with socket.socket(socket.AF_UNIX) as listener, (folder / "template.log").open("wb") as log:
            listener.bind(self.address)
            # Whoever comes while modules are still being imported, waits.
            listener.listen(64)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "harness.template", *modules],
                env={**env, **{name: length * "-" for name, length in MARKS.items()}},
                cwd=folder,
                stdin=listener.fileno(),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def close(self) -> None:
        """End it, and with it whoever was forked from it and is still there."""
        self._process.kill()
        self._process.wait()
        self._private.cleanup()


def ask(templates: Sequence[str], rank: int, module: str, *arguments: str) -> Callable[[], int]:
    """Have a process forked that calls a module's ``work(*arguments)``; returns how to wait for its exit code.

    Not all are forked from the same one, so that ranks differ in what Python draws when it starts: addresses, hashes of
    texts.
    """
    client = socket.socket(socket.AF_UNIX)
    client.connect(templates[rank % len(templates)])
    socket.send_fds(client, [b"."], [1, 2])
    connection = Connection(client.detach())
    connection.send(([module, *arguments], dict(os.environ), str(Path.cwd())))

    def code() -> int:
        try:
            return int(connection.recv())
        except EOFError:  # the template is gone, and so is who was forked from it
            return -signal.SIGKILL

    return code


def end_like_it(code: int) -> NoReturn:
    """End this process in the way that one with this exit code did, for the launcher to see."""
    if code < 0:
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def main() -> None:
    die_with_parent(signal.SIGKILL)
    listener = socket.socket(fileno=os.dup(0))
    for name in sys.argv[1:]:
        importlib.import_module(name)
    # What was imported is there to stay, so collections need not touch it, which would copy it in every rank.
    gc.collect()
    gc.freeze()
    module, *arguments = serve(listener)
    importlib.import_module(module).work(*arguments)


def serve(listener: socket.socket) -> list[str]:
    """Fork whenever somebody asks. Returns, with what was asked for, in the new processes alone."""
    # By what becomes readable when it ends: its process number, and who wants to know.
    children: dict[int, tuple[int, Connection]] = {}
    while True:
        ready = wait([listener, *children, *(connection for _, connection in children.values())])
        for ended, (pid, connection) in list(children.items()):
            if ended in ready:
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with contextlib.suppress(OSError):  # its watcher is gone
                    connection.send(code)
                connection.close()
                os.close(ended)
                del children[ended]
            elif connection in ready:  # its watcher is gone
                os.kill(pid, signal.SIGKILL)
        if listener not in ready:
            continue
        client, _ = listener.accept()
        _, outputs, _, _ = socket.recv_fds(client, 1, 2)
        connection = Connection(client.detach())
        try:
            arguments, env, folder = connection.recv()
        except (EOFError, OSError):
            connection.close()
            arguments = None
        if arguments is not None:
            pid = os.fork()
            if not pid:
                for ended, (_, other) in children.items():
                    os.close(ended)
                    other.close()
                connection.close()
                listener.close()
                become(env, folder, outputs)
                return list(arguments)
            children[os.pidfd_open(pid)] = pid, connection
        for output in outputs:
            os.close(output)


def become(env: Mapping[str, str], folder: str, outputs: list[int]) -> None:
    """Take over what a process gets from the one that starts it."""
    die_with_parent(signal.SIGKILL)
    mark(env)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    for descriptor, output in enumerate(outputs, 1):
        os.dup2(output, descriptor)
        os.close(output)
    # What is else drawn or looked up once, at the start. Python's own random numbers are drawn anew after a fork.
    tempfile.tempdir = None
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()


def mark(env: Mapping[str, str]) -> None:
    """Have the kernel show the marks of this process's job, and not the template's.

    What it shows as a process's environment is the process's own memory, where it was when the program began.
    """
    start, stop = map(int, Path("/proc/self/stat").read_text().rpartition(")")[2].split()[47:49])
    shown = ctypes.string_at(start, stop - start)
    for name, length in MARKS.items():
        value = env[name].encode()
        assert len(value) == length
        ctypes.memmove(start + shown.index(f"{name}=".encode()) + len(name) + 1, value, length)


if __name__ == "__main__":
    main()
