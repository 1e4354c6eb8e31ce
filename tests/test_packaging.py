"""`pip install adacons-hvd` brings the package and leaves the frameworks alone."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    pytest.skip("reads pyproject.toml with tomllib, which Python 3.11 brought", allow_module_level=True)

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy: setuptools writes beside the sources, and other tests are reading those.
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "adacons_hvd", folder / "adacons_hvd", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(folder), str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return zipfile.ZipFile(built)


def test_the_wheel_is_pure_python(wheel: zipfile.ZipFile) -> None:
    assert str(wheel.filename).endswith("-py3-none-any.whl")
    assert not [name for name in wheel.namelist() if name.endswith((".so", ".c", ".cc"))]


def test_the_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for path in (ROOT / "adacons_hvd").rglob("*"):
        if path.suffix in (".py", ".patch", ".typed"):
            assert str(path.relative_to(ROOT)) in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"adacons_hvd"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_nothing_is_required(wheel: zipfile.ZipFile, project: dict[str, Any]) -> None:
    assert project["project"]["dependencies"] == []
    (described,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    lines = wheel.read(described).decode().splitlines()
    required = [line for line in lines if line.startswith("Requires-Dist:")]
    assert all("extra ==" in line for line in required)
    assert {line.split(": ")[1] for line in lines if line.startswith("Provides-Extra:")} >= {
        "torch",
        "tensorflow",
        "cli",
    }
    assert "License-Expression: Apache-2.0" in lines


@pytest.mark.parametrize("module", ["adacons_hvd", "adacons_hvd.horovod_build.__main__"])
def test_importing_brings_no_framework(module: str) -> None:
    script = f"import sys, {module}; print([n for n in ('torch', 'tensorflow', 'keras', 'numpy') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def pins(project: dict[str, Any], group: str) -> dict[str, Requirement]:
    found: dict[str, Requirement] = {}
    for entry in project["dependency-groups"][group]:
        if isinstance(entry, dict):
            found |= pins(project, entry["include-group"])
        else:
            requirement = Requirement(entry)
            found[canonicalize_name(requirement.name)] = requirement
    return found


def test_every_pin_is_exact_and_is_what_these_tests_run_with(project: dict[str, Any]) -> None:
    for name, requirement in (pins(project, "dev") | pins(project, "legacy-keras")).items():
        (pin,) = requirement.specifier
        assert pin.operator == "=="
        # A local label, the "+cpu" of "2.13.0+cpu", is another build of the same release.
        assert requirement.specifier.contains(metadata.version(name)), name


def test_the_pins_are_complete(project: dict[str, Any]) -> None:
    """Nothing in the environment is left to chance: whatever the pinned packages need is pinned as well."""
    pinned = pins(project, "dev")
    for name in pinned:
        for line in metadata.requires(name) or ():
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                assert canonicalize_name(needed.name) in pinned, f"{name} needs {needed}"
