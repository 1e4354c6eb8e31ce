"""Thousands of steps leave nothing behind, and the last one is as fast as the first."""

from __future__ import annotations

import endurance
import pytest
from harness.launchers import ON_TORCH

pytestmark = pytest.mark.time_limit(1800)


@pytest.mark.ranks(4, launcher=("mpi", "gloo"))
def test_twenty_thousand_steps(cluster):
    endure(cluster, endurance.pytorch, 20_000, False)


@pytest.mark.ranks(2, launcher="mpi", pool="tensorflow")
def test_twenty_thousand_steps_in_a_graph(cluster):
    endure(cluster, endurance.tape, 20_000, True)


@pytest.mark.ranks(2, launcher="mpi", pool="tensorflow")
def test_twenty_thousand_steps_of_keras(cluster):
    endure(cluster, endurance.keras, 20_000)


# These two take several times as long for a step.
@pytest.mark.ranks(2, launcher="gloo", pool="tensorflow")
def test_four_thousand_steps_of_eager_tapes(cluster):
    endure(cluster, endurance.tape, 4_000, False)


@pytest.mark.ranks(2, launcher="gloo", **ON_TORCH)
def test_four_thousand_steps_of_keras_on_torch(cluster):
    endure(cluster, endurance.keras, 4_000)


def endure(cluster, job, *arguments):
    results = cluster.run(job, *arguments)
    for rank, result in enumerate(results):
        print(f"rank {rank} under {cluster.launcher}: {result}")
    endurance.check(results)
    assert all(result["last"] < 1.5 * result["first"] for result in results)
