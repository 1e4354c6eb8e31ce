"""Hosts emulated by network namespaces, and a network between them whose links can be cut.

Every host has a namespace with one card, `eth0`; a bridge in a namespace of its own joins them. Over Gloo the
rendezvous server that Horovod's launcher would run listens there, and ranks are started as `horovodrun` starts them on
hosts it reaches by ssh: with their place in the job in the environment. Over MPI `mpirun` itself runs there, with a
program in the place of ssh.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from harness import processes
from harness.launchers import LAUNCHERS, environment, program
from harness.pool import START, Job

from benchmarks.hosts import make_agent

HUB = "10.77.0.254"
NAMES = Path("/etc/netns")  # where `ip netns exec` looks for files that replace those in /etc

SERVER = """
import sys, time
from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
from horovod.runner.http.http_server import RendezvousServer

server = RendezvousServer()
port = server.start()
server.init(get_host_assignments(parse_hosts(sys.argv[1]), 1))
print(port, flush=True)
time.sleep(600)
"""


def unavailable() -> str | None:
    """Why there can be no such network here, if so."""
    if shutil.which("ip") is None:
        return "there is no `ip` command"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = f"probe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"no network namespace can be made here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return None


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Network:
    """`hosts` hosts with one rank each. To be used in a `with` statement."""

    def __init__(self, hosts: int, folder: Path) -> None:
        self.folder = folder
        self.hub = f"hub{os.getpid()}"
        self.hosts = [f"host{os.getpid()}-{number}" for number in range(hosts)]
        self.addresses = [f"10.77.0.{number + 1}" for number in range(hosts)]
        self.marker = f"HARNESS_NETWORK={self.hub}"
        self.jobs: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Network:
        try:
            ip("netns", "add", self.hub)
            ip("-n", self.hub, "link", "set", "lo", "up")
            ip("-n", self.hub, "link", "add", "bridge", "type", "bridge")
            ip("-n", self.hub, "addr", "add", f"{HUB}/24", "dev", "bridge")
            ip("-n", self.hub, "link", "set", "bridge", "up")
            for number, (host, address) in enumerate(zip(self.hosts, self.addresses, strict=True)):
                ip("netns", "add", host)
                # Horovod also finds a host's address by its name, and all namespaces share one name. Each sees a
                # file of its own in the place of /etc/hosts, if there is one here.
                names = NAMES / host / "hosts"
                names.parent.mkdir(parents=True)
                names.write_text(f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n")
                ip("link", "add", "eth0", "netns", host, "type", "veth", "peer", f"port{number}", "netns", self.hub)
                ip("-n", self.hub, "link", "set", f"port{number}", "master", "bridge")
                ip("-n", host, "addr", "add", f"{address}/24", "dev", "eth0")
                for place, card in ((host, "lo"), (host, "eth0"), (self.hub, f"port{number}")):
                    ip("-n", place, "link", "set", card, "up")
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def _start(
        self, launcher: str, host: str, command: Sequence[str], env: Mapping[str, str], stdout: int | None = None
    ) -> subprocess.Popen[bytes]:
        marks = dict(mark.split("=") for mark in (Job.SESSION, self.marker))
        return subprocess.Popen(
            ["ip", "netns", "exec", host, *command],
            env=environment(LAUNCHERS[launcher], self.folder, {**env, **marks}),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
        )

    def start(self, launcher: str, script: Path, args: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        """Start the script on every host, over "gloo" or "mpi"."""
        variable = LAUNCHERS[launcher].rank_variable
        keep = [sys.executable, str(START), "rank", variable, str(self.folder)]
        command = [*keep, sys.executable, str(script), *args]
        start = self._start_over_gloo if launcher == "gloo" else self._start_over_mpi
        start(command, dict(env or {}))

    def _start_over_gloo(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        allocation = ",".join(f"{address}:1" for address in self.addresses)
        server = [sys.executable, "-c", SERVER, allocation]
        self.server = self._start("gloo", self.hub, server, {}, subprocess.PIPE)
        assert self.server.stdout is not None
        port = int(self.server.stdout.readline())
        size = str(len(self.hosts))
        for rank, (host, address) in enumerate(zip(self.hosts, self.addresses, strict=True)):
            place = {
                "HOROVOD_HOSTNAME": address,
                "HOROVOD_RANK": str(rank),
                "HOROVOD_SIZE": size,
                "HOROVOD_LOCAL_RANK": "0",
                "HOROVOD_LOCAL_SIZE": "1",
                "HOROVOD_CROSS_RANK": str(rank),
                "HOROVOD_CROSS_SIZE": size,
                "HOROVOD_GLOO_RENDEZVOUS_ADDR": HUB,
                "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
                "HOROVOD_GLOO_IFACE": "eth0",
                "HOROVOD_CONTROLLER": "gloo",
                "HOROVOD_CPU_OPERATIONS": "gloo",
            }
            self.jobs.append(self._start("gloo", host, command, {**place, **env}))

    def _start_over_mpi(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        agent = make_agent(self.folder, dict(zip(self.addresses, self.hosts, strict=True)))
        options = {
            "pml": "ob1",
            "btl": "self,tcp",
            "btl_tcp_if_include": "10.77.0.0/24",
            "oob_tcp_if_include": "10.77.0.0/24",
            "plm_rsh_agent": str(agent),
            "plm_rsh_no_tree_spawn": "1",
        }
        words = [word for name, value in options.items() for word in ("--mca", name, value)]
        where = ",".join(f"{address}:1" for address in self.addresses)
        mpirun = [program("mpirun"), "-np", str(len(self.hosts)), "-H", where, "--bind-to", "none", *words]
        self.jobs.append(self._start("mpi", self.hub, [*mpirun, *command], env))

    def link(self, host: int, state: str) -> None:
        """Set a host's link "down" or "up"."""
        ip("-n", self.hub, "link", "set", f"port{host}", state)

    def printed(self, rank: int, kind: str = "out") -> str:
        """Return the output of a rank so far; `kind` is "out" or "err"."""
        file = self.folder / f"rank{rank}.{kind}"
        return file.read_text(errors="replace") if file.exists() else ""

    def wait_for(self, rank: int, text: str, seconds: float) -> None:
        """Wait until a rank has printed that."""
        limit = time.monotonic() + seconds
        while text not in self.printed(rank):
            if time.monotonic() > limit or any(job.poll() is not None for job in self.jobs):
                raise AssertionError(
                    f"rank {rank} did not print {text!r}:\n{self.printed(rank)}{self.printed(rank, 'err')}"
                )
            time.sleep(0.02)

    def wait(self, seconds: float) -> list[int]:
        """The exit codes of the ranks, over Gloo, or of `mpirun`."""
        limit = time.monotonic() + seconds
        return [job.wait(max(limit - time.monotonic(), 0.1)) for job in self.jobs]

    def end(self) -> None:
        """End every process and remove every namespace."""
        for process in [*self.jobs, *filter(None, [getattr(self, "server", None)])]:
            processes.end(process, self.marker)
            if process.stdout is not None:
                process.stdout.close()
        for name in [*self.hosts, self.hub]:
            shutil.rmtree(NAMES / name, ignore_errors=True)
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)
