"""The examples in the engine's docstrings are true."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = [
    "agreement",
    "costs",
    "engine.memory",
    "engine.plan",
    "engine.protocol",
    "engine.replicas",
    "engine.session",
    "engine.settings",
]


@pytest.mark.parametrize(
    "module",
    [
        "aggregators.torchjd",
        "engine.protocol",
        "engine.replicas",
        "engine.settings",
        "agreement",
        "costs",
        "engine.plan",
        "engine.memory",
        "engine.session",
        "engine.hosts",
    ],
)
def test_examples(module):
    found = doctest.testmod(importlib.import_module(f"adacons_hvd.{module}"), optionflags=doctest.ELLIPSIS)
    assert found.attempted
    assert not found.failed
