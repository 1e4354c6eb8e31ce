"""Builds and proves Horovod for a list of frameworks and Pythons, and writes the table in docs/builds.md.

    python -m adacons_hvd.horovod_build.matrix --work /tmp/matrix --docs docs/builds.md

Every cell is a user's way from nothing: an empty virtual environment, `pip install` of the frameworks, the pip line
that `--check` prints, and the build with its proof. A cell's result is kept in the working folder at once, so that the
next run goes on after it; a cell whose build has changed since, by a patch say, is done again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .recipe import digest, patches

_BEGIN, _END = "<!-- matrix: begin -->", "<!-- matrix: end -->"
_HEADINGS = ("Python", "PyTorch", "TensorFlow", "C++", "compiler", "messages over", "GPU", "seconds", "processor")


@dataclass(frozen=True)
class Cell:
    """One configuration: a Python, the frameworks as pip names them, and the options of the build."""

    python: str
    packages: tuple[str, ...]
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name under which the result is kept."""
        return " ".join([self.python, *self.packages, *self.options])


# Each framework's releases once and each Python once, and the newest of everything together.
CELLS = (
    Cell("3.11", ("torch==2.14.1",), ("--nccl",)),
    Cell("3.13", ("torch==2.14.1", "tensorflow-cpu==2.21.0")),
    Cell("3.11", ("torch==2.13.0", "tensorflow-cpu==2.21.0")),
    Cell("3.10", ("torch==2.6.0", "tensorflow-cpu==2.18.1")),
    Cell("3.12", ("torch==2.9.1", "tensorflow-cpu==2.20.0")),
    Cell("3.12", ("torch==2.11.0",), ("--gloo-only", "--nccl")),
)


def main() -> int:
    """Builds what has not been built yet, in order, and writes the table after each cell."""
    parser = argparse.ArgumentParser(prog="python -m adacons_hvd.horovod_build.matrix", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="environments, wheels and results are kept here")
    parser.add_argument("--docs", type=Path, help="the page whose table is to be written")
    parser.add_argument("--only", metavar="TEXT", default="", help="only cells whose name holds this text")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="compilers at a time")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    failed = 0
    for cell in (cell for cell in CELLS if options.only in cell.name):
        place = options.work / (re.sub(r"[^\w.=]+", "_", cell.name) + ".json")
        if not is_current(place):
            print(f"== {cell.name}", flush=True)
            result = build(cell, options.work, options.jobs)
            failed += "error" in result
            place.write_text(json.dumps(result, indent=2) + "\n")
            if options.docs:
                write_table(options.docs, options.work)
    if options.docs:
        write_table(options.docs, options.work)
    return 1 if failed else 0


def is_current(place: Path) -> bool:
    """Whether a cell was built, and with the patches there are now."""
    try:
        result = json.loads(place.read_text())
    except (OSError, ValueError):
        return False
    return "error" not in result and result["patches"] == _patches()


def build(cell: Cell, work: Path, jobs: int) -> dict[str, Any]:
    """One cell from an empty environment to the proof."""
    environment = work / "environment"
    log = work / "last.log"
    try:
        with log.open("w") as output:
            run([find_python(cell.python), "-m", "venv", "--clear", str(environment)], output)
            python = str(environment / "bin" / "python")
            run([python, "-m", "pip", "install", "--quiet", *cell.packages], output)
            command = [python, "-m", "adacons_hvd.horovod_build", *cell.options, "--cache-dir", str(work / "cache")]
            checked = run([*command, "--check"], output, may_fail=True)
            if line := re.search(r"^In this environment: +(.+)$", checked, re.MULTILINE):
                run([*shlex.split(line[1]), "--quiet"], output)
            before, start = _processor_seconds(), time.monotonic()
            said = run([*command, "--force", "--install", "--jobs", str(jobs)], output)
            elapsed, spent = time.monotonic() - start, _processor_seconds() - before
            facts = json.loads(run([python, "-c", _ASK], output).splitlines()[-1])
        return {
            "cell": cell.name,
            "patches": _patches(),
            "seconds": round(elapsed),
            "processor": round(spent),
            "proof": re.findall(r"^  (.+ agrees?)$", said, re.MULTILINE),
            **facts,
        }
    except subprocess.CalledProcessError as error:
        print(f"   failed: {error}; see {log}", flush=True)
        return {"cell": cell.name, "patches": _patches(), "error": f"{error}\n{(error.output or '')[-4000:]}"}
    finally:
        shutil.rmtree(environment, ignore_errors=True)


