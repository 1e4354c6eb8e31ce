"""Build what a release consists of, install it into empty environments, and try it there: ``make release-check``.

Every check prints a line. The first that fails ends the program with its output.
"""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import tomllib
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "out" / "release"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

#: What a rank of the job does that trains with the installed package.
JOB = """
import torch
from torch.distributed.fsdp import fully_shard
import adacons_hvd, adacons_hvd.ddp, adacons_hvd.fsdp
from adacons_hvd import AdaCons

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
mesh = torch.distributed.init_device_mesh("cpu", (2,))
torch.manual_seed(0)
for kind, attach in (("ddp", adacons_hvd.ddp.attach), ("fsdp", adacons_hvd.fsdp.attach)):
    model = torch.nn.Linear(4, 2)
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if kind == "ddp" else fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    attach(wrapped, optimizer, AdaCons())
    wrapped(torch.randn(8, 4) + rank).square().mean().backward()
    optimizer.step()
    if rank == 0:
        print(kind, "from", adacons_hvd.__file__, "-", optimizer.report)
torch.distributed.destroy_process_group()
"""

#: A user's module that is typed as it should be, and a line that is not.
TYPED = """
from collections.abc import Sequence

from adacons_hvd import AdaCons, Aggregator
from adacons_hvd.report import Report


def choose(momentum: float) -> Aggregator:
    return AdaCons(momentum=momentum, scale="average")


def weights(report: Report) -> Sequence[Sequence[float]]:
    return report.weights
"""
MISTYPED = 'AdaCons(momentum="high")\n'


def run(*command: str | Path, cwd: Path = OUT, fails: bool = False) -> str:
    """Return what a command prints, or raise an error if the command does not end as expected."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"PYTHONNOUSERSITE": "1", "OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    if (done.returncode != 0) != fails:
        raise SystemExit(f"FAILED: {' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return (done.stdout + done.stderr).strip()


def say(what: str) -> None:
    print(f"ok  {what}", flush=True)


def need(condition: bool, what: str) -> None:
    if not condition:
        raise SystemExit(f"FAILED: {what}")


def environment(name: str, *packages: str | Path) -> Path:
    """A new virtual environment with these packages; returns the folder of its programs."""
    folder = OUT / name
    run(sys.executable, "-m", "venv", folder)
    if packages:
        run(folder / "bin" / "python", "-m", "pip", "install", "-q", *packages)
    return folder / "bin"


def build() -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it."""
    tools = environment("tools")
    run(tools / "python", "-m", "pip", "install", "-q", "pip==26.3")
    run(tools / "python", "-m", "pip", "install", "-q", "--no-deps", "--group", f"{ROOT / 'pyproject.toml'}:release")
    # From a copy: setuptools writes beside the sources.
    source = OUT / "source"
    files = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    for name in files:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    run(tools / "python", "-m", "build", "--outdir", OUT / "dist", source)
    (sdist,), (wheel,) = (OUT / "dist").glob("*.tar.gz"), (OUT / "dist").glob("*.whl")
    say(f"built {sdist.name} ({sdist.stat().st_size >> 10} KiB) and {wheel.name} ({wheel.stat().st_size >> 10} KiB)")
    run(tools / "twine", "check", "--strict", sdist, wheel)
    say("twine check --strict: metadata valid, long description renders")
    return sdist, wheel


