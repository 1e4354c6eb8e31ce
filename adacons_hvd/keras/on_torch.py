"""The functions of ``horovod.keras``, on PyTorch."""

from __future__ import annotations

from typing import Any

import horovod.torch as _hvd
import torch
from horovod.torch import (
    Adasum,
    Average,
    Compression,
    ProcessSet,
    Sum,
    add_process_set,
    ccl_built,
    cross_rank,
    cross_size,
    cuda_built,
    ddl_built,
    global_process_set,
    gloo_built,
    gloo_enabled,
    init,
    is_initialized,
    local_rank,
    local_size,
    mpi_built,
    mpi_enabled,
    mpi_threads_supported,
    nccl_built,
    rank,
    remove_process_set,
    rocm_built,
    shutdown,
    size,
    start_timeline,
    stop_timeline,
)

__all__ = [
    "Adasum",
    "Average",
    "Compression",
    "ProcessSet",
    "Sum",
    "add_process_set",
    "allgather",
    "allreduce",
    "broadcast",
    "broadcast_global_variables",
    "ccl_built",
    "cross_rank",
    "cross_size",
    "cuda_built",
    "ddl_built",
    "global_process_set",
    "gloo_built",
    "gloo_enabled",
    "init",
    "is_initialized",
    "local_rank",
    "local_size",
    "mpi_built",
    "mpi_enabled",
    "mpi_threads_supported",
    "nccl_built",
    "rank",
    "reducescatter",
    "remove_process_set",
    "rocm_built",
    "shutdown",
    "size",
    "start_timeline",
    "stop_timeline",
]


def allreduce(
    value: Any,
    name: str | None = None,
    average: bool | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    op: Any = None,
    compression: Any = Compression.none,
) -> torch.Tensor:
    """Reduce a tensor-compatible value over all ranks, by default to its average."""
    op = op if op is not None else (Sum if average is False else Average)
    result: torch.Tensor = _hvd.allreduce(
        torch.as_tensor(value),
        name=name,
        op=op,
        prescale_factor=prescale_factor,
        postscale_factor=postscale_factor,
        compression=compression,
    )
    return result


def allgather(value: Any, name: str | None = None) -> torch.Tensor:
    """Concatenate a tensor-compatible value of all ranks."""
    result: torch.Tensor = _hvd.allgather(torch.as_tensor(value), name=name)
    return result


def broadcast(value: Any, root_rank: int, name: str | None = None) -> torch.Tensor:
    """The tensor-compatible value of ``root_rank``."""
    result: torch.Tensor = _hvd.broadcast(torch.as_tensor(value), root_rank, name=name)
    return result


def reducescatter(value: Any, name: str | None = None, op: Any = Average) -> torch.Tensor:
    """Reduce a tensor-compatible value, and give each rank its part of the result."""
    result: torch.Tensor = _hvd.reducescatter(torch.as_tensor(value), name=name, op=op)
    return result


def broadcast_global_variables(root_rank: int) -> None:
    """PyTorch has no global variables, so this is an error that says what to use."""
    raise RuntimeError(
        "broadcast_global_variables() is for TensorFlow 1. Use BroadcastGlobalVariablesCallback, or "
        "broadcast_parameters() of adacons_hvd.torch."
    )
