"""Some hundred steps leave nothing behind; `tests/soak` takes thousands."""

from __future__ import annotations

import endurance
import pytest


@pytest.mark.ranks(2, launcher="mpi", pool="tensorflow")
@pytest.mark.time_limit(120)
@pytest.mark.parametrize("in_graph", [True, False], ids=["graph", "eager"])
def test_some_hundred_steps_leave_nothing_behind(cluster, in_graph):
    endurance.check(cluster.run(endurance.tape, 220, in_graph))
