"""CUDA and NCCL for a GPU build: found in the usual places or in pip's packages, of the versions the framework has.

pip's `nvidia-*` packages hold all that the compiler needs from CUDA 13 on, but not under the names that CMake asks for
(`libcudart.so`, `libnccl.so`, `lib64`). The build makes those as links in a folder of its own and changes no package.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from .frameworks import FRAMEWORKS, framework_version

# pip's packages of CUDA's compiler, all of one minor version: a newer nvvm makes PTX that an older ptxas refuses.
COMPILER_PACKAGES = ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-cccl")
# Headers and library of the runtime; PyTorch's CUDA builds bring it themselves.
RUNTIME_PACKAGE = "nvidia-cuda-runtime"
# Up to CUDA 12 pip's packages leave out nvcc itself.
FIRST_PIP_CUDA = 13
# Below which the system's toolkits are looked for.
_ROOT = Path("/")
_TITLES = {"torch": "PyTorch", "tensorflow": "TensorFlow"}


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: the folder that holds bin/nvcc, and its version as (major, minor)."""

    home: Path
    version: tuple[int, int]

    @property
    def from_pip(self) -> bool:
        """Whether pip's packages brought it."""
        return self.home.parent.name == "nvidia" and self.home.parent.parent in _site_folders()


@dataclass(frozen=True)
class Nccl:
    """NCCL: the folder of nccl.h, the library to link, and the version that the header states."""

    include: Path
    library: Path
    version: str


@dataclass(frozen=True)
class Problem:
    """A sentence about CUDA or NCCL not being there as needed, and the packages of pip's that would help."""

    sentence: str
    pip: tuple[str, ...] = ()


def framework_cuda(framework: str) -> tuple[int, int] | None:
    """The CUDA version that the installed framework was built for, read from its files; None for a build without."""
    patterns = {
        "torch": ("version.py", r"^cuda\b[^=\n]*=\s*['\"](\d+)\.(\d+)"),
        "tensorflow": ("python/platform/build_info.py", r"['\"]cuda_version['\"],\s*['\"](\d+)\.(\d+)"),
    }
    name, pattern = patterns[framework]
    spec = util.find_spec(framework)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        try:
            text = (Path(folder) / name).read_text()
        except OSError:
            continue
        if found := re.search(pattern, text, re.MULTILINE):
            return int(found[1]), int(found[2])
    return None


def problems(frameworks: tuple[str, ...]) -> Iterator[Problem]:
    """Everything about CUDA and NCCL that keeps a GPU build for these frameworks from starting."""
    wanted = {name: framework_cuda(name) for name in FRAMEWORKS if name in frameworks}
    for name, version in wanted.items():
        if version is None:
            yield Problem(
                f"{_TITLES[name]} {framework_version(name)} is a build without CUDA: install one with CUDA, or leave "
                "out --nccl."
            )
    known = {name: version for name, version in wanted.items() if version}
    if len(known) < len(wanted) or not known:
        return
    if len({version[0] for version in known.values()}) > 1:
        built = " and ".join(f"{_TITLES[name]} for CUDA {_dotted(version)}" for name, version in known.items())
        yield Problem(
            f"The frameworks here were built for different CUDAs, {built}, and one Horovod has one: name one framework "
            "with --frameworks."
        )
        return
    name, version = next(iter(known.items()))
    yield from _toolkit_problems(name, version)
    yield from _nccl_problems(name, version)


def find_toolkit(version: tuple[int, int] | None) -> Toolkit | None:
    """The complete toolkit to compile with: of exactly `version` where there is one, else of its major version.

    pip's packages have to be of exactly that version, because the framework's own packages are their other half.
    """
    if version is None:
        return None
    usable = [found for found in _toolkits() if found.version[0] == version[0] and not _absent(found, version)]
    return next((found for found in usable if found.version == version), next(iter(usable), None))


def find_nccl() -> Nccl | None:
    """NCCL by the user's settings, else the one in pip's packages, which the framework loads, else the system's."""
    return next(_nccls(), None)


def versions(frameworks: tuple[str, ...], nccl: bool) -> dict[str, str]:
    """The parts of this that a build uses, for the key of its wheel."""
    toolkit = find_toolkit(common_version(frameworks))
    found = {"cuda": _line_with("release", toolkit.home / "bin" / "nvcc") if toolkit else "none"}
    if nccl:
        library = find_nccl()
        found["nccl"] = library.version if library else "none"
    return found