# Asked inside the new environment: what is there, and what the installed Horovod says of itself.
_ASK = """
import json, platform
from importlib import metadata
from pathlib import Path
built = json.loads(Path(metadata.distribution("horovod").locate_file("horovod/metadata.json")).read_text())
print(json.dumps({"python": platform.python_version(), "torch": built.get("pytorch"),
                  "tensorflow": built.get("tensorflow"), "built": built}))
"""


def run(command: list[str], output: Any, may_fail: bool = False) -> str:
    """Runs a command with this package on its path and returns what it printed, which is also kept."""
    root = Path(__file__).resolve().parents[2]
    # Only this package: whatever else the caller's path has must not stand in for what pip should install.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    print("$", shlex.join(command), file=output, flush=True)
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output.write(done.stdout)
    output.flush()
    if done.returncode != 0 and not may_fail:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout)
    return done.stdout


def find_python(version: str) -> str:
    """An interpreter of this version: on PATH, else one of pyenv's."""
    if found := shutil.which(f"python{version}"):
        answer = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
        if f" {version}." in answer:
            return found
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for folder in sorted(root.glob(f"versions/{version}.*"), reverse=True):
        if (folder / "bin" / "python").exists():
            return str(folder / "bin" / "python")
    sys.exit(f"There is no Python {version} here: put one on PATH or into pyenv.")


# ---- the page ------------------------------------------------------------------------------------------------------


def write_table(page: Path, work: Path) -> None:
    """Replaces the table between the page's two marks."""
    results = [json.loads(path.read_text()) for path in sorted(work.glob("*.json"))]
    order = {cell.name: index for index, cell in enumerate(CELLS)}
    shown = sorted((r for r in results if "error" not in r and r["cell"] in order), key=lambda r: order[r["cell"]])
    text = page.read_text()
    before, after = text.partition(_BEGIN)[0], text.partition(_END)[2]
    page.write_text(f"{before}{_BEGIN}\n{table(shown)}\n{_END}{after}")


def table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    rows = [_HEADINGS, tuple("---" for _ in _HEADINGS), *(_row(result) for result in results)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(result: dict[str, Any]) -> tuple[str, ...]:
    built = result["built"]
    standards = [
        f"{built[key]} ({title})"
        for key, title in (("pytorch_cxx_standard", "PyTorch"), ("tensorflow_cxx_standard", "TensorFlow"))
        if key in built
    ]
    carriers = dict.fromkeys(re.findall(r"over (mpi|gloo)\b", " ".join(result["proof"])))
    gpu = "-"
    if "cuda" in built:
        gpu = f"CUDA {built['cuda']}" + (f", NCCL {nccl_version(built['nccl'])}" if "nccl" in built else "")
    return (
        result["python"],
        result["torch"] or "-",
        result["tensorflow"] or "-",
        ", ".join(standards),
        built["cxx_compiler"].replace("GNU", "GCC"),
        ", ".join({"mpi": "MPI", "gloo": "Gloo"}[name] for name in carriers),
        gpu,
        str(result["seconds"]),
        str(result["processor"]),
    )


def nccl_version(code: str) -> str:
    """NCCL's version from the number in its header.

    >>> nccl_version("22809"), nccl_version("23007")
    ('2.28.9', '2.30.7')
    """
    number = int(code)
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _patches() -> str:
    return digest(*(path.read_text() for path in patches()))


if __name__ == "__main__":
    sys.exit(main())
