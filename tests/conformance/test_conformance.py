"""Every binding agrees with the oracle whatever happens, and tells all ranks where they disagree (`named.py`).

It saves, resumes and shares what its aggregator remembers (`memory.py`), and all ranks notice one that trains alone
(`guards.py`).
"""

from __future__ import annotations

import guards
import memory
import named
import pytest
from harness.launchers import KERAS_2, ON_TORCH

pytestmark = pytest.mark.time_limit(300)

SPARSE = {name for name in named.FEATURES if "sparse" in name}
PASSES = {name for name in named.FEATURES if "several passes" in name}
ANNOUNCED = {"other passes than announced, or as many"}
MISSING = {"gradients that one rank lacks", "gradients that are missing on some steps"}
ONE_STEP_ALONE = {"sparse gradients on some steps", "gradients that are missing on some steps"}


def conform(cluster, module, lacks=None, every=False):
    """Take all cases, without the features that the binding ``lacks``, or none; then all the rest."""
    if lacks is not None:
        assert all(set(found) == lacks for found in cluster.run(named.take_all, module, every))
    cluster.run(memory.take_all, module)
    guard(cluster, module)


def guard(cluster, module):
    """Let ranks train alone, and disagree; all must be told."""
    cluster.run(guards.take_all, module)

    # Without an aggregator Horovod itself has sent gradients before the error, so these processes end.
    first, *others = cluster.run(named.disagree, module, fresh=module == "with_torch")
    assert all(other == first for other in others)
    for (given, told), said in zip(first, named.DISAGREEMENTS, strict=True):
        assert given != ["aggregator=None"] or len(told) == 1, told
        for each in given:
            assert any(said[each] in line for line in told), (each, told)


@pytest.mark.ranks(3, launcher=("mpi", "gloo"))
def test_pytorch(cluster):
    conform(cluster, "with_torch", set(), every=cluster.launcher == "mpi")


@pytest.mark.ranks(3, launcher="torchrun")
def test_ddp(cluster):
    own = {"layers that are frozen", "half precision on the wire", "division before sums"}
    conform(cluster, "with_ddp", {*SPARSE, *MISSING, *ANNOUNCED, *own, "parameters that travel together"}, every=True)


@pytest.mark.ranks(3, launcher="torchrun")
def test_fsdp(cluster):
    conform(cluster, "with_fsdp")


@pytest.mark.ranks(3, launcher="gloo", pool="tensorflow")
def test_tapes(cluster):
    conform(cluster, "with_tapes", {*ONE_STEP_ALONE, *PASSES, *ANNOUNCED, "layers that are frozen"})


@pytest.mark.ranks(3, launcher="gloo", pool="tensorflow")
def test_keras(cluster):
    conform(cluster, "with_keras", {*SPARSE, *MISSING, *ANNOUNCED, "layers that are frozen", "complex gradients"})


@pytest.mark.ranks(3, launcher="gloo", **ON_TORCH)
def test_keras_on_torch(cluster):
    conform(cluster, "with_keras", {*SPARSE, *MISSING, *ANNOUNCED, "layers that are frozen", "complex gradients"})


@pytest.mark.ranks(3, launcher="gloo", **KERAS_2)
def test_keras_2(cluster):
    guard(cluster, "with_keras_2")
