"""Elastic jobs of every binding that Horovod's elastic part is for: workers come, leave and die.

Nothing that was committed is lost, and what is remembered is taken up by any number of workers.
"""

from __future__ import annotations

import numpy as np
import pytest
from elastic_jobs import SIZES, a_worker_comes_the_leader_dies_and_another_leaves, check, resampled, run
from harness.launchers import ON_TORCH

pytestmark = pytest.mark.time_limit(300)
#: The steps that were begun after the last commit, by the leader that died and those who waited for it.
SINCE_THE_COMMIT = 2


@pytest.mark.ranks(2, launcher="gloo")
def test_pytorch(cluster, tmp_path):
    told = a_worker_comes_the_leader_dies_and_another_leaves(cluster, "elastic_torch", tmp_path)
    assert check(told, SIZES, ["momentum", "history", "no momentum"]) == SINCE_THE_COMMIT
    (report,) = [fact["report"] for fact in told if "report" in fact]
    assert "1 worker" in report["reason"]


@pytest.mark.ranks(2, launcher="gloo", pool="tensorflow")
def test_tapes(cluster, tmp_path):
    told = a_worker_comes_the_leader_dies_and_another_leaves(cluster, "elastic_tapes", tmp_path, state="keras")
    assert check(told, SIZES, ["momentum"], tolerance=1e-5) == SINCE_THE_COMMIT - 1  # told when it has ended


@pytest.mark.ranks(2, launcher="gloo", pool="tensorflow")
def test_tapes_with_a_state_of_variables(cluster, tmp_path):
    """From two workers to one and back, with a history that each has a part of."""
    sizes, changes = [2, 1, 2], [{"localhost": 1}, {"localhost": 2}]
    told = run(cluster, "elastic_tapes", tmp_path, {"localhost": 2}, sizes, changes=changes, state="variables")
    assert check(told, sizes, ["history"], tolerance=1e-5) == 0


@pytest.mark.ranks(2, launcher="gloo", pool="tensorflow")
def test_keras(cluster, tmp_path):
    keras(cluster, tmp_path)


@pytest.mark.ranks(2, launcher="gloo", **ON_TORCH)
def test_keras_on_torch(cluster, tmp_path):
    keras(cluster, tmp_path)


def keras(cluster, folder):
    told = a_worker_comes_the_leader_dies_and_another_leaves(cluster, "elastic_keras", folder)
    assert check(told, SIZES, []) == SINCE_THE_COMMIT
    curves = {}
    for fact in told:
        if "done" in fact:
            step = fact["done"]
            if step > 1:
                earlier = resampled(curves[step - 1], fact["size"])
                expected = 0.9 * np.array(earlier) + 0.1 * np.sort(fact["first"])
                np.testing.assert_allclose(fact["curve"], expected, rtol=1e-9)
            curves[step] = fact["curve"]
