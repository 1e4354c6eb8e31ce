"""Random training jobs for as long as one likes, by default an hour in all: `make soak`.

RANDOM_SEED is where to begin (by default at random, and printed), RANDOM_SECONDS how long to go on, RANDOM_CASES how
many cases at most on each number of ranks.
"""

from __future__ import annotations

import os
import random

import pytest
import random_cases

SECONDS = float(os.environ.get("RANDOM_SECONDS", "3600"))
CASES = int(os.environ.get("RANDOM_CASES", "1000000"))
SEED = int(os.environ.get("RANDOM_SEED", random.randrange(10**9)))


@pytest.mark.ranks(2, 3, 4, launcher=("mpi", "gloo"))
def test_random_jobs_agree_with_the_oracle(cluster):
    agree_with_the_oracle(cluster, "random_cases", SECONDS / 12)


@pytest.mark.ranks(2, 3, 4, launcher=("mpi", "gloo"), pool="tensorflow")
def test_random_jobs_with_tapes_agree_with_the_oracle(cluster):
    agree_with_the_oracle(cluster, "random_tapes", SECONDS / 18)


@pytest.mark.ranks(2, 3, 4, launcher="torchrun")
def test_random_jobs_of_ddp_agree_with_the_oracle(cluster):
    agree_with_the_oracle(cluster, "random_ddp", SECONDS / 18)


def agree_with_the_oracle(cluster, module, seconds):
    results = cluster.run(random_cases.run_many, SEED, seconds, CASES, module, timeout=seconds + 120)
    print(f"RANDOM_SEED={SEED} on {cluster.ranks} ranks under {cluster.launcher}: {results[0]}")
