"""Random training jobs agree with the oracle, whatever is combined and whatever goes wrong.

Other cases in every run; `RANDOM_SEED` repeats one. `tests/soak` does this for an hour.
"""

from __future__ import annotations

import os
import random

import pytest
import random_cases

SEED = int(os.environ.get("RANDOM_SEED", random.randrange(10**9)))
CASES = int(os.environ.get("RANDOM_CASES", "1000000"))


def agree_with_the_oracle(cluster):
    results = cluster.run(random_cases.run_many, SEED, 25.0, CASES)
    print(f"RANDOM_SEED={SEED}: {results[0]}")
    assert results[0]["cases"] >= 1


@pytest.mark.ranks(3, launcher="mpi")
@pytest.mark.time_limit(120)
def test_random_jobs_under_mpi(cluster):
    agree_with_the_oracle(cluster)


@pytest.mark.ranks(2, launcher="gloo")
@pytest.mark.time_limit(120)
def test_random_jobs_over_gloo(cluster):
    agree_with_the_oracle(cluster)
