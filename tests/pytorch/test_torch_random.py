"""Random training jobs agree with the oracle, whatever is combined and whatever goes wrong.

Other cases in every run; `RANDOM_SEED` repeats one. `tests/soak` does this for an hour.
"""

from __future__ import annotations

import pytest
import random_cases


@pytest.mark.ranks(3, launcher="mpi")
@pytest.mark.time_limit(180)
def test_random_jobs_under_mpi(cluster):
    random_cases.agree_with_the_oracle(cluster, 50.0)


@pytest.mark.ranks(2, launcher="gloo")
@pytest.mark.time_limit(180)
def test_random_jobs_over_gloo(cluster):
    random_cases.agree_with_the_oracle(cluster, 50.0)
