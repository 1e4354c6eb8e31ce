"""20,000 steps at 4 ranks leave nothing behind, and the last one is as fast as the first."""

from __future__ import annotations

import endurance
import pytest


@pytest.mark.ranks(4, launcher=("mpi", "gloo"))
@pytest.mark.time_limit(1800)
def test_twenty_thousand_steps(cluster):
    results = cluster.run(endurance.run, 20_000, False)
    for rank, result in enumerate(results):
        print(f"rank {rank} under {cluster.launcher}: {result}")
    endurance.check(results)
    assert all(result["last"] < 1.5 * result["first"] for result in results)
