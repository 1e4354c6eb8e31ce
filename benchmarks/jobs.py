"""Start a program of this folder on several ranks, on this machine or on emulated hosts."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .hosts import Hosts, emulated

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Cluster:
    """A cluster is what a benchmark runs on. No ``megabits`` means one host and its shared memory."""

    hosts: int
    per_host: int
    megabits: float = 0
    milliseconds: float = 0
    launcher: str = "mpi"

    @property
    def ranks(self) -> int:
        return self.hosts * self.per_host

    def __str__(self) -> str:
        if not self.megabits:
            return f"1 host x {self.ranks}, {self.launcher}"
        speed = f"{self.megabits / 1000:g} Gbit/s" if self.megabits >= 1000 else f"{self.megabits:g} Mbit/s"
        delay = f" + {self.milliseconds:g} ms" if self.milliseconds else ""
        return f"{self.hosts} host{'s' if self.hosts > 1 else ''} x {self.per_host}, {speed}{delay}, {self.launcher}"


class JobError(RuntimeError):
    """A job that ended badly, with what it printed."""


def run(program: str, cluster: Cluster, case: dict[str, Any], timeout: float) -> Any:
    """The results of ``python -m benchmarks.PROGRAM`` on every rank of the cluster."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="adacons-bench-")))
        hosts = None
        if cluster.megabits:
            hosts = stack.enter_context(emulated(cluster.hosts, cluster.megabits, cluster.milliseconds, folder))
        results = folder / "results.json"
        rank = [sys.executable, "-m", f"benchmarks.{program}", json.dumps(case), str(results)]
        if hosts:
            rank = [*_IN_TURN, *rank]
        command = [*_launch(cluster, hosts), *rank]
        if hosts:
            command = [str(hosts.agent), hosts.addresses[0], shlex.join(command)]
        output = folder / "output.txt"
        with output.open("wb") as log:
            # A group of its own, so that everything a launcher started can be ended with it.
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=_environment(folder, hosts),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if code or not results.exists():
            end = "took too long" if code is None else f"ended with {code}"
            text = output.read_text(encoding="utf-8", errors="replace")[-3000:]
            raise JobError(f"{program} on {cluster} {end}:\n{asdict(cluster)} {case}\n{text}")
        return json.loads(results.read_text(encoding="utf-8"))


def _launch(cluster: Cluster, hosts: Hosts | None) -> list[str]:
    where = [f"{address}:{cluster.per_host}" for address in hosts.addresses] if hosts else []
    card = hosts.card if hosts else "lo"
    if cluster.launcher == "gloo":
        places = ["-H", ",".join(where), "--network-interface", card] if hosts else []
        return ["horovodrun", "--gloo", "-np", str(cluster.ranks), *places]
    options = ["--oversubscribe", "--bind-to", "none"]
    settings = {"pml": "ob1", "btl_tcp_if_include": card, "oob_tcp_if_include": card}
    if hosts:
        options += ["-H", ",".join(where)]
        settings |= {"btl": "self,tcp", "plm_rsh_agent": str(hosts.agent), "plm_rsh_no_tree_spawn": "1"}
        settings["mpi_yield_when_idle"] = "1"  # see _IN_TURN
    else:
        settings |= {"btl": "self,vader,tcp", "btl_vader_single_copy_mechanism": "none"}
    for name, value in settings.items():
        options += ["--mca", name, value]
    for variable in ("PATH", "PYTHONPATH", *_ENVIRONMENT):
        options += ["-x", variable]
    return ["mpirun", "-np", str(cluster.ranks), *options]


# Emulated hosts share the processors, which Open MPI cannot know. Where ranks spin while they wait, even an average of
# a few numbers takes 150 ms. Where they offer to let others run, Linux' usual scheduler now and then keeps a rank that
# has all it needs from running for seconds; in real-time turns, an offer is taken up at once by the next in line.
_IN_TURN = ["chrt", "--rr", "1"]

_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "HOROVOD_GLOO_TIMEOUT_SECONDS": "120",
}


def _environment(folder: Path, hosts: Hosts | None) -> dict[str, str]:
    path = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]
    return {
        **os.environ,
        **_ENVIRONMENT,
        "PATH": os.pathsep.join([str(folder), *path] if hosts else path),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "TMPDIR": str(folder),
        "OMPI_MCA_btl_vader_backing_directory": str(folder),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
