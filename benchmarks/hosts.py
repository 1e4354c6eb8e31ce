"""Several hosts on one machine: network namespaces behind one switch, each link as fast as asked for.

Needs root, and Debian's iproute2. Every host is a namespace with one card, whose traffic a token
bucket limits in both directions; the switch is a bridge in a namespace of its own, so the machine's
own network is never touched. Hosts that are some milliseconds apart are joined to the switch by
:mod:`benchmarks.cable`, a process each, because few kernels have netem.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Hosts:
    """Emulated hosts, and how to reach them."""

    addresses: list[str]
    #: What launchers use in place of ssh: ``agent ADDRESS COMMAND...``.
    agent: Path
    #: The network card's name on every host.
    card: str = "card"


def why_not() -> str:
    """Why no hosts can be emulated here; empty if they can."""
    if os.geteuid() != 0:
        return "making network namespaces takes root"
    if not shutil.which("ip", path=_PATH) or not shutil.which("tc", path=_PATH):
        return "ip and tc are missing (Debian's package iproute2)"
    return ""


def has_latency() -> bool:
    """Whether hosts can be some milliseconds apart: whether there are network cards for programs."""
    return os.access("/dev/net/tun", os.R_OK | os.W_OK)


@contextlib.contextmanager
def emulated(count: int, megabits: float, milliseconds: float, folder: Path) -> Iterator[Hosts]:
    """``count`` hosts for as long as the context lasts, ``milliseconds`` apart from each other."""
    prefix = f"adacons-{os.getpid()}"
    switch = f"{prefix}-switch"
    names = [f"{prefix}-{number}" for number in range(count)]
    addresses = [f"10.77.0.{number + 1}" for number in range(count)]
    with contextlib.ExitStack() as stack:
        for name in (switch, *names):
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "del", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for number, (name, address) in enumerate(zip(names, addresses, strict=True)):
            port = f"port{number}"
            if milliseconds:
                cable = stack.enter_context(_cable(switch, f"card{number}", port, milliseconds / 1000))
                _ip("-n", switch, "link", "set", cable, "netns", name, "name", "card")
            else:
                _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", "card", "netns", name)
            _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "card")
            _ip("-n", name, "link", "set", "card", "up")
            # Both directions are limited where packets enter the cable.
            for place, device in ((name, "card"), (switch, port)):
                _limit(place, device, megabits)
        yield Hosts(addresses, make_agent(folder, dict(zip(addresses, names, strict=True))))


@contextlib.contextmanager
def _cable(switch: str, card: str, port: str, seconds: float) -> Iterator[str]:
    """Two cards in the switch's namespace, joined by a cable that long; the first one's name."""
    # Before ranks, which take real-time turns, when there is something to carry.
    command = ["chrt", "--rr", "2", sys.executable, "-m", "benchmarks.cable", card, port, str(seconds)]
    process = subprocess.Popen(
        ["ip", "netns", "exec", switch, *command],
        cwd=Path(__file__).resolve().parents[1],
        env=_ENV,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    # Leaving closes its standard input, which ends it.
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        yield card


def _limit(place: str, device: str, megabits: float) -> None:
    # A bucket of two milliseconds' worth: smaller ones cost throughput, larger ones hide the limit.
    burst = max(32_000, int(megabits * 1e6 / 8 * 0.002))
    limit = ["tbf", "rate", f"{megabits}mbit", "burst", str(burst), "latency", "50ms"]
    command = ["ip", "netns", "exec", place, "tc", "qdisc", "add", "dev", device, "root", *limit]
    subprocess.run(command, env=_ENV, check=True)


def make_agent(folder: Path, names: Mapping[str, str]) -> Path:
    """A program called as ssh is, that runs the command in the address's namespace; ``names`` has them by address."""
    cases = "\n".join(
        f"        {address}) host={name} address={address}; shift; break ;;" for address, name in names.items()
    )
    # Launchers put options of ssh's before the address and after it; they are skipped.
    text = f"""#!/bin/sh
while [ $# -gt 0 ]; do
    case "$1" in
{cases}
        *) shift ;;
    esac
done
while [ "$1" = -o ] || [ "$1" = -p ] || [ "$1" = -i ]; do shift 2; done
# Hosts have names of their own, or MPI takes them for one, whose ranks share memory; and Gloo looks
# the name up, so it is the address.
exec ip netns exec "$host" unshare --uts /bin/sh -c 'hostname "$1" && exec /bin/sh -c "$2"' sh "$address" "$*"
"""
    # The name is what horovodrun looks for on PATH.
    path = folder / "ssh"
    path.write_text(text, encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
_ENV = {**os.environ, "PATH": _PATH}


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], env=_ENV, check=True)
