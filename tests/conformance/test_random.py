"""Random training jobs agree with the oracle, whatever is combined and whatever goes wrong.

Other cases in every run; `RANDOM_SEED` is where to begin (by default at random, and printed), `RANDOM_CASES` how many
to take at most. `make soak` does this for an hour, or for `RANDOM_SECONDS`.
"""

from __future__ import annotations

import os

import cases
import pytest

SOAK = float(os.environ.get("RANDOM_SECONDS", "3600"))


@pytest.mark.ranks(3, launcher="mpi")
@pytest.mark.time_limit(180)
def test_pytorch_under_mpi(cluster):
    cases.agree_with_the_oracle(cluster, 8.0, "with_torch")


@pytest.mark.ranks(2, launcher="gloo")
@pytest.mark.time_limit(180)
def test_pytorch_over_gloo(cluster):
    cases.agree_with_the_oracle(cluster, 8.0, "with_torch")


@pytest.mark.ranks(3, launcher="torchrun")
@pytest.mark.time_limit(180)
def test_ddp(cluster):
    cases.agree_with_the_oracle(cluster, 6.0, "with_ddp")


@pytest.mark.ranks(2, launcher=("mpi", "gloo"), pool="tensorflow")
@pytest.mark.time_limit(180)
def test_tapes(cluster):
    cases.agree_with_the_oracle(cluster, 6.0, "with_tapes")


@pytest.mark.soak
@pytest.mark.ranks(2, 3, 4, launcher=("mpi", "gloo"))
def test_pytorch_for_long(cluster):
    for_long(cluster, "with_torch", SOAK / 12)


@pytest.mark.soak
@pytest.mark.ranks(2, 3, 4, launcher=("mpi", "gloo"), pool="tensorflow")
def test_tapes_for_long(cluster):
    for_long(cluster, "with_tapes", SOAK / 18)


@pytest.mark.soak
@pytest.mark.ranks(2, 3, 4, launcher="torchrun")
def test_ddp_for_long(cluster):
    for_long(cluster, "with_ddp", SOAK / 18)


def for_long(cluster, module, seconds):
    cases.agree_with_the_oracle(cluster, seconds, module, timeout=seconds + 120)
