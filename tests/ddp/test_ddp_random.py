"""Random jobs of DDP agree with the oracle; see `tests/pytorch/test_torch_random.py`."""

from __future__ import annotations

import os
import random

import pytest
import random_cases

SEED = int(os.environ.get("RANDOM_SEED", random.randrange(10**9)))
CASES = int(os.environ.get("RANDOM_CASES", "1000000"))


@pytest.mark.ranks(3, launcher="torchrun")
@pytest.mark.time_limit(120)
def test_random_jobs(cluster):
    results = cluster.run(random_cases.run_many, SEED, 15.0, CASES, "random_ddp")
    print(f"RANDOM_SEED={SEED}: {results[0]}")
    assert results[0]["cases"] >= 1
