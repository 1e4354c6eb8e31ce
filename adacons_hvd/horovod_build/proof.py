"""Proof that a build works: what Horovod says of itself, and two processes that reduce a tensor together."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

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
            _reduce(controller, framework, environment)
            print(f"  {framework} over {controller}: two processes agree", flush=True)


def check_build(environment: dict[str, str]) -> str:
    """What Horovod says of itself. It imports every framework several times over to answer: a quarter of a minute."""
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


def launcher(controller: str) -> list[str]:
    """The command that starts two processes here under a controller."""
    if controller == "gloo":
        return [sys.executable, "-m", "horovod.runner.launch", "--gloo", "-np", str(_RANKS)]
    return ["mpirun", "-np", str(_RANKS)]


def rank_environment(site: Path | None = None) -> dict[str, str]:
    """What two ranks on this machine need to be told, whatever Horovod setting the caller has."""
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


def _reduce(controller: str, framework: str, environment: dict[str, str]) -> None:
    command = [*launcher(controller), sys.executable, str(_REDUCE), framework, controller]
    finished = run(command, environment, _TIME_LIMIT)
    agreed = len(re.findall(r"rank \d+ of \d+: agreed", finished.output))
    if finished.returncode == 0 and agreed == _RANKS:
        return
    how = "did not finish in time" if finished.returncode is None else f"ended with {finished.returncode}"
    raise BuildError(
        f"The built Horovod does not work: an allreduce of {framework} tensors between two processes over "
        f"{controller} {how}. It printed:\n{_tail(finished.output)}"
    )


def _tail(text: str, lines: int = 30) -> str:
    return "\n".join(text.splitlines()[-lines:])