def common_version(frameworks: tuple[str, ...]) -> tuple[int, int] | None:
    """The CUDA that all the frameworks were built for; None where one has none or another."""
    wanted = {framework_cuda(name) for name in frameworks}
    return wanted.pop() if len(wanted) == 1 else None


def settings(frameworks: tuple[str, ...], folder: Path, nccl: bool) -> dict[str, str]:
    """Makes the links below `folder` and returns the settings that lead Horovod's build to CUDA, and to NCCL if asked.

    Without `nccl`, CUDA serves to take GPU tensors through the host, and where there is none, the build has no CUDA.
    """
    toolkit = find_toolkit(common_version(frameworks))
    if toolkit is None:
        return {"HOROVOD_WITHOUT_CUDA": "1"}
    home = toolkit.home if (toolkit.home / "lib64" / "libcudart.so").exists() else linked_toolkit(toolkit, folder)
    found = {
        "HOROVOD_CUDA_HOME": str(home),
        # Where PyTorch, asked by Horovod's build for its libraries, looks for CUDA's.
        "CUDA_HOME": str(home),
        # Horovod's build asks the first nvcc on PATH which GPU architectures there are.
        "PATH": os.pathsep.join([str(home / "bin"), os.environ.get("PATH", "")]),
    }
    if nccl and (library := find_nccl()):
        linked = folder / "nccl"
        (linked / "lib").mkdir(parents=True)
        (linked / "include").symlink_to(library.include)
        static = library.library.suffix == ".a"
        (linked / "lib" / ("libnccl_static.a" if static else "libnccl.so")).symlink_to(library.library)
        found |= {"HOROVOD_NCCL_HOME": str(linked), "HOROVOD_NCCL_LINK": "static" if static else "shared"}
        found |= {"HOROVOD_NCCL_INCLUDE": str(linked / "include"), "HOROVOD_NCCL_LIB": str(linked / "lib")}
    return found


def linked_toolkit(toolkit: Toolkit, folder: Path) -> Path:
    """A folder like an installed toolkit's, made of links to one that lacks `lib64` and unversioned libraries."""
    home = folder / "cuda"
    (home / "lib").mkdir(parents=True)
    # One by one: nvcc finds its other programs beside the path by which it was called.
    (home / "bin").mkdir()
    for program in (toolkit.home / "bin").iterdir():
        (home / "bin" / program.name).symlink_to(program)
    for part in ("include", "nvvm"):
        (home / part).symlink_to(toolkit.home / part)
    for library in (toolkit.home / "lib").iterdir():
        (home / "lib" / library.name).symlink_to(library)
        plain, found, _ = library.name.partition(".so.")
        if found and not (toolkit.home / "lib" / f"{plain}.so").exists():
            (home / "lib" / f"{plain}.so").symlink_to(library)
    (home / "lib64").symlink_to("lib")
    return home


# ---- what is missing -----------------------------------------------------------------------------------------------


def _toolkit_problems(name: str, version: tuple[int, int]) -> Iterator[Problem]:
    if find_toolkit(version) is not None:
        return
    built = f"{_TITLES[name]} {framework_version(name)} was built for CUDA {_dotted(version)}"
    others = " and ".join(f"{found.home} has CUDA {_dotted(found.version)}" for found in _toolkits())
    here = others or "no CUDA compiler (nvcc) was found"
    if chosen := os.environ.get("HOROVOD_CUDA_HOME"):
        yield Problem(
            f"{built}, and {others or f'there is no nvcc in {chosen}/bin'}: set HOROVOD_CUDA_HOME to a toolkit of "
            f"CUDA {_dotted(version)}, or unset it."
        )
    elif version[0] < FIRST_PIP_CUDA:
        yield Problem(
            f"{built}, and {here}: install NVIDIA's toolkit for CUDA {_dotted(version)}, because pip's packages have "
            f"no nvcc before CUDA {FIRST_PIP_CUDA}, and set HOROVOD_CUDA_HOME to its folder."
        )
    else:
        yield Problem(
            f"{built}, and {here}: pip's packages have what is missing.",
            pip=tuple(f"{package}=={_dotted(version)}.*" for package in _absent_packages(version)),
        )


def _nccl_problems(name: str, version: tuple[int, int]) -> Iterator[Problem]:
    if find_nccl() is not None:
        return
    package = f"nvidia-nccl-cu{version[0]}"
    chosen = os.environ.get("HOROVOD_NCCL_HOME") or os.environ.get("HOROVOD_NCCL_INCLUDE")
    where = f"not where HOROVOD_NCCL_HOME or HOROVOD_NCCL_INCLUDE says ({chosen})" if chosen else "nowhere here"
    yield Problem(
        f"NCCL (nccl.h and libnccl.so) is {where}: install it, or set HOROVOD_NCCL_HOME to its folder.",
        pip=() if chosen else (_required(name, package),),
    )


