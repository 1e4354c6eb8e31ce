"""The build of Horovod: everything about it but the five minutes of compiling."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import harness
import pytest

from adacons_hvd.horovod_build import __main__ as command
from adacons_hvd.horovod_build import (
    compiling,
    cuda,
    frameworks,
    matrix,
    prerequisites,
    processes,
    proof,
    recipe,
    source,
    standards,
)
from adacons_hvd.horovod_build.cache import WheelCache, default_root
from adacons_hvd.horovod_build.errors import BuildError
from adacons_hvd.horovod_build.recipe import Recipe

TOOLS = {"c++": "g++", "cmake": "cmake", "make": "make", "patch": "patch", "mpicxx": "libopenmpi-dev"}
TOOLS |= {"mpirun": "openmpi-bin"}


def run_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "adacons_hvd.horovod_build", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# ---- prerequisites -------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder for PATH that holds the programs a build needs and nothing that could stand in for them."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for program in (*TOOLS, "as", "ld", "sh", "bash", "g++", "gcc", "ssh"):
        real = shutil.which(program)
        if real is None and program in TOOLS:
            pytest.skip(f"{program} is not installed here")
        if real is not None:
            (folder / program).symlink_to(Path(real).resolve() if program in ("c++", "g++") else real)
    return folder


def test_a_machine_with_all_tools_lacks_nothing(machine: Path, tmp_path: Path) -> None:
    done = run_command("--check", PATH=str(machine), ADACONS_CACHE=str(tmp_path), CXX="")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("tool", sorted(TOOLS))
def test_a_missing_tool_is_named(tool: str, machine: Path, tmp_path: Path) -> None:
    for name in [tool, "g++", "gcc"] if tool == "c++" else [tool]:
        (machine / name).unlink(missing_ok=True)
    done = run_command("--check", PATH=str(machine), ADACONS_CACHE=str(tmp_path), CXX="")
    assert done.returncode == 1
    assert f"apt-get install --no-install-recommends {TOOLS[tool]}\n" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_gloo_only_needs_no_mpi(machine: Path, tmp_path: Path) -> None:
    (machine / "mpicxx").unlink()
    (machine / "mpirun").unlink()
    done = run_command("--check", "--gloo-only", PATH=str(machine), ADACONS_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "over gloo" in done.stdout


def test_a_compiler_that_cannot_compile_is_no_compiler(machine: Path, tmp_path: Path) -> None:
    (machine / "c++").unlink()
    (machine / "c++").write_text("#!/bin/sh\nexit 1\n")
    (machine / "c++").chmod(0o755)
    done = run_command("--check", PATH=str(machine), ADACONS_CACHE=str(tmp_path), CXX="")
    assert done.returncode == 1
    assert "No C++17 compiler" in done.stderr


def test_everything_missing_is_reported_at_once(tmp_path: Path) -> None:
    done = run_command("--check", PATH=str(tmp_path), ADACONS_CACHE=str(tmp_path), CXX="")
    assert done.returncode == 1
    line = next(line for line in done.stderr.splitlines() if "apt-get" in line)
    assert set(TOOLS.values()) <= set(line.split())
    assert "Traceback" not in done.stderr


def test_a_framework_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(prerequisites, "installed_frameworks", lambda: ("torch",))
    found = prerequisites.describe(list(prerequisites.find_missing(Recipe(("torch", "tensorflow")), tmp_path)))
    assert "A build for tensorflow was asked for, and tensorflow is not installed here." in found
    assert f"{sys.executable} -m pip install 'tensorflow'" in found


def test_no_framework_at_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "installed_frameworks", lambda: ())
    assert command.main(["--cache-dir", str(tmp_path)]) == 1
    assert "Neither PyTorch nor TensorFlow is installed" in capsys.readouterr().err


def test_a_setuptools_that_is_too_new(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = prerequisites._version
    monkeypatch.setattr(prerequisites, "_version", lambda name: "81.0.0" if name == "setuptools" else real(name))
    found = prerequisites.describe(list(prerequisites.find_missing(Recipe(("torch",)), tmp_path)))
    assert "needs setuptools below 80; here is setuptools 81.0.0" in found
    assert "'setuptools<80'" in found


def test_unknown_frameworks_are_refused() -> None:
    done = run_command("--frameworks", "torch,mxnet")
    assert done.returncode == 2
    assert "not a list of torch, tensorflow" in done.stderr


# ---- C++ standards -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("condition", "expected"), [("201703L", 17), ("202002L", 20), ("202302L", 23), (None, 17)])
def test_the_headers_say_which_standard_they_need(condition: str | None, expected: int, tmp_path: Path) -> None:
    (tmp_path / "ATen").mkdir()
    text = f"#if !defined(_MSC_VER) && __cplusplus < {condition}\n#error newer, please\n#endif\n"
    (tmp_path / "ATen" / "ATen.h").write_text(text if condition else "#pragma once\n")
    assert standards.stated("torch", tmp_path) == expected


def test_headers_that_say_nothing_are_compiled(tmp_path: Path) -> None:
    header = tmp_path / "c10" / "util" / "intrusive_ptr.h"
    header.parent.mkdir(parents=True)
    header.write_text("#include <compare>\ninline std::strong_ordering f() { return 1 <=> 2; }\n")
    assert standards.cxx_standard("torch", tmp_path) == 20
    header.write_text("static_assert(false);\n")
    with pytest.raises(BuildError, match="cannot compile the headers of torch") as failed:
        standards.cxx_standard("torch", tmp_path)
    assert "intrusive_ptr.h:1" in str(failed.value)


def test_a_compiler_that_is_too_old_for_the_framework(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    old = tmp_path / "c++"
    old.write_text(
        '#!/bin/sh\ncase "$*" in *c++20*) echo "unrecognized option -std=c++20" >&2; exit 1;; esac\nexec c++ "$@"\n'
    )
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    monkeypatch.setattr(standards, "stated", lambda framework: 20)
    found = prerequisites.describe(list(prerequisites.find_missing(Recipe(("torch",)), tmp_path)))
    assert "need C++20" in found
    assert "install a newer compiler" in found


def test_a_newer_framework_is_named_and_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standards, "framework_version", lambda name: "2.99.0+cu140")
    (sentence,) = standards.untried(("torch",))
    assert sentence.startswith("torch 2.99.0+cu140 is newer than any")
    monkeypatch.setattr(standards, "framework_version", lambda name: "2.13.0")
    assert standards.untried(("torch", "tensorflow")) == []


# ---- CUDA and NCCL -------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with PyTorch for CUDA 13.0 and nothing else: toolkits go to usr/local, pip's packages to site."""
    for name in ("HOROVOD_CUDA_HOME", "CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX", "HOROVOD_NCCL_HOME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(cuda, "_ROOT", tmp_path)
    monkeypatch.setattr(cuda, "_site_folders", lambda: [tmp_path / "site"])
    monkeypatch.setattr(cuda, "framework_cuda", lambda framework: (13, 0))
    monkeypatch.setattr(cuda, "framework_version", lambda framework: "2.14.1")
    monkeypatch.setattr(cuda, "_distribution", lambda package: None)
    monkeypatch.setattr(cuda.metadata, "requires", lambda name: ["sympy", "nvidia-nccl-cu13==2.30.7; extra"])
    return tmp_path


def add_toolkit(home: Path, release: str) -> None:
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "nvcc").write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
    (home / "bin" / "nvcc").chmod(0o755)
    for folder in ("include", "nvvm", "lib"):
        (home / folder).mkdir()
    (home / "include" / "cuda_runtime.h").write_text("")
    (home / "lib" / "libcudart.so.13").write_text("")


