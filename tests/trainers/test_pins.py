"""`make test-trainers` installs exactly what pyproject.toml pins, and all that the trainers need."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import tomllib
from packaging.requirements import Requirement

PINS = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["dependency-groups"]["trainers"]


def test_each_pin_is_installed_and_has_what_it_needs():
    for pin in map(Requirement, PINS):
        assert str(pin.specifier) == f"=={metadata.version(pin.name)}", pin
        for needed in map(Requirement, metadata.requires(pin.name) or ()):
            if needed.marker is None or needed.marker.evaluate({"extra": "train" if pin.name == "ray" else ""}):
                assert needed.specifier.contains(metadata.version(needed.name)), f"{pin} needs {needed}"
