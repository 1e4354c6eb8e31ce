"""Horovod itself, against mpi4py: before anything of ours is blamed, its collectives move what they should."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from mpi4py import MPI

if TYPE_CHECKING:
    from types import ModuleType

    import numpy as np


def mine(comm: MPI.Intracomm, rows: int) -> torch.Tensor:
    """Numbers that differ between ranks and within them."""
    generator = torch.Generator().manual_seed(1000 + comm.rank)
    return torch.randn(rows, 3, dtype=torch.float64, generator=generator)


def test_ranks_and_sizes_agree(comm: MPI.Intracomm, hvd: ModuleType) -> None:
    assert (hvd.rank(), hvd.size()) == (comm.rank, comm.size)
    assert MPI.Query_thread() == MPI.THREAD_MULTIPLE


def test_allreduce(comm: MPI.Intracomm, hvd: ModuleType) -> None:
    tensor = mine(comm, 7)
    expected = torch.zeros_like(tensor)
    comm.Allreduce(tensor.numpy(), expected.numpy())
    torch.testing.assert_close(hvd.allreduce(tensor, op=hvd.Sum), expected)
    torch.testing.assert_close(hvd.allreduce(tensor, op=hvd.Average), expected / comm.size)


def test_allgather_of_different_lengths(comm: MPI.Intracomm, hvd: ModuleType) -> None:
    tensor = mine(comm, comm.rank + 1)
    expected = torch.cat(comm.allgather(tensor))
    assert torch.equal(hvd.allgather(tensor), expected)


def test_alltoall_of_different_lengths(comm: MPI.Intracomm, hvd: ModuleType) -> None:
    # Rank r sends k + 1 rows to rank k.
    splits = [to + 1 for to in range(comm.size)]
    tensor = mine(comm, sum(splits))
    expected = torch.cat(comm.alltoall(list(tensor.split(splits))))
    got, received = hvd.alltoall(tensor, splits=torch.tensor(splits, dtype=torch.int32))
    assert torch.equal(got, expected)
    assert received.tolist() == [comm.rank + 1] * comm.size


def test_broadcast(comm: MPI.Intracomm, hvd: ModuleType) -> None:
    root = comm.size - 1
    tensor = mine(comm, 5)
    assert torch.equal(hvd.broadcast(tensor, root), comm.bcast(tensor, root))


@pytest.mark.time_limit(240)  # Every rank imports TensorFlow, perhaps on a busy machine.
def test_tensorflow_allreduce(comm: MPI.Intracomm) -> None:
    tf = pytest.importorskip("tensorflow")  # an image may hold PyTorch alone
    import horovod.tensorflow as hvd

    hvd.init()
    array: np.ndarray = mine(comm, 7).numpy()
    expected = comm.allreduce(array)
    got = hvd.allreduce(tf.constant(array), op=hvd.Sum).numpy()
    assert abs(got - expected).max() < 1e-12