def add_nccl(prefix: Path, version: str = "2.30.7") -> None:
    (prefix / "include").mkdir(parents=True)
    (prefix / "lib").mkdir(exist_ok=True)
    names = zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True)
    (prefix / "include" / "nccl.h").write_text("".join(f"#define NCCL_{name} {value}\n" for name, value in names))
    (prefix / "lib" / "libnccl.so.2").write_text("")


def said(*frameworks: str) -> tuple[str, list[str]]:
    found = list(cuda.problems(frameworks or ("torch",)))
    return "\n".join(problem.sentence for problem in found), [name for problem in found for name in problem.pip]


def test_no_cuda_and_no_nccl_name_the_packages_of_exactly_the_frameworks_versions(gpu_machine: Path) -> None:
    sentences, packages = said()
    assert "PyTorch 2.14.1 was built for CUDA 13.0, and no CUDA compiler (nvcc) was found" in sentences
    assert "NCCL (nccl.h and libnccl.so) is nowhere here" in sentences
    toolkit = [f"{name}==13.0.*" for name in (*cuda.COMPILER_PACKAGES, "nvidia-cuda-runtime")]
    assert packages == [*toolkit, "nvidia-nccl-cu13==2.30.7"]


def test_a_toolkit_of_the_system_and_nccl_of_pip_are_found_and_linked(gpu_machine: Path) -> None:
    add_toolkit(gpu_machine / "usr" / "local" / "cuda-13.0", "13.0")
    add_nccl(gpu_machine / "site" / "nvidia" / "nccl")
    assert said() == ("", [])
    settings = cuda.settings(("torch",), gpu_machine / "work", nccl=True)
    home, nccl = Path(settings["HOROVOD_CUDA_HOME"]), Path(settings["HOROVOD_NCCL_LIB"])
    assert (home / "lib64" / "libcudart.so").exists()
    assert (home / "bin" / "nvcc").exists()
    assert (nccl / "libnccl.so").resolve() == gpu_machine / "site" / "nvidia" / "nccl" / "lib" / "libnccl.so.2"
    assert settings["HOROVOD_NCCL_LINK"] == "shared"
    assert settings["PATH"].split(os.pathsep)[0] == str(home / "bin")


