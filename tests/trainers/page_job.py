"""Runs a page's script on ranks, without the harness, and compares what it has trained."""

from __future__ import annotations

import hashlib
from typing import Any

import torch.distributed as dist


def compare(left: dict[str, Any]) -> None:
    """Say on rank 0 whether what the script has left behind as ``model`` is the same on all ranks."""
    digest = hashlib.sha256()
    for parameter in left["model"].parameters():
        digest.update(parameter.detach().numpy().tobytes())
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, digest.hexdigest())
    if dist.get_rank() == 0:
        print("equal bits" if len(everyone) == 2 and len(set(everyone)) == 1 else f"different bits: {everyone}")
    dist.destroy_process_group()
