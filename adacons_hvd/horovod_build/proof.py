"""Proof that a build works: what Horovod says of itself, and two processes that reduce a tensor together."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from . import cuda
from .errors import BuildError
from .processes import run
from .recipe import Recipe

_RANKS = 2
_TIME_LIMIT = 120
_REDUCE = Path(__file__).parent / "reduce_two.py"
_LISTED = {"torch": "PyTorch", "tensorflow": "TensorFlow", "mpi": "MPI", "gloo": "Gloo", "nccl": "NCCL"}


def prove(recipe: Recipe, site: Path | None = None) -> None:
    """Raises a `BuildError` unless everything in `recipe` works.

    `site` is a folder that a new wheel was unpacked to, for the full proof before it is kept. Without it the Horovod
    installed here is asked to reduce, and not what it was built with: that was proven when its wheel was kept.
    """
    environment = rank_environment(site)
    if site is not None:
        compare(recipe, check_build(environment))
    for controller in recipe.controllers:
        for framework in recipe.frameworks:
            output = _reduce(controller, framework, environment)
            print(f"  {framework} over {controller}: two processes agree", flush=True)
    if recipe.nccl:
        nccl = cuda.find_nccl()
        compare_nccl(loaded_nccl(output), str(nccl.library) if nccl else None)
        _prove_gpus(recipe, environment)


def check_build(environment: dict[str, str]) -> str:
    """Horovod's report on itself. It imports every framework several times over for it: a quarter of a minute."""
    command = [sys.executable, "-m", "horovod.runner.launch", "--check-build"]
    return run(command, environment, _TIME_LIMIT).output


def compare(recipe: Recipe, answer: str) -> None:
    """Raises unless the answer of `horovodrun --check-build` lists everything that was to be built."""
    listed = parse_check_build(answer)
    wanted = {*recipe.frameworks, *recipe.controllers, *(["nccl"] if recipe.nccl else [])}
    absent = sorted(_LISTED[name] for name in wanted if not listed.get(_LISTED[name]))
    if absent:
        raise BuildError(
            f"The built Horovod does not list {', '.join(absent)}; `horovodrun --check-build` said:\n{_tail(answer)}"
        )


def parse_check_build(text: str) -> dict[str, bool]:
    """The names in the list that `horovodrun --check-build` prints, and whether each has its cross.

    >>> parse_check_build("Available Controllers:\\n    [X] MPI\\n    [ ] Gloo")
    {'MPI': True, 'Gloo': False}
    """
    listed: dict[str, bool] = {}
    for cross, name in re.findall(r"^\s*\[([X ])\] (\w+)", text, re.MULTILINE):
        # MPI and Gloo stand there twice, as a controller and as an operation: both have to be crossed.
        listed[name] = listed.get(name, True) and cross == "X"
    return listed


def launcher(controller: str, ranks: int = _RANKS) -> list[str]:
    """The command that starts processes here, two of them, under a controller."""
    if controller == "gloo":
        return [sys.executable, "-m", "horovod.runner.launch", "--gloo", "-np", str(ranks)]
    return ["mpirun", "-np", str(ranks)]


def loaded_nccl(output: str) -> set[str]:
    """The files of NCCL that the ranks of a proof say they loaded."""
    return {str(Path(path).resolve()) for path in re.findall(r"^.*rank \d+ loaded (/\S+)$", output, re.MULTILINE)}


def compare_nccl(loaded: set[str], linked: str | None) -> None:
    """Raises where two NCCLs are loaded in one process, or another than the one that was linked."""
    if len(loaded) > 1:
        raise BuildError(
            f"The framework and Horovod load different NCCLs, which do not share their communicators: "
            f"{' and '.join(sorted(loaded))}. Unset HOROVOD_NCCL_HOME and LD_LIBRARY_PATH and run again with --force."
        )
    for path in loaded:
        if linked and str(Path(linked).resolve()) != path:
            print(f"  Note: linked with {linked}, but what is loaded is {path}", flush=True)


def rank_environment(site: Path | None = None) -> dict[str, str]:
    """The environment for two ranks on this machine, whatever Horovod setting the caller has."""
    # Another controller, for example, or an elastic job's address, must not decide the outcome.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HOROVOD_")}
    if site is not None:
        inherited["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), inherited.get("PYTHONPATH")]))
    return inherited | {
        # Two ranks of threads on a small machine would only wait for each other.
        "OMP_NUM_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": "",
        # Open MPI: root is welcome (containers run as root), two ranks fit one core, and no shared-memory copy by
        # a system call that containers forbid. Other MPIs ignore these.
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "OMPI_MCA_btl_vader_single_copy_mechanism": "none",
    }


def _prove_gpus(recipe: Recipe, environment: dict[str, str]) -> None:
    """Reduces GPU tensors over NCCL where there is a GPU: each rank has one of its own, so one GPU makes one rank."""
    visible = gpus()
    if not visible:
        print("  no GPU here: that NCCL reduces GPU tensors remains to be seen on a machine that has one", flush=True)
        return
    ranks = min(len(visible), _RANKS)
    seeing = environment | {"CUDA_VISIBLE_DEVICES": ",".join(visible[:ranks])}
    for framework in recipe.frameworks:
        _reduce(recipe.controllers[-1], framework, seeing, ranks, "gpu")
        print(f"  {framework} over nccl: {ranks} {'processes agree' if ranks > 1 else 'process agrees'}", flush=True)


def gpus() -> list[str]:
    """The numbers of the GPUs here, or of those that the caller's CUDA_VISIBLE_DEVICES leaves."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [part.strip() for part in chosen.split(",") if part.strip() not in ("", "-1")]
    try:
        done = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [str(index) for index, line in enumerate(re.findall(r"^GPU \d+", done.stdout, re.MULTILINE)) if line]


def _reduce(
    controller: str, framework: str, environment: dict[str, str], ranks: int = _RANKS, device: str = "cpu"
) -> str:
    command = [*launcher(controller, ranks), sys.executable, str(_REDUCE), framework, controller, device]
    finished = run(command, environment, _TIME_LIMIT)
    # On every rank, and of as many as were started: ranks that know nothing of each other would each agree.
    agreed = len(re.findall(rf"rank \d+ of {ranks}: agreed", finished.output))
    if finished.returncode == 0 and agreed == ranks:
        return finished.output
    how = "did not finish in time" if finished.returncode is None else f"ended with {finished.returncode}"
    between = "between two processes" if ranks == _RANKS else "in one process"
    kind = "tensors on the GPU" if device == "gpu" else "tensors"
    raise BuildError(
        f"The built Horovod does not work: an allreduce of {framework} {kind} {between} over "
        f"{controller} {how}. It printed:\n{_tail(finished.output)}"
    )


def _tail(text: str, lines: int = 30) -> str:
    return "\n".join(text.splitlines()[-lines:])