def test_cuda_of_another_version(gpu_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = gpu_machine / "usr" / "local" / "cuda-12.4"
    add_toolkit(other, "12.4")
    add_nccl(gpu_machine / "usr")
    sentences, packages = said()
    assert f"was built for CUDA 13.0, and {other} has CUDA 12.4" in sentences
    assert "nvidia-cuda-nvcc==13.0.*" in packages
    # Without --nccl the build leaves CUDA out rather than take the wrong one.
    assert cuda.settings(("torch",), gpu_machine / "work", nccl=False) == {"HOROVOD_WITHOUT_CUDA": "1"}

    monkeypatch.setenv("HOROVOD_CUDA_HOME", str(other))
    sentences, packages = said()
    assert "set HOROVOD_CUDA_HOME to a toolkit of CUDA 13.0, or unset it" in sentences
    assert packages == []

    monkeypatch.delenv("HOROVOD_CUDA_HOME")
    monkeypatch.setattr(cuda, "framework_cuda", lambda framework: (12, 8))
    sentences, packages = said()
    # The toolkit there is of the same major version, which is enough for one of the system's.
    assert sentences == ""
    shutil.rmtree(other)
    sentences, packages = said()
    assert "pip's packages have no nvcc before CUDA 13" in sentences
    assert packages == []


def test_pips_packages_have_to_be_of_one_version(gpu_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_toolkit(gpu_machine / "site" / "nvidia" / "cu13", "13.0")
    add_nccl(gpu_machine / "site" / "nvidia" / "nccl")
    monkeypatch.setattr(cuda, "_distribution", lambda package: "13.5.37" if package == "nvidia-nvvm" else "13.0.88")
    assert said()[1] == ["nvidia-nvvm==13.0.*"]
    monkeypatch.setattr(cuda, "_distribution", lambda package: "13.0.88")
    assert said() == ("", [])


def test_frameworks_of_different_cudas_are_refused(gpu_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "framework_cuda", lambda name: {"torch": (13, 0), "tensorflow": (12, 5)}[name])
    sentences, _ = said("torch", "tensorflow")
    assert "PyTorch for CUDA 13.0 and TensorFlow for CUDA 12.5" in sentences
    assert "--frameworks" in sentences


def test_a_framework_without_cuda_is_refused(gpu_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "framework_cuda", lambda framework: None)
    assert "PyTorch 2.14.1 is a build without CUDA" in said()[0]


def test_the_frameworks_cuda_is_read_from_their_files() -> None:
    installed = frameworks.framework_version("torch")
    assert (cuda.framework_cuda("torch") is None) == ("+cpu" in installed)
    assert cuda.framework_cuda("tensorflow") is None or "cpu" not in installed


# ---- disk ----------------------------------------------------------------------------------------------------------


def test_too_little_disk_is_seen_before_anything_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = shutil._ntuple_diskusage(10**9, 9 * 10**8, 10**8)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    sentences = [item.sentence for item in prerequisites.find_missing(Recipe(("torch",)), tmp_path)]
    assert any("0.1 GB free" in sentence and "ADACONS_CACHE" in sentence for sentence in sentences)


@pytest.mark.parametrize("said", ["fatal error: error writing to /x: No space left on device", "Disk quota exceeded"])
def test_a_disk_that_fills_up_under_the_compiler(said: str, tmp_path: Path) -> None:
    error = compiling.explain(f"[ 40%] Building\n{said}\nmake: *** Error 1", 2, tmp_path, tmp_path / "log")
    assert "is full" in str(error)
    assert "ADACONS_CACHE" in str(error)


def test_a_disk_that_fills_up_under_this_program(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prerequisites, "check", lambda *_: None)
    monkeypatch.setattr(source, "fetch", refuse)
    assert command.main(["--cache-dir", str(tmp_path), "--force"]) == 1
    assert "is full: free about" in capsys.readouterr().err
    assert list((tmp_path / "work").iterdir()) == []
    assert list((tmp_path / "wheels").iterdir()) == []


def test_a_folder_that_cannot_be_a_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert command.main(["--cache-dir", str(tmp_path / "file")]) == 1
    assert "cannot be written" in capsys.readouterr().err


# ---- the release and its patches -----------------------------------------------------------------------------------


def test_every_patch_says_why_it_is_needed_and_for_which_versions() -> None:
    assert len(recipe.patches()) >= 3
    for patch in recipe.patches():
        heading = patch.read_text().split("--- a/")[0]
        assert all(word in heading for word in ("Why:", "Needs:", "Seen:")), patch.name


def unpatched(patch: Path, tree: Path) -> None:
    """Writes, below `tree`, files in which the patch's context stands exactly where it says."""
    for part in patch.read_text().split("--- a/")[1:]:
        name, _, *hunks = part.splitlines()
        lines: list[str] = []
        for line in hunks:
            if line.startswith("@@ -"):
                start = int(line.removeprefix("@@ -").split(",")[0])
                lines += ["unrelated"] * (start - 1 - len(lines))
            elif line[:1] in (" ", "-"):
                lines.append(line[1:])
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([*lines, "unrelated"]) + "\n")


@pytest.mark.parametrize("patch", recipe.patches(), ids=lambda patch: patch.stem)
def test_a_patch_applies_exactly_or_not_at_all(patch: Path, tmp_path: Path) -> None:
    unpatched(patch, tmp_path)
    source.apply(patch, tmp_path)
    with pytest.raises(BuildError, match=f"{patch.name} does not fit"):
        source.apply(patch, tmp_path)

    unpatched(patch, tmp_path)
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        path.write_text("one line more\n" + path.read_text())
    with pytest.raises(BuildError, match="does not fit"):
        source.apply(patch, tmp_path)

    unpatched(patch, tmp_path)
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        lines = path.read_text().splitlines()
        path.write_text("\n".join([*lines[:-2], lines[-2] + " changed", lines[-1]]) + "\n")
    with pytest.raises(BuildError, match="does not fit"):
        source.apply(patch, tmp_path)


def tampered(folder: Path) -> Path:
    """An archive with the release's name whose setup.py would leave a trace if anything ran it."""
    archive = folder / recipe.SDIST_NAME
    top = recipe.SDIST_NAME.removesuffix(".tar.gz")
    script = f"open({str(folder / 'ran')!r}, 'w').close()\nfrom setuptools import setup\nsetup(name='horovod')\n"
    with tarfile.open(archive, "w:gz") as contents:
        for name, text in {"setup.py": script, "PKG-INFO": "Name: horovod\nVersion: 0.28.1\n"}.items():
            entry = tarfile.TarInfo(f"{top}/{name}")
            entry.size = len(text)
            contents.addfile(entry, io.BytesIO(text.encode()))
    return archive


def test_an_unknown_archive_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    archive = tampered(tmp_path)
    with pytest.raises(BuildError, match=r"is not Horovod's 0\.28\.1 release"):
        source.unpack(archive, tmp_path / "tree")
    assert not (tmp_path / "tree").exists()


def test_an_index_that_serves_another_archive_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tampered(tmp_path)
    for name in ("scratch", "sdist"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(BuildError, match=r"another horovod-0\.28\.1\.tar\.gz"):
        source.fetch(tmp_path / "sdist", tmp_path / "scratch")
    assert not (tmp_path / "ran").exists()
    assert list((tmp_path / "sdist").iterdir()) == []


def test_offline_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # A port nobody listens on: refused at once, as on a machine without a way out.
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    for name in ("scratch", "sdist"):
        (tmp_path / name).mkdir()
    with pytest.raises(BuildError, match="Is this machine offline"):
        source.fetch(tmp_path / "sdist", tmp_path / "scratch")


def test_a_damaged_download_in_the_cache_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / recipe.SDIST_NAME).write_bytes(b"half")
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(BuildError, match="could not be downloaded"):
        source.fetch(tmp_path, tmp_path / "scratch")


# ---- what names a build --------------------------------------------------------------------------------------------


def test_the_key_follows_everything_that_reaches_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "framework_version", lambda name: "1.0")
    keys = {Recipe(names).key() for names in (("torch",), ("tensorflow",), ("torch", "tensorflow"))}
    keys.add(Recipe(("torch",), mpi=False).key())
    keys.add(Recipe(("torch",), nccl=True).key())
    monkeypatch.setattr(recipe, "framework_version", lambda name: "2.0")
    keys.add(Recipe(("torch",)).key())
    monkeypatch.setenv("CXXFLAGS", "-O0")
    keys.add(Recipe(("torch",)).key())
    monkeypatch.setenv("HOROVOD_BUILD_ARCH_FLAGS", "-mavx")
    keys.add(Recipe(("torch",)).key())
    monkeypatch.setattr(recipe, "patches", list)
    keys.add(Recipe(("torch",)).key())
    assert len(keys) == 9


