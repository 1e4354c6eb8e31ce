"""Some hundred steps leave nothing behind; `tests/soak` takes twenty thousand."""

from __future__ import annotations

import endurance
import pytest


@pytest.mark.ranks(2, launcher="mpi")
# Ten seconds, or a minute where two cores are shared badly between the threads in which two ranks wait for MPI.
@pytest.mark.time_limit(300)
def test_some_hundred_steps_leave_nothing_behind(cluster):
    endurance.check(cluster.run(endurance.pytorch, 300, True))