def _required(framework: str, package: str) -> str:
    """`package` with the version that the framework itself asks for, if it asks for one."""
    for distribution in FRAMEWORKS[framework]:
        try:
            requirements = metadata.requires(distribution) or []
        except metadata.PackageNotFoundError:
            continue
        for requirement in requirements:
            if found := re.match(rf"{package}\s*\(?(==\s*[\w.]+)", requirement):
                return package + found[1].replace(" ", "")
    return package


# ---- where things are ----------------------------------------------------------------------------------------------


def _absent(toolkit: Toolkit, version: tuple[int, int]) -> bool:
    """Whether a toolkit lacks what a build for a framework of CUDA `version` needs."""
    if toolkit.from_pip:
        return bool(_absent_packages(version))
    # A script named nvcc that only calls one elsewhere has no headers beside it.
    return not (toolkit.home / "include" / "cuda_runtime.h").is_file()


def _absent_packages(version: tuple[int, int]) -> list[str]:
    wanted = f"{_dotted(version)}."
    return [
        package
        for package in (*COMPILER_PACKAGES, RUNTIME_PACKAGE)
        if not f"{_distribution(package) or ''}.".startswith(wanted)
    ]


def _toolkits() -> Iterator[Toolkit]:
    """Every toolkit here whose nvcc answers, most likely first; the user's own choice excludes all others."""
    if chosen := os.environ.get("HOROVOD_CUDA_HOME"):
        homes = [Path(chosen)]
    else:
        named = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
        on_path = shutil.which("nvcc")
        homes = [Path(name) for name in named]
        homes += [home for site in _site_folders() for home in sorted(site.glob("nvidia/cu*"), reverse=True)]
        homes += [Path(on_path).resolve().parent.parent] if on_path else []
        local = _ROOT / "usr" / "local"
        homes += [local / "cuda", *sorted(local.glob("cuda-*"), reverse=True), _ROOT / "opt" / "cuda"]
    for home in dict.fromkeys(homes):
        said = _line_with("release", home / "bin" / "nvcc")
        if found := re.search(r"release (\d+)\.(\d+)", said):
            yield Toolkit(home, (int(found[1]), int(found[2])))


def _nccls() -> Iterator[Nccl]:
    home, include, lib = (os.environ.get(f"HOROVOD_NCCL_{part}") for part in ("HOME", "INCLUDE", "LIB"))
    if home or include or lib:
        base = Path(home) if home else _ROOT / "usr"
        places = [(Path(include) if include else base / "include", [Path(lib)] if lib else _lib_folders(base))]
    else:
        prefixes = [site / "nvidia" / "nccl" for site in _site_folders()]
        prefixes += [Path(os.environ["CONDA_PREFIX"])] if os.environ.get("CONDA_PREFIX") else []
        prefixes += [_ROOT / "usr", _ROOT / "usr" / "local", _ROOT / "usr" / "local" / "cuda"]
        places = [(prefix / "include", _lib_folders(prefix)) for prefix in prefixes]
    for headers, folders in places:
        version = _nccl_version(headers / "nccl.h")
        names = ("libnccl.so.2", "libnccl.so", "libnccl_static.a")
        library = next((folder / name for folder in folders for name in names if (folder / name).exists()), None)
        if version and library:
            yield Nccl(headers, library, version)


def _lib_folders(prefix: Path) -> list[Path]:
    multiarch = sysconfig.get_config_var("MULTIARCH") or "x86_64-linux-gnu"
    return [prefix / "lib", prefix / "lib64", prefix / "lib" / multiarch]


def _nccl_version(header: Path) -> str | None:
    try:
        text = header.read_text(errors="replace")
    except OSError:
        return None
    parts = [re.search(rf"#define\s+NCCL_{part}\s+(\d+)", text) for part in ("MAJOR", "MINOR", "PATCH")]
    return ".".join(part[1] if part else "0" for part in parts)


def _site_folders() -> list[Path]:
    return [Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")]


def _line_with(word: str, program: Path) -> str:
    """The line of a program's `--version` that holds a word; empty if it does not run."""
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return next((line.strip() for line in done.stdout.splitlines() if word in line), "")


def _distribution(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
