"""Every binding agrees with the oracle whatever happens, and tells all ranks where they disagree (`named.py`).

It saves, resumes and shares what its aggregator remembers (`memory.py`).
"""

from __future__ import annotations

import memory
import named
import pytest

pytestmark = pytest.mark.time_limit(300)

SPARSE = {name for name in named.FEATURES if "sparse" in name}
ANNOUNCED = {"other passes than announced, or as many"}
MISSING = {"gradients that one rank lacks", "gradients that are missing on some steps"}
ONE_STEP_ALONE = {"sparse gradients on some steps", "gradients that are missing on some steps"}


def conform(cluster, module, lacks, every=False):
    """Take all cases; ``lacks`` are the features that the binding does not have. Then disagree, save and resume."""
    assert all(set(found) == lacks for found in cluster.run(named.take_all, module, every))

    first, *others = cluster.run(named.disagree, module)
    assert all(other == first for other in others)
    for given, told in first.items():
        assert named.DISAGREEMENTS[given] in "\n".join(told), (given, told)
    cluster.run(memory.take_all, module)


@pytest.mark.ranks(3, launcher=("mpi", "gloo"))
def test_pytorch(cluster):
    conform(cluster, "with_torch", set(), every=cluster.launcher == "mpi")


@pytest.mark.ranks(3, launcher="torchrun")
def test_ddp(cluster):
    own = {"layers that are frozen", "half precision on the wire", "division before sums"}
    conform(cluster, "with_ddp", {*SPARSE, *MISSING, *ANNOUNCED, *own, "parameters that travel together"}, every=True)


@pytest.mark.ranks(3, launcher="torchrun")
def test_fsdp(cluster):
    cluster.run(memory.take_all, "with_fsdp")


@pytest.mark.ranks(3, launcher="gloo", pool="tensorflow")
def test_tapes(cluster):
    conform(cluster, "with_tapes", {*ONE_STEP_ALONE, *ANNOUNCED, "layers that are frozen", "several passes"})


@pytest.mark.ranks(3, launcher="gloo", pool="tensorflow")
def test_keras(cluster):
    conform(cluster, "with_keras", {*SPARSE, *MISSING, *ANNOUNCED, "layers that are frozen", "complex gradients"})


@pytest.mark.ranks(3, launcher="gloo", pool="keras-torch", env={"KERAS_BACKEND": "torch"})
def test_keras_on_torch(cluster):
    conform(cluster, "with_keras", {*SPARSE, *MISSING, *ANNOUNCED, "layers that are frozen", "complex gradients"})
