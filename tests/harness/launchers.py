"""The ways to start N processes, and the environment they get. A new launcher is one more entry in LAUNCHERS."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
HOROVODRUN = Path(__file__).with_name("horovodrun.py")
HERE = Path(__file__).with_name("here.sh")


@dataclass(frozen=True)
class Launcher:
    """`command(n)` is what stands before the program; `rank_variable` tells each process its rank."""

    command: Callable[[int], list[str]]
    rank_variable: str
    env: Mapping[str, str] = field(default_factory=dict)
    #: What ranks find imported in a pool without a word.
    imported: tuple[str, ...] = ("torch._dynamo", "adacons_hvd.torch")
    #: Whether it is a Python script, and is forked as these are.
    forked: bool = False


def program(name: str) -> str:
    """The program of that name, preferably the one installed beside this Python."""
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    found = shutil.which(name, path=search)
    if found is None:
        raise FileNotFoundError(f"{name} is neither beside {sys.executable} nor on PATH; is it installed?")
    return found


def _mpirun(ranks: int) -> list[str]:
    options = {
        # More ranks than cores is normal here, and pinning them would put them all on the first core.
        "--bind-to": "none",
        # Plain sockets and shared memory, on the loopback only: no probing for networks, the same on every machine.
        "--mca pml": "ob1",
        "--mca btl": "self,vader,tcp",
        "--mca btl_tcp_if_include": "lo",
        "--mca oob_tcp_if_include": "lo",
        # Containers forbid reading another process's memory; without this every large message would first fail.
        "--mca btl_vader_single_copy_mechanism": "none",
    }
    words = [word for option, value in options.items() for word in (*option.split(), value)]
    return [program("mpirun"), "-np", str(ranks), "--oversubscribe", *words]


def _mpirun_on_hosts(ranks: int) -> list[str]:
    """Hosts of two ranks; of an odd number the last one is alone.

    All are this machine, with a daemon of Open MPI's for each, so that Horovod takes them for hosts. Their ranks share
    no memory, because the daemons would mistake each other's for their own.
    """
    hosts = ",".join(f"host{first}:{min(2, ranks - first)}" for first in range(0, ranks, 2))
    options = [*_mpirun(ranks), "-H", hosts, "--mca", "plm_rsh_agent", f"/bin/sh {HERE}"]
    return ["self,tcp" if option == "self,vader,tcp" else option for option in options]


def _horovodrun(ranks: int) -> list[str]:
    return [sys.executable, str(HOROVODRUN), "--gloo", "-np", str(ranks)]


def _horovodrun_on_hosts(ranks: int) -> list[str]:
    """Two hosts, with half of the ranks each: two names of this machine."""
    return [*_horovodrun(ranks), "-H", f"localhost:{ranks - ranks // 2},127.0.0.1:{ranks // 2}"]


def _torchrun(ranks: int) -> list[str]:
    options = ["--standalone", "--local-addr", "localhost", "--nproc-per-node", str(ranks), "--no-python"]
    return [program("torchrun"), *options]


_MPI = {
    "HOROVOD_CONTROLLER": "mpi",
    "HOROVOD_CPU_OPERATIONS": "mpi",
    # Where ranks are no more than cores, Open MPI waits without letting go of them, though Horovod waits in a
    # thread of its own: with two ranks on two cores a third of the time.
    "OMPI_MCA_mpi_yield_when_idle": "1",
    # Read only when root; containers often are.
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}
# Eight processes importing a framework on two cores reach hvd.init() far apart; 30 s is the default.
_GLOO = {"HOROVOD_GLOO_TIMEOUT_SECONDS": "120"}

LAUNCHERS: dict[str, Launcher] = {
    "mpi": Launcher(_mpirun, "OMPI_COMM_WORLD_RANK", _MPI),
    "gloo": Launcher(_horovodrun, "HOROVOD_RANK", _GLOO),
    "mpi-hosts": Launcher(_mpirun_on_hosts, "OMPI_COMM_WORLD_RANK", _MPI),
    "gloo-hosts": Launcher(_horovodrun_on_hosts, "HOROVOD_RANK", _GLOO),
    "torchrun": Launcher(
        _torchrun,
        "RANK",
        imported=("torch._dynamo", "torch.distributed.run", "adacons_hvd.ddp", "adacons_hvd.fsdp"),
        forked=True,
    ),
}

#: What ranks find imported in a pool with a word; nothing where it is another word.
IMPORTED = {
    "tensorflow": ("keras", "adacons_hvd.tensorflow.keras"),
    "tf_keras": ("tf_keras", "adacons_hvd.tensorflow.keras"),
    "keras-torch": ("torch._dynamo", "keras", "adacons_hvd.keras"),
}

#: How many milliseconds Horovod's thread waits before it asks again whether all ranks have something to send, in pools
#: with these words. By default it asks every millisecond, which takes an eighth of the time of ranks that trace graphs.
CYCLE_TIMES = {"tensorflow": "3", "tf_keras": "3"}

DEFAULTS = {
    # One thread per rank: several ranks with several threads each spend a small machine's time on switching.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    # What a rank printed before it was killed must already be in its file.
    "PYTHONUNBUFFERED": "1",
}


def sleep_while_waiting(folder: Path) -> None:
    """Have ranks sleep for a moment wherever they only let others go first, if there is a compiler here.

    Open MPI waits for messages, and Horovod's PyTorch for results, by asking again and again. Where ranks are more than
    processors, that takes the time of those that are waited for.
    """
    compiler = shutil.which("cc")
    if compiler is not None:
        library = folder / "waiting.so"
        source = Path(__file__).with_name("waiting.c")
        subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
        DEFAULTS["LD_PRELOAD"] = str(library)


#: How tests reach Keras 3 on PyTorch and Keras 2 (arguments of a `ranks` mark); Keras 3 on TensorFlow has its own word.
ON_TORCH = {"pool": "keras-torch", "env": {"KERAS_BACKEND": "torch"}}
KERAS_2 = {"pool": "tf_keras", "env": {"TF_USE_LEGACY_KERAS": "1"}}

#: For `env=` of a test that makes process sets after hvd.init(). Not for all: with it, two ranks on two cores over MPI
#: at times take hundreds of milliseconds for a step.
PROCESS_SETS = {"HOROVOD_DYNAMIC_PROCESS_SETS": "1"}

# For `soak=` of a test on 2, 3 and 4 ranks: the pairs that are left when every run has each number and each launcher.
OTHER_PAIRS = {"mpi": (3,), "gloo": (2, 4)}
# And all but two ranks under mpirun, where `tests/conformance` has three ranks over Gloo do the same.
MORE_RANKS = {"mpi": (3, 4), "gloo": (2, 3, 4)}


def _package_folder() -> str:
    """Where this process finds the package under test, so that the ranks find the same one."""
    found = importlib.util.find_spec("adacons_hvd")
    places = found.submodule_search_locations if found else None
    return str(Path(next(iter(places))).parent) if places else str(TESTS.parent)


def environment(launcher: Launcher, folder: Path, extra: Mapping[str, str]) -> dict[str, str]:
    """The environment a job starts with: this process's, the defaults, the launcher's, the test's.

    What launchers and ranks leave lying about when they are killed, they leave in `folder`.
    """
    path = [_package_folder(), str(TESTS), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    ours = {
        "PYTHONPATH": os.pathsep.join(path),
        "TMPDIR": str(folder),
        # Open MPI's shared memory, elsewhere a file in /dev/shm; containers also have little of that.
        "OMPI_MCA_btl_vader_backing_directory": str(folder),
    }
    return {**os.environ, **DEFAULTS, **ours, **launcher.env, **extra}
