"""The recipe of a build: the release, the frameworks and controllers, and the key that names the result.

Two builds share a key exactly when their wheels are interchangeable, so everything that reaches the compiler or the
linker is among the facts below, and nothing else is.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from . import cuda
from .frameworks import framework_version

HOROVOD_VERSION = "0.28.1"
SDIST_NAME = f"horovod-{HOROVOD_VERSION}.tar.gz"
SDIST_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
PATCH_DIR = Path(__file__).parent / "patches"

# The user's own settings that may reach Horovod's build. Any other HOROVOD_ variable, left over from a job say, is
# kept away from it: it would change the result behind the key's back.
_PASSED_ON = (
    "HOROVOD_BUILD_ARCH_FLAGS",
    "HOROVOD_CMAKE",
    "HOROVOD_CUDA_HOME",
    "HOROVOD_BUILD_CUDA_CC_LIST",
    "HOROVOD_NCCL_HOME",
    "HOROVOD_NCCL_INCLUDE",
    "HOROVOD_NCCL_LIB",
    "HOROVOD_NCCL_LINK",
)
_COMPILER_SETTINGS = ("CXX", "CXXFLAGS", "CPPFLAGS", "CUDAFLAGS", "OMPI_CXX", "MPICH_CXX")


@dataclass(frozen=True)
class Recipe:
    """Which Horovod to build: `frameworks` among torch and tensorflow, and what carries its messages."""

    frameworks: tuple[str, ...]
    mpi: bool = True
    nccl: bool = False

    @property
    def controllers(self) -> tuple[str, ...]:
        """Gloo is always built: it needs nothing installed and is what `horovodrun --gloo` runs on."""
        return ("mpi", "gloo") if self.mpi else ("gloo",)

    def __str__(self) -> str:
        names = [f"{name} {framework_version(name)}" for name in self.frameworks]
        carriers = [*self.controllers, *(["nccl"] if self.nccl else [])]
        return f"Horovod {HOROVOD_VERSION} for {' and '.join(names)}, over {', '.join(carriers)}"

    def settings(self) -> dict[str, str]:
        """The environment variables that tell Horovod's build what to include."""
        wanted = {
            "MPI": self.mpi,
            "GLOO": True,
            "PYTORCH": "torch" in self.frameworks,
            "TENSORFLOW": "tensorflow" in self.frameworks,
            "MXNET": False,
        }
        settings = {f"HOROVOD_{'WITH' if on else 'WITHOUT'}_{part}": "1" for part, on in wanted.items()}
        if self.nccl:
            settings["HOROVOD_GPU_OPERATIONS"] = "NCCL"
        if flags := architecture_flags():
            settings["HOROVOD_BUILD_ARCH_FLAGS"] = flags
        # Debugging information is nine tenths of the wheel, and nobody steps through Horovod from here.
        settings["LDFLAGS"] = f"{os.environ.get('LDFLAGS', '')} -Wl,--strip-debug".strip()
        for name in (*_PASSED_ON, *_COMPILER_SETTINGS):
            if os.environ.get(name):
                settings[name] = os.environ[name]
        return settings

    def environment(self, jobs: int, scratch: Path, found: dict[str, str] | None = None) -> dict[str, str]:
        """The whole environment of the build: the caller's, without stray Horovod settings, plus `settings`.

        `found` is what was looked up for this build: where CUDA is, and each framework's C++ standard.
        """
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HOROVOD_")}
        # The frameworks are asked for their flags by running this interpreter; their chatter is not an answer.
        quiet = {"TF_CPP_MIN_LOG_LEVEL": "3"}
        # CMake 4 refuses what asks to be read as CMake before 3.5 did, as Horovod's copy of Gloo does.
        policy = {"CMAKE_POLICY_VERSION_MINIMUM": "3.5"}
        # The compiler's temporary files go where the disk was checked and where they are removed with the rest.
        placed = {"MAKEFLAGS": f"-j{jobs}", "TMPDIR": str(scratch)}
        return inherited | self.settings() | quiet | policy | placed | (found or {})

    def facts(self) -> dict[str, str]:
        """Everything that decides what the wheel holds, by name."""
        facts = {
            "horovod": f"{HOROVOD_VERSION} {SDIST_SHA256}",
            "patches": digest(*(path.read_text() for path in patches())),
            "python": f"{sys.implementation.cache_tag} {sysconfig.get_config_var('EXT_SUFFIX')}",
            "platform": f"{sysconfig.get_platform()} {' '.join(platform.libc_ver())}",
            "compiler": _first_line(compiler(), "--version"),
        }
        facts |= {name: framework_version(name) for name in self.frameworks}
        facts |= {f"setting {name}": value for name, value in sorted(self.settings().items())}
        if self.mpi:
            facts["mpi"] = f"{_first_line('mpirun', '--version')} | {_first_line('mpicxx', '-show')}"
        # PyTorch's part takes GPU tensors through the host where CUDA is there, NCCL asked for or not.
        return facts | cuda.versions(self.frameworks, self.nccl)

    def key(self) -> str:
        """The name of this build in the cache."""
        return f"horovod-{HOROVOD_VERSION}-{digest(json.dumps(self.facts(), sort_keys=True))[:16]}"


def patches() -> list[Path]:
    """The patches in the order they are applied."""
    return sorted(PATCH_DIR.glob("*.patch"))


def compiler() -> str:
    """The C++ compiler CMake will choose: `CXX` where set, else c++, else g++."""
    return os.environ.get("CXX") or next((name for name in ("c++", "g++") if shutil.which(name)), "c++")


def architecture_flags() -> str:
    """The vector instructions Horovod's half-precision sums can use, as far as this machine's processor has them.

    Horovod would ask GCC for the same answer. Asking here puts it into the key, so that a home folder shared by
    different machines never hands one of them a wheel it cannot run.
    """
    if flags := os.environ.get("HOROVOD_BUILD_ARCH_FLAGS"):
        return flags
    try:
        described = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    line = next((line for line in described.splitlines() if line.startswith("flags")), "")
    return " ".join(f"-m{name}" for name in ("f16c", "avx", "fma") if name in line.split())


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def _first_line(*command: str) -> str:
    return next(iter(_output(*command).splitlines()), "none")


def digest(*texts: str) -> str:
    """A name for some texts together, which any change to them changes."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()
