"""Imports lead one way, and the picture of them is that of today's."""

import importlib.util
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
_spec = importlib.util.spec_from_file_location("layers", DOCS / "layers.py")
layers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(layers)

ROW_OF = {name: row for row, names in enumerate(layers.ROWS) for name in names}


def test_every_layer_has_a_row():
    modules = {
        path.stem for path in layers.PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert modules - {"__init__"} == set(ROW_OF)


def test_arrows_lead_down():
    wrong = {(above, under) for above, under in layers.arrows() if ROW_OF[above] >= ROW_OF[under]}
    assert not wrong


def test_the_engine_imports_no_framework():
    for path in (layers.PACKAGE / "engine").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not any(f"import {name}" in text for name in ("torch", "tensorflow", "numpy", "keras")), path


def test_the_picture_is_that_of_the_imports():
    assert (DOCS / "layers.svg").read_text(encoding="utf-8") == layers.picture(), "run python docs/layers.py"
