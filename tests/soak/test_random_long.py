"""Random training jobs for as long as one likes, by default an hour in all: `make soak`.

RANDOM_SEED is where to begin (by default at random, and printed), RANDOM_SECONDS how long to go on, RANDOM_CASES how
many cases at most on each number of ranks.
"""

from __future__ import annotations

import os

import pytest
import random_cases

SECONDS = float(os.environ.get("RANDOM_SECONDS", "3600"))


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
    random_cases.agree_with_the_oracle(cluster, seconds, module, timeout=seconds + 120)
