"""Hosts emulated by network namespaces, and a network between them whose links can be cut.

Every host has a namespace with one card, `eth0`; a bridge in a namespace of its own joins them, and the rendezvous
server that Horovod's launcher would run listens there. Ranks are started as `horovodrun` starts them on hosts it
reaches by ssh: with their place in the job in the environment.
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

from harness.launchers import LAUNCHERS, environment
from harness.pool import START, Job

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
        self.ranks: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Network:
        try:
            ip("netns", "add", self.hub)
            ip("-n", self.hub, "link", "set", "lo", "up")
            ip("-n", self.hub, "link", "add", "bridge", "type", "bridge")
            ip("-n", self.hub, "addr", "add", "10.77.0.254/24", "dev", "bridge")
            ip("-n", self.hub, "link", "set", "bridge", "up")
            for number, host in enumerate(self.hosts):
                ip("netns", "add", host)
                # Horovod also finds a host's address by its name, and all namespaces share one name. Each sees a
                # file of its own in the place of /etc/hosts, if there is one here.
                names = NAMES / host / "hosts"
                names.parent.mkdir(parents=True)
                names.write_text(f"127.0.0.1 localhost\n10.77.0.{number + 1} {socket.gethostname()}\n")
                ip("link", "add", "eth0", "netns", host, "type", "veth", "peer", f"port{number}", "netns", self.hub)
                ip("-n", self.hub, "link", "set", f"port{number}", "master", "bridge")
                ip("-n", host, "addr", "add", f"10.77.0.{number + 1}/24", "dev", "eth0")
                for place, card in ((host, "lo"), (host, "eth0"), (self.hub, f"port{number}")):
                    ip("-n", place, "link", "set", card, "up")
            allocation = ",".join(f"10.77.0.{number + 1}:1" for number in range(len(self.hosts)))
            self.server = self._start(self.hub, [sys.executable, "-c", SERVER, allocation], {}, subprocess.PIPE)
            assert self.server.stdout is not None
            self.port = int(self.server.stdout.readline())
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def _start(
        self, host: str, command: Sequence[str], env: Mapping[str, str], stdout: int | None = None
    ) -> subprocess.Popen[bytes]:
        name, value = Job.SESSION.split("=")
        return subprocess.Popen(
            ["ip", "netns", "exec", host, *command],
            env=environment(LAUNCHERS["gloo"], self.folder, {**env, name: value}),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
        )

    def start(self, program: Path, args: Sequence[str], env: Mapping[str, str]) -> None:
        """Start the program on every host."""
        size = str(len(self.hosts))
        for rank, host in enumerate(self.hosts):
            place = {
                "HOROVOD_HOSTNAME": f"10.77.0.{rank + 1}",
                "HOROVOD_RANK": str(rank),
                "HOROVOD_SIZE": size,
                "HOROVOD_LOCAL_RANK": "0",
                "HOROVOD_LOCAL_SIZE": "1",
                "HOROVOD_CROSS_RANK": str(rank),
                "HOROVOD_CROSS_SIZE": size,
                "HOROVOD_GLOO_RENDEZVOUS_ADDR": "10.77.0.254",
                "HOROVOD_GLOO_RENDEZVOUS_PORT": str(self.port),
                "HOROVOD_GLOO_IFACE": "eth0",
                "HOROVOD_CONTROLLER": "gloo",
                "HOROVOD_CPU_OPERATIONS": "gloo",
            }
            keep = [sys.executable, str(START), "rank", "HOROVOD_RANK", str(self.folder)]
            self.ranks.append(self._start(host, [*keep, sys.executable, str(program), *args], {**place, **env}))

    def link(self, host: int, state: str) -> None:
        """Set a host's link "down" or "up"."""
        ip("-n", self.hub, "link", "set", f"port{host}", state)

    def printed(self, rank: int, kind: str = "out") -> str:
        """What a rank has printed so far; `kind` is "out" or "err"."""
        file = self.folder / f"rank{rank}.{kind}"
        return file.read_text(errors="replace") if file.exists() else ""

    def wait_for(self, rank: int, text: str, seconds: float) -> None:
        """Wait until a rank has printed that."""
        limit = time.monotonic() + seconds
        while text not in self.printed(rank):
            if time.monotonic() > limit or self.ranks[rank].poll() is not None:
                raise AssertionError(
                    f"rank {rank} did not print {text!r}:\n{self.printed(rank)}{self.printed(rank, 'err')}"
                )
            time.sleep(0.02)

    def wait(self, seconds: float) -> list[int]:
        """The ranks' exit codes."""
        limit = time.monotonic() + seconds
        return [rank.wait(max(limit - time.monotonic(), 0.1)) for rank in self.ranks]

    def end(self) -> None:
        """End every process and remove every namespace."""
        for process in [*self.ranks, *filter(None, [getattr(self, "server", None)])]:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        for name in [*self.hosts, self.hub]:
            shutil.rmtree(NAMES / name, ignore_errors=True)
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)