def check_contents(sdist: Path, wheel: Path) -> list[Requirement]:
    """Check what is in the archives and what is not; return the requirements of the extras."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (described,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        text = archive.read(described)
    tops = {name.split("/")[0].split("-")[0] for name in names}
    need(tops == {"adacons_hvd"}, f"the wheel holds {tops}")
    need(not [name for name in names if "test" in name.lower().split("/")[-1]], "the wheel holds tests")
    need("adacons_hvd/py.typed" in names, "the wheel has no py.typed")
    need(any(name.endswith(".patch") for name in names), "the wheel has no patches for Horovod")
    need(any(name.endswith("licenses/LICENSE") for name in names), "the wheel has no licence")
    say(f"wheel: {len(names)} files, all of adacons_hvd; py.typed, patches and LICENSE among them, no tests")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "pyproject.toml"}
    need(wanted <= held, f"the sdist lacks {sorted(wanted - held)}")
    say(f"sdist: {len(held)} files, {', '.join(sorted(wanted))} among them")
    metadata = Metadata.from_email(text, validate=True)
    need(metadata.license_expression == "Apache-2.0", "the licence is not stated")
    need(str(metadata.version) == version(), f"the wheel is of version {metadata.version}")
    requirements = [Requirement(line) for line in email.message_from_bytes(text).get_all("Requires-Dist", [])]
    need(all("extra ==" in str(each.marker) for each in requirements), "the package requires something")
    extras = sorted(metadata.provides_extra or [])
    say(f"metadata: version {metadata.version}, {metadata.license_expression}, extras {', '.join(extras)}")
    return requirements


def check_extras(requirements: Iterable[Requirement]) -> None:
    """Every extra takes the releases that are tested, where there are such."""
    tested: dict[str, str] = {}
    for group in PROJECT["dependency-groups"].values():
        for line in group:
            if isinstance(line, str):
                pin = Requirement(line)
                tested[canonicalize_name(pin.name)] = next(iter(pin.specifier)).version
    # TensorFlow for CPUs is a distribution of its own.
    tested["tensorflow"] = tested["tensorflow-cpu"]
    shown = []
    for each in requirements:
        release = tested.get(canonicalize_name(each.name))
        if release is not None:
            need(each.specifier.contains(release), f"{each} leaves out {release}, which is what the tests run with")
            shown.append(f"{each.name} {release}")
    say(f"extras take what is tested: {', '.join(sorted(set(shown)))}")


def version() -> str:
    """The version, as the package says it."""
    return run(sys.executable, "-c", "import adacons_hvd; print(adacons_hvd.__version__)", cwd=ROOT)


def check_installed(archive: Path) -> None:
    """In an environment with nothing else, the package imports and its commands run."""
    programs = environment(f"empty-{'wheel' if archive.suffix == '.whl' else 'sdist'}", archive)
    script = "import sys, adacons_hvd; print(adacons_hvd.AdaCons(), 'torch' in sys.modules)"
    printed = run(programs / "python", "-c", script)
    need(printed.endswith("nonfinite='propagate') False"), printed)
    told = run(programs / "adacons", "--version")
    need(told == f"adacons_hvd {version()}", told)
    run(programs / "python", "-m", "adacons_hvd.horovod_build", "--help")
    say(f"{archive.name} in an empty environment: imports; adacons --version: {told}")


def check_command(wheel: Path) -> None:
    """With the extra ``cli`` the command shows tables."""
    programs = environment("cli", f"{wheel}[cli]")
    said = run(programs / "adacons", "doctor", "--json", "--no-live")
    need("torch" in said, said)
    say("extra cli: adacons doctor runs without any framework, and says so")


def check_training(wheel: Path) -> None:
    """With PyTorch at hand, two processes train with the installed package."""
    programs = environment("torch", wheel)
    # The project's own environment comes after the one with the wheel, so only the rest is taken from it.
    (site,) = (OUT / "torch" / "lib").glob("python*/site-packages")
    (site / "rest.pth").write_text(
        f"{Path(sys.prefix) / 'lib' / site.parent.name / 'site-packages'}\n", encoding="utf-8"
    )
    (OUT / "job.py").write_text(JOB, encoding="utf-8")
    torchrun: list[str | Path] = [programs / "python", "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--local-addr", "localhost"]
    printed = run(*torchrun, "--nproc-per-node", "2", OUT / "job.py")
    lines = [line for line in printed.splitlines() if " from " in line]
    need([line.split()[0] for line in lines] == ["ddp", "fsdp"], printed)
    need(all(str(site) in line for line in lines), printed)
    for line in lines:
        say(f"two processes: {line.replace(str(site), '...')}")


def check_types(wheel: Path) -> None:
    """A user's mypy sees the package's types."""
    programs = environment("typed", wheel)
    (OUT / "user.py").write_text(TYPED, encoding="utf-8")
    (OUT / "wrong.py").write_text(TYPED + MISTYPED, encoding="utf-8")
    mypy: Sequence[str | Path] = [
        Path(sys.executable).with_name("mypy"),
        "--config-file=",
        "--strict",
        "--python-executable",
        programs / "python",
    ]
    told = run(*mypy, "user.py")
    wrong = run(*mypy, "wrong.py", fails=True)
    need('has incompatible type "str"; expected "float"' in wrong, wrong)
    say(f"a user's mypy --strict: {told}; a wrong argument is found")


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    sdist, wheel = build()
    check_extras(check_contents(sdist, wheel))
    check_installed(sdist)
    check_installed(wheel)
    check_command(wheel)
    check_training(wheel)
    check_types(wheel)
    print(f"adacons_hvd {version()} can be released: {OUT / 'dist'}")


if __name__ == "__main__":
    main()
