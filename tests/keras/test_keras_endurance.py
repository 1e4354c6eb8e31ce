"""Some hundred steps leave nothing behind; `tests/soak` takes thousands."""

from __future__ import annotations

import endurance
import pytest
from harness.launchers import ON_TORCH

pytestmark = pytest.mark.time_limit(120)


@pytest.mark.ranks(2, launcher="mpi", pool="tensorflow")
def test_some_hundred_steps_leave_nothing_behind(cluster):
    endurance.check(cluster.run(endurance.keras, 300))


@pytest.mark.ranks(2, launcher="mpi", **ON_TORCH)
def test_some_hundred_steps_on_torch_leave_nothing_behind(cluster):
    endurance.check(cluster.run(endurance.keras, 300))
