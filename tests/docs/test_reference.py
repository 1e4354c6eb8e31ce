"""The reference has every public name."""

from __future__ import annotations

import importlib

import pytest
from blocks import ROOT

PUBLIC = {
    "adacons_hvd": ["AdaCons", "Aggregator", "Curvature", "Decision", "Mean", "NormalizedMean", "Statistics"],
    "adacons_hvd.aggregators": ["from_torchjd"],
    "adacons_hvd.ddp": None,
    "adacons_hvd.fsdp": None,
    "adacons_hvd.logging": None,
    "adacons_hvd.report": None,
    "adacons_hvd.agreement": ["DisagreementError"],
    "adacons_hvd.engine.replicas": ["ReplicaError", "StrayStepError"],
    "adacons_hvd.costs": ["Choice", "Network"],
}


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_there(module):
    """``None`` is all that the module says is public."""
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    found = importlib.import_module(module)
    names = PUBLIC[module]
    if module == "adacons_hvd":
        assert {*names, "__version__"} == set(found.__all__)
    for name in found.__all__ if names is None else names:
        assert hasattr(found, name)
        assert f":: {module}.{name}\n" in text, f"docs/reference.md lacks {module}.{name}"