def test_a_jobs_settings_do_not_reach_the_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain = Recipe(("torch",))
    key = plain.key()
    monkeypatch.setenv("HOROVOD_WITHOUT_GLOO", "1")
    monkeypatch.setenv("HOROVOD_FUSION_THRESHOLD", "0")
    assert plain.key() == key
    environment = plain.environment(2, tmp_path)
    assert "HOROVOD_WITHOUT_GLOO" not in environment
    assert "HOROVOD_FUSION_THRESHOLD" not in environment
    assert environment["HOROVOD_WITH_GLOO"] == "1"


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ADACONS_CACHE", str(tmp_path / "chosen"))
    assert default_root() == tmp_path / "chosen"
    monkeypatch.delenv("ADACONS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_root() == tmp_path / "adacons_hvd"


# ---- the cache -----------------------------------------------------------------------------------------------------


def keep(cache: WheelCache, key: str, content: bytes = b"wheel") -> Path:
    with cache.workspace(key) as workspace:
        wheel = workspace / "horovod-0.28.1-any.whl"
        wheel.write_bytes(content)
        return cache.keep(key, wheel, {"python": "3"})


def test_a_kept_wheel_is_found_and_replaced(tmp_path: Path) -> None:
    cache = WheelCache(tmp_path)
    assert cache.find("key") is None
    wheel = keep(cache, "key")
    assert cache.find("key") == wheel
    assert json.loads((wheel.parent / "facts.json").read_text())["facts"] == {"python": "3"}
    assert keep(cache, "key", b"newer") == wheel
    assert wheel.read_bytes() == b"newer"
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize("damage", ["wheel", "facts", "no wheel", "no facts"])
def test_a_damaged_entry_is_dropped_and_can_be_built_again(damage: str, tmp_path: Path) -> None:
    cache = WheelCache(tmp_path)
    wheel = keep(cache, "key")
    victim = wheel if "wheel" in damage else wheel.parent / "facts.json"
    if damage.startswith("no"):
        victim.unlink()
    else:
        victim.write_bytes(b"{")
    assert cache.find("key") is None
    assert not wheel.parent.exists()
    assert cache.find("key") is None
    assert keep(cache, "key") == cache.find("key")


def test_a_wheel_whose_proof_fails_is_kept_apart_and_proven_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled: list[str] = []

    def build_wheel(recipe: Recipe, tree: Path, workspace: Path, *_: object) -> Path:
        compiled.append("once")
        wheel = workspace / "horovod-0.28.1-any.whl"
        wheel.write_bytes(b"wheel")
        return wheel

    def fail(*_: object) -> None:
        raise BuildError("The built Horovod does not work.")

    monkeypatch.setattr(prerequisites, "check", lambda *_: None)
    monkeypatch.setattr(source, "fetch", lambda *_: tmp_path)
    monkeypatch.setattr(source, "unpack", lambda *_: tmp_path)
    monkeypatch.setattr(compiling, "build_wheel", build_wheel)
    monkeypatch.setattr(command, "pip", lambda *_: None)
    monkeypatch.setattr(proof, "prove", fail)
    arguments = ["--cache-dir", str(tmp_path / "cache"), "--wheel-dir", str(tmp_path / "out")]
    assert command.main(arguments) == 1
    message = capsys.readouterr().err
    (kept,) = (tmp_path / "cache" / "unproven").rglob("*.whl")
    assert f"The wheel is kept, but not as one that works: {kept}" in message
    assert list((tmp_path / "cache" / "wheels").iterdir()) == []
    assert not (tmp_path / "out").exists()

    monkeypatch.setattr(proof, "prove", lambda *_: None)
    assert command.main(arguments) == 0
    assert compiled == ["once"]
    assert [path.read_bytes() for path in (tmp_path / "out").iterdir()] == [b"wheel"]
    assert list((tmp_path / "cache" / "unproven").rglob("*.whl")) == []


def test_nothing_of_a_failed_build_stays(tmp_path: Path) -> None:
    cache = WheelCache(tmp_path)
    (tmp_path / "work" / "key-999999").mkdir()

    def fail() -> None:
        with cache.workspace("key") as workspace:
            assert [path.name for path in (tmp_path / "work").iterdir()] == [workspace.name]
            (workspace / "half").write_text("")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list((tmp_path / "work").iterdir()) == []


def test_a_second_builder_waits_for_the_first(tmp_path: Path) -> None:
    cache = WheelCache(tmp_path)
    waited: list[str] = []
    order: list[str] = []

    def second() -> None:
        with cache.lock("key", on_wait=lambda: waited.append("yes")):
            order.append("second")

    with cache.lock("key", on_wait=lambda: waited.append("the first waited")):
        thread = threading.Thread(target=second)
        thread.start()
        while not waited:
            time.sleep(0.01)
        order.append("first")
    thread.join(10)
    assert (waited, order) == (["yes"], ["first", "second"])


def test_the_copied_wheel_is_whole(tmp_path: Path) -> None:
    wheel = tmp_path / "horovod.whl"
    wheel.write_bytes(b"wheel")
    (tmp_path / "there").mkdir()
    assert command.copy_whole(wheel, tmp_path / "there").read_bytes() == b"wheel"
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["horovod.whl"]


# ---- progress, failure, processes ----------------------------------------------------------------------------------


def test_progress_never_steps_back(capsys: pytest.CaptureFixture[str]) -> None:
    progress = compiling.Progress()
    for line in ("-- The CXX compiler", "[  3%] Building", "[ 41%] Building", "[ 40%] Building", "[100%] Linking"):
        progress.show(line)
    shown = [int(line.split("%")[0].split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert shown == sorted(shown)
    assert shown[-1] == 100


# As pip prints it, indented by two: two compilers at once, of which one fails in a header that PyTorch included.
FAILED = """
  [ 41%] Building CXX object third_party/gloo/gloo/CMakeFiles/gloo.dir/transport/tcp/error.cc.o
  cd /b/gloo/gloo && /usr/bin/c++ -O3 -o CMakeFiles/gloo.dir/transport/tcp/error.cc.o -c /b/gloo/error.cc
  [ 44%] Building CXX object horovod/torch/CMakeFiles/pytorch.dir/ready_event.cc.o
  cd /b/horovod/torch && /usr/bin/c++ -std=c++17 -o CMakeFiles/pytorch.dir/ready_event.cc.o -c /b/ready.cc
  cd /b/horovod/torch && /usr/bin/c++ -std=c++17 -o CMakeFiles/pytorch.dir/cuda_util.cc.o -c /b/util.cc
  /b/common.h:12:1: warning: unused variable 'error' [-Wunused-variable]
     12 | int error;
        |     ^~~~~
  In file included from /t/include/torch/extension.h:5,
                   from /b/ready.cc:17:
  /t/include/c10/util/intrusive_ptr.h:775:27: error: 'strong_ordering' in namespace 'std' does not name a type
    775 |   std::strong_ordering operator<=>(const intrusive_ptr& other) const;
        |        ^~~~~~~~~~~~~~~
  /t/include/c10/util/more.h:3:1: error: another one
  make[2]: *** [horovod/torch/build.make:7: horovod/torch/CMakeFiles/pytorch.dir/ready_event.cc.o] Error 1
  make[1]: *** [CMakeFiles/Makefile2:188: horovod/torch/CMakeFiles/pytorch.dir/all] Error 2
  error: subprocess-exited-with-error
"""


def test_a_failed_build_shows_the_first_error_and_its_command(tmp_path: Path) -> None:
    error = str(compiling.explain(FAILED, 2, tmp_path, tmp_path / "the.log"))
    shown = error.splitlines()
    assert shown[:6] == [
        "The build failed. The first error:",
        "",
        "In file included from /t/include/torch/extension.h:5,",
        "                 from /b/ready.cc:17:",
        "/t/include/c10/util/intrusive_ptr.h:775:27: error: 'strong_ordering' in namespace 'std' does not name a type",
        "  775 |   std::strong_ordering operator<=>(const intrusive_ptr& other) const;",
    ]
    assert "cd /b/horovod/torch && /usr/bin/c++ -std=c++17 -o CMakeFiles/pytorch.dir/ready_event.cc.o" in error
    assert "error.cc" not in error
    assert "another one" not in error
    assert str(tmp_path / "the.log") in shown[-1]


@pytest.mark.parametrize(
    "said",
    [
        "CMake Error at CMakeLists.txt:223 (message):",
        "ptxas fatal   : Unsupported .version 9.5; current version is '9.0'",
        "/b/cuda_kernels.cu(81): error: name must be a namespace name",
        "nvcc fatal   : Unsupported gpu architecture 'compute_37'",
        "/usr/bin/ld: x.o: in function `f': x.cc:(.text+0x9): undefined reference to `AsGpuStreamValue'",
        "/usr/bin/ld: cannot find -lnccl: No such file or directory",
        "x.cc:1:10: fatal error: nccl.h: No such file or directory",
    ],
)
def test_every_tool_of_the_build_has_its_own_way_to_say_error(said: str, tmp_path: Path) -> None:
    output = "\n".join(["  -- Found error.h", "  c++ -o error.o -c error.cc", f"  {said}", "  more"])
    assert str(compiling.explain(output, 2, tmp_path, tmp_path / "log")).splitlines()[2] == said


def test_a_build_that_fails_without_an_error_shows_its_end(tmp_path: Path) -> None:
    output = "\n".join(f"line {number}" for number in range(100))
    error = str(compiling.explain(output, 2, tmp_path, tmp_path / "log"))
    assert "line 99" in error
    assert "line 10\n" not in error


def test_a_compiler_killed_for_memory(tmp_path: Path) -> None:
    output = "g++: fatal error: Killed signal terminated program cc1plus"
    assert "--jobs 1" in str(compiling.explain(output, 2, tmp_path, tmp_path / "log"))


def test_a_command_that_hangs_is_stopped_with_all_it_started(tmp_path: Path) -> None:
    # The child leaves its parent's session, as launchers' ranks do, so that no process group holds both.
    child = (
        f"import os, time; os.setsid(); open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    )
    script = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(600)"
    start = time.monotonic()
    finished = processes.run([sys.executable, "-c", script], dict(os.environ), timeout=3)
    assert finished.returncode is None
    assert time.monotonic() - start < 20
    pid = int((tmp_path / "pid").read_text())
    state = Path(f"/proc/{pid}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_command_that_fails_leaves_no_child_behind(tmp_path: Path) -> None:
    child = "import time; time.sleep(600)"
    script = (
        "import os, subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)\n"
        "print('child', child.pid, flush=True)\nos._exit(3)"
    )
    lines: list[str] = []
    finished = processes.run([sys.executable, "-c", script], dict(os.environ), timeout=60, on_line=lines.append)
    assert finished.returncode == 3
    assert lines == finished.output.splitlines()
    state = Path(f"/proc/{lines[0].split()[1]}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


# ---- proof ---------------------------------------------------------------------------------------------------------


def test_what_check_build_lists() -> None:
    text = (
        "Available Frameworks:\n    [X] PyTorch\n    [ ] MXNet\nControllers:\n    [X] MPI\nOperations:\n    [ ] MPI\n"
    )
    assert proof.parse_check_build(text) == {"PyTorch": True, "MXNet": False, "MPI": False}


def test_the_installed_horovod_is_complete(tmp_path: Path) -> None:
    installed = frameworks.installed_frameworks()
    # Horovod asks each extension in processes that it forks, all of which would import the frameworks anew.
    (tmp_path / "sitecustomize.py").write_text("".join(f"import horovod.{name}\n" for name in installed))
    answer = proof.check_build(proof.rank_environment(tmp_path))
    proof.compare(Recipe(installed), answer)
    if "+cpu" in frameworks.framework_version("torch"):
        with pytest.raises(BuildError, match="does not list NCCL"):
            proof.compare(Recipe(installed, nccl=True), answer)


def test_the_proof_needs_no_numpy(tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text("raise ModuleNotFoundError('there is no numpy here', name='numpy')\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    proof._reduce("gloo", "torch", proof.rank_environment() | {"PYTHONPATH": path})


def test_two_nccls_in_one_process_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    output = "[1,0]<stdout>:rank 0 loaded /a/libnccl.so.2\nrank 1 loaded /a/libnccl.so.2\nrank 0 of 2: agreed\n"
    assert proof.loaded_nccl(output) == {"/a/libnccl.so.2"}
    proof.compare_nccl({"/a/libnccl.so.2"}, "/a/libnccl.so.2")
    assert capsys.readouterr().out == ""
    proof.compare_nccl({"/a/libnccl.so.2"}, "/b/libnccl.so.2")
    assert "linked with /b/libnccl.so.2, but what is loaded is /a/libnccl.so.2" in capsys.readouterr().out
    with pytest.raises(BuildError, match=r"/a/libnccl\.so\.2 and /b/libnccl\.so\.2"):
        proof.compare_nccl({"/a/libnccl.so.2", "/b/libnccl.so.2"}, None)


def test_the_proof_notices_processes_that_do_not_reduce(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text("print('rank 0 of 2: agreed')")
    monkeypatch.setattr(proof, "_REDUCE", wrong)
    monkeypatch.setattr(proof, "launcher", lambda controller, ranks: [])
    with pytest.raises(BuildError, match="between two processes over gloo ended with 0"):
        proof._reduce("gloo", "torch", dict(os.environ))


# ---- the matrix ----------------------------------------------------------------------------------------------------


def test_the_table_holds_what_was_proven_with_todays_patches(tmp_path: Path) -> None:
    page, work = tmp_path / "builds.md", tmp_path / "work"
    page.write_text("before\n<!-- matrix: begin -->\nold\n<!-- matrix: end -->\nafter\n")
    work.mkdir()
    result = {
        "cell": matrix.CELLS[0].name,
        "patches": matrix.digest(*(path.read_text() for path in recipe.patches())),
        "seconds": 181,
        "processor": 240,
        "proof": ["torch over mpi: two processes agree", "torch over gloo: two processes agree"],
        "python": "3.11.7",
        "torch": "2.14.1+cu130",
        "tensorflow": None,
        "built": {"cxx_compiler": "GNU 12.2.0", "pytorch_cxx_standard": "20", "cuda": "13.0.88", "nccl": "23007"},
    }
    (work / "first.json").write_text(json.dumps(result))
    (work / "second.json").write_text(json.dumps({"cell": matrix.CELLS[1].name, "error": "it broke"}))
    matrix.write_table(page, work)
    lines = page.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    row = "3.11.7 | 2.14.1+cu130 | - | 20 (PyTorch) | GCC 12.2.0 | MPI, Gloo | CUDA 13.0.88, NCCL 2.30.7 | 181 | 240"
    assert [line for line in lines if line.startswith("| 3.")] == [f"| {row} |"]

    assert matrix.is_current(work / "first.json")
    (work / "first.json").write_text(json.dumps(result | {"patches": "older"}))
    assert not any(matrix.is_current(path) for path in [*work.glob("*.json"), work / "none.json"])


# ---- what the patches change ---------------------------------------------------------------------------------------


def bfloat16_of_torch() -> list[Any]:
    import torch

    hvd = harness.horovod_torch()
    mine = torch.linspace(-3, 5, 1001).to(torch.bfloat16) * (hvd.rank() + 1)
    operations = (hvd.Sum, hvd.Average, hvd.Min, hvd.Max, hvd.Product)
    reduced = [hvd.allreduce(mine, op=op, name=f"reduced.{index}") for index, op in enumerate(operations)]
    everyone = [torch.linspace(-3, 5, 1001).to(torch.bfloat16) * (rank + 1) for rank in range(hvd.size())]
    first, second = everyone
    expected = [first + second, (first + second) / 2, first.minimum(second), first.maximum(second), first * second]
    for got, wanted in zip(reduced, expected, strict=True):
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, wanted)
    gathered = hvd.allgather(mine, name="gathered")
    assert torch.equal(gathered, torch.cat(everyone))
    assert torch.equal(hvd.broadcast(mine, root_rank=1, name="broadcast"), second)
    bits: list[Any] = torch.stack([*reduced, gathered[:1001]]).view(torch.int16).tolist()
    return bits


@pytest.mark.ranks(2, launcher=("mpi", "gloo"))
def test_bfloat16_is_reduced_in_torch(cluster: Any) -> None:
    first, second = cluster.run(bfloat16_of_torch)
    assert first == second


def bfloat16_of_tensorflow() -> list[Any]:
    import tensorflow as tf

    hvd = harness.horovod_tensorflow()
    mine = tf.cast(tf.linspace(-3.0, 5.0, 1001), tf.bfloat16) * tf.cast(hvd.rank() + 1, tf.bfloat16)
    total = hvd.allreduce(mine, op=hvd.Sum, name="total")
    assert total.dtype == tf.bfloat16
    expected = sum(harness.gather(tf.cast(mine, tf.float32).numpy()))
    assert (
        tf.cast(total, tf.float32).numpy().tolist()
        == tf.cast(tf.cast(expected, tf.bfloat16), tf.float32).numpy().tolist()
    )
    bits: list[Any] = tf.bitcast(total, tf.int16).numpy().tolist()
    return bits


@pytest.mark.ranks(2, launcher=("mpi", "gloo"), pool="tensorflow")
def test_bfloat16_is_reduced_in_tensorflow(cluster: Any) -> None:
    first, second = cluster.run(bfloat16_of_tensorflow)
    assert first == second


def sparse_beside_dense() -> list[Any]:
    import tensorflow as tf

    hvd = harness.horovod_tensorflow()
    dense = tf.fill([2], float(hvd.rank() + 1))
    sparse = [
        tf.IndexedSlices(tf.fill([1, 2], float(hvd.rank() + 1)), tf.constant([hvd.rank()]), tf.constant([rows, 2]))
        for rows in (3, 5)
    ]
    total, *gathered = hvd.grouped_allreduce([dense, *sparse], op=hvd.Sum)
    assert total.numpy().tolist() == [3.0, 3.0]
    assert [slices.dense_shape.numpy().tolist() for slices in gathered] == [[3, 2], [5, 2]]
    return [tf.convert_to_tensor(slices).numpy().tolist() for slices in gathered]


@pytest.mark.ranks(2, launcher="gloo", pool="tensorflow")
def test_sparse_and_dense_gradients_in_one_group(cluster: Any) -> None:
    first, second = cluster.run(sparse_beside_dense)
    assert first == second
    assert first[0] == [[1.0, 1.0], [2.0, 2.0], [0.0, 0.0]]


def synchronizations() -> list[str]:
    from horovod.common import elastic
    from horovod.common.exceptions import HostsUpdatedInterrupt

    class State(elastic.ObjectState):
        def sync(self) -> None:
            happened.append("sync")

    def train(state: Any) -> None:
        happened.append("train")
        if happened.count("train") == 1:
            raise HostsUpdatedInterrupt(skip_sync=True)

    happened: list[str] = []
    elastic.notification_manager.init = lambda: None
    state = State(bcast_object=None, get_rank=None)
    elastic.run_fn(train, lambda: happened.append("reset"))(state)
    return happened


@pytest.mark.ranks(1, launcher="gloo")
def test_workers_that_stay_synchronize_with_those_that_come(cluster: Any) -> None:
    """They cannot know whether others came while they waited for enough hosts."""
    assert cluster.run(synchronizations, fresh=True) == [["sync", "train", "reset", "sync", "train"]]
