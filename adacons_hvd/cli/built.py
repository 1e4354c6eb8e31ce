"""How the Horovod in use was built, and whether the CUDA, NCCL and GPUs here fit it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..horovod_build.cuda import framework_cuda
from ..horovod_build.matrix import nccl_version

__all__ = ["gpus", "how_built", "loaded_nccl", "warnings"]

# Which NCCL a process loads that trains on the frameworks given, and its version as the library states it.
_LOAD = """
import ctypes, importlib, json, sys
from pathlib import Path
for name in sys.argv[1:]:
    importlib.import_module(name)
found = {}
for line in Path("/proc/self/maps").read_text().splitlines():
    path = line.split(maxsplit=5)[-1]
    if "/libnccl.so" in path and path not in found:
        version = ctypes.c_int()
        ctypes.CDLL(path).ncclGetVersion(ctypes.byref(version))
        found[path] = version.value
print(json.dumps(found))
"""


def how_built() -> dict[str, Any]:
    """The installed Horovod's report on its build, with None for what one from elsewhere does not say."""
    spec = find_spec("horovod")
    said: dict[str, str] = {}
    for folder in (spec.submodule_search_locations or []) if spec else []:
        try:
            said = json.loads((Path(folder) / "metadata.json").read_text())
        except (OSError, ValueError):
            continue
    return {
        "compiler": said.get("cxx_compiler"),
        "standard": {
            title: said[key]
            for title, key in (("torch", "pytorch_cxx_standard"), ("tensorflow", "tensorflow_cxx_standard"))
            if key in said
        },
        "frameworks": {
            title: said[key] for title, key in (("torch", "pytorch"), ("tensorflow", "tensorflow")) if key in said
        },
        "cuda": said.get("cuda"),
        "nccl": nccl_version(said["nccl"]) if "nccl" in said else None,
        "architectures": said["cuda_architectures"].split(",") if said.get("cuda_architectures") else [],
    }


def loaded_nccl(frameworks: list[str]) -> dict[str, str]:
    """The files of NCCL that a process with these frameworks and Horovod loads, and the version of each."""
    modules = [name for name in frameworks if find_spec(name)]
    if find_spec("horovod"):
        modules += [f"horovod.{name}" for name in modules]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _LOAD, *modules],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        found = json.loads(done.stdout.strip().splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return {}
    return {path: nccl_version(str(code)) for path, code in found.items()}


def gpus() -> list[dict[str, str]]:
    """Each GPU here: its name, its architecture as in sm_90, and the driver."""
    command = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [line.split(", ") for line in done.stdout.splitlines()]
    return [
        {"name": row[0], "architecture": f"sm_{row[1].replace('.', '')}", "driver": row[2]}
        for row in rows
        if len(row) == 3 and re.fullmatch(r"\d+\.\d+", row[1])
    ]


def cudas(frameworks: list[str]) -> dict[str, str]:
    """The CUDA that each installed framework was built for."""
    versions = {name: framework_cuda(name) for name in frameworks}
    return {name: f"{version[0]}.{version[1]}" for name, version in versions.items() if version}


def warnings(built: dict[str, Any], here: list[dict[str, str]], loaded: dict[str, str]) -> list[str]:
    """A sentence for each thing that does not fit, with what to do."""
    again = "python -m adacons_hvd.horovod_build --install --nccl"
    found = []
    if len(loaded) > 1:
        files = " and ".join(f"{path} ({version})" for path, version in loaded.items())
        found.append(f"Two NCCLs are loaded in one process, {files}: build Horovod again with the framework's: {again}")
    elif built["nccl"] and loaded and built["nccl"] not in loaded.values():
        ((path, version),) = loaded.items()
        found.append(
            f"Horovod was built with NCCL {built['nccl']}, and {version} is loaded ({path}): if collectives fail, "
            f"build it again: {again}"
        )
    compiled = built["architectures"]
    found += [
        f"Horovod's GPU code was compiled for {', '.join(compiled)}, not for the {architecture} here: build it again "
        f"without HOROVOD_BUILD_CUDA_CC_LIST: {again} --force"
        for architecture in sorted({gpu["architecture"] for gpu in here})
        if compiled and not runs_on(architecture, compiled)
    ]
    if here and not built["cuda"] and built["compiler"]:
        found.append(f"There is a GPU here, and Horovod was built without CUDA: build it for GPUs: {again}")
    return found


def runs_on(architecture: str, compiled: list[str]) -> bool:
    """Whether a GPU runs what was compiled: its own architecture, an older one of its generation, or PTX.

    >>> runs_on("sm_90", ["sm_80", "sm_90"]), runs_on("sm_89", ["sm_86"]), runs_on("sm_90", ["sm_86", "sm_120"])
    (True, True, False)
    >>> runs_on("sm_120", ["sm_90", "compute_90"])
    True
    """
    number = int(architecture.removeprefix("sm_"))
    for name in compiled:
        kind, _, text = name.partition("_")
        of = int(text)
        if of <= number and (kind == "compute" or of // 10 == number // 10):
            return True
    return False
