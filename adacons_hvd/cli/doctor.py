"""Shows what is installed here, which launchers and operations work, and which schedule is chosen.

The proof is live: two processes under each launcher and framework run Horovod's operations and take steps with
AdaCons in every schedule, whose results are compared with those computed in one place. They run on the processor, so
that a doctor called beside a training job takes none of its GPUs' memory.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from .. import Curvature, __version__
from ..costs import Network, Rates, choose
from ..engine.settings import BUCKET_BYTES
from . import built, live
from .check import LAUNCHERS, RANKS, check, path_of, what_to_check
from .display import console, progress, show_json, show_table
from .errors import CommandError

__all__ = ["add_arguments", "run"]

_PACKAGES = (
    "torch",
    "tensorflow",
    "tensorflow-cpu",
    "keras",
    "tf_keras",
    "horovod",
    "mpi4py",
    "numpy",
    "rich",
    "matplotlib",
)
_OTHERS = ("srun", "jsrun")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--frameworks",
        type=_names("torch", "tensorflow"),
        metavar="LIST",
        help="check only these, for example torch (default: all that are installed)",
    )
    parser.add_argument(
        "--launchers",
        type=_names(*LAUNCHERS),
        metavar="LIST",
        help="check only under these of mpi, gloo and torchrun (default: all that are installed)",
    )
    parser.add_argument("--no-live", action="store_true", help="start no processes; takes no time")
    cluster = parser.add_argument_group(
        "a cluster that is not at hand", "which schedule would be chosen on it; the defaults are those of a small one"
    )
    cluster.add_argument("--workers", type=int, metavar="N", help="how many in all")
    cluster.add_argument("--per-host", type=int, metavar="L", default=1, help="how many share one network card (1)")
    cluster.add_argument("--gbits", type=float, metavar="G", default=10.0, help="Gbit/s through that card (10)")


def run(options: argparse.Namespace) -> int:
    screen = console(options.json)
    cluster = _cluster(options)
    checks = [] if options.no_live else what_to_check(options.frameworks, options.launchers)
    with progress(len(checks)) as advance:
        results = []
        for framework, launcher in checks:
            advance(f"{framework} under {launcher}", 0)
            results.append(check(framework, launcher))
            advance("", 1)
    frameworks = [name for name in ("torch", "tensorflow") if find_spec(name)]
    horovod, gpus, cudas = built.how_built(), built.gpus(), built.cudas(frameworks)
    # To see which NCCL is loaded takes a process that imports everything; without CUDA there is none to see.
    loaded = built.loaded_nccl(frameworks) if not options.no_live and (cudas or horovod["nccl"]) else {}
    for result in results:
        for choice in result["choices"]:
            choice["history_bytes"] = _history(choice["bytes"] // 4, RANKS)
    found: dict[str, Any] = {
        "installed": {"adacons_hvd": __version__, "python": platform.python_version(), **_versions()},
        "machine": {"system": platform.platform(), "cores": os.cpu_count(), "gpus": gpus},
        "cuda": cudas,
        "nccl": loaded,
        "horovod": horovod,
        "launchers": {name: path_of(name) for name in (*LAUNCHERS.values(), *_OTHERS)},
        "checks": results,
        "choices": [choice for result in results for choice in result["choices"]] + cluster,
        "advice": [*built.warnings(horovod, gpus, loaded), *_advice(results, options)],
    }
    found["works"] = bool(results) and all(result["works"] for result in results)
    if screen is None:
        show_json(found)
    else:
        _show(screen, found)
    return 0 if found["works"] or options.no_live else 1


# --- what is here ---------------------------------------------------------------------------------


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    # One framework under two names.
    if versions["tensorflow"] is None:
        versions["tensorflow"] = versions["tensorflow-cpu"]
    del versions["tensorflow-cpu"]
    return versions


# --- what would be chosen, and what to do -----------------------------------------------------------


def _cluster(options: argparse.Namespace) -> list[dict[str, Any]]:
    if options.workers is None:
        return []
    for name in ("workers", "per_host", "gbits"):
        if getattr(options, name) <= 0:
            raise CommandError(f"--{name.replace('_', '-')} must be positive, not {getattr(options, name)}")
    rates = Rates.of(Network(bandwidth=options.gbits * 1e9 / 8), options.workers, options.per_host)
    where = f"{options.workers} workers, {options.per_host} a host, {options.gbits:g} Gbit/s"
    choices = []
    for elements in live.SIZES:
        choice = choose(rates, 4.0 * elements, BUCKET_BYTES)
        choices.append({"where": where, "bytes": 4 * elements, "schedule": choice.schedule, "reason": choice.reason})
        choices[-1]["curvature"] = choose(rates, 4.0 * elements, BUCKET_BYTES, aggregator=Curvature()).reason
        choices[-1]["history_bytes"] = _history(elements, options.workers)
    return choices


def _history(elements: int, workers: int) -> dict[str, int]:
    """The bytes that each worker keeps for ``Curvature()``, by schedule."""
    steps = Curvature().history
    return {"one-pass": 4 * steps * math.ceil(elements / workers), "gather": 4 * steps * elements}


def _advice(results: list[dict[str, Any]], options: argparse.Namespace) -> list[str]:
    advice = []
    if find_spec("torch") is None and find_spec("tensorflow") is None:
        advice.append("Install a framework: pip install torch, or tensorflow.")
    elif find_spec("horovod") is None:
        advice.append("Build Horovod for your frameworks: python -m adacons_hvd.horovod_build --install")
    if path_of("mpirun") is None:
        advice.append("Without mpirun there is no MPI; horovodrun --gloo and torchrun need none.")
    broken = [r for r in results if r["error"] and "not installed" not in r["error"]]
    if broken and any(result["launcher"] != "torchrun" for result in broken):
        advice.append(
            "If Horovod was built before its framework was last updated, build it again: "
            "python -m adacons_hvd.horovod_build --install"
        )
    if not results and not options.no_live:
        advice.append("There was nothing to check live: no framework has a launcher here.")
    return advice


# --- on the screen ----------------------------------------------------------------------------------


def _show(screen: Any, found: dict[str, Any]) -> None:
    installed = [[name, version or "-"] for name, version in found["installed"].items()]
    machine = found["machine"]
    rows = [*installed, ["machine", f"{machine['system']}, {machine['cores']} cores"]]
    rows += [[f"GPU {index}", _gpu(gpu)] for index, gpu in enumerate(machine["gpus"])] or [["GPU", "-"]]
    rows += [[f"CUDA of {name}", version] for name, version in found["cuda"].items()] or [["CUDA", "-"]]
    rows += [["NCCL as loaded", f"{version}, {path}"] for path, version in found["nccl"].items()]
    rows += _how_built(found["horovod"])
    rows += [[name, path or "-"] for name, path in found["launchers"].items()]
    show_table(screen, "Installed", ["what ", "version or place "], rows)
    if found["checks"]:
        rows = [
            [
                f"{check['framework']} under {check['launcher']}",
                "yes" if check["works"] else "no",
                _tally(check["operations"]),
                _tally(check["schedules"]),
                check["error"] or "",
            ]
            for check in found["checks"]
        ]
        headings = ["two processes ", "works ", "operations ", "AdaCons by schedule ", "error "]
        show_table(screen, "Live check", headings, rows)
    places = dict.fromkeys(choice["where"] for choice in found["choices"])
    for place in places:
        screen.print(f'What schedule="auto" chooses: {place}')
        for choice in found["choices"]:
            if choice["where"] == place:
                screen.print(f"  {choice['reason'].removeprefix('auto: ')}")
                kept = " or ".join(f"{b / 1e6:.3g} MB with {name}" for name, b in choice["history_bytes"].items())
                screen.print(f"    with Curvature(): {choice['curvature'].partition(', ')[2]}")
                screen.print(f"    its history takes {kept} on each worker")
    for line in found["advice"]:
        screen.print(line)


def _gpu(gpu: dict[str, str]) -> str:
    return f"{gpu['name']}, {gpu['architecture']}, driver {gpu['driver']}"


def _how_built(horovod: dict[str, Any]) -> list[list[str]]:
    if horovod["compiler"] is None:
        return []
    standards = [f"C++{standard} for {name}" for name, standard in horovod["standard"].items()]
    rows = [["Horovod's compiler", ", ".join([horovod["compiler"].replace("GNU", "GCC"), *standards])]]
    if horovod["cuda"]:
        rows.append(["Horovod's CUDA", f"{horovod['cuda']}, for {', '.join(horovod['architectures'])}"])
    if horovod["nccl"]:
        rows.append(["Horovod's NCCL", horovod["nccl"]])
    return rows


def _tally(outcomes: dict[str, str | None]) -> str:
    failed = [f"{name}: {problem}" for name, problem in outcomes.items() if problem]
    return "; ".join(failed) or (", ".join(outcomes) if outcomes else "-")


def _names(*choices: str) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",")]
        unknown = [name for name in names if name not in choices]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(choices)}")
        return names

    return parse
