"""PyTorch gradients in the form that buckets hold them, and back.

For the bindings that aggregate PyTorch's gradients, over Horovod or ``torch.distributed``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from .schedules import Segment

__all__ = ["numbers", "real", "rows_and_values", "segments", "sparse_gradient"]


def numbers(parameter: torch.Tensor) -> int:
    """How many real numbers a parameter's gradient consists of."""
    return parameter.numel() * (2 if parameter.is_complex() else 1)


def real(gradient: torch.Tensor) -> torch.Tensor:
    """The gradient itself as real numbers; those of a complex one in a further axis."""
    return torch.view_as_real(gradient) if gradient.is_complex() else gradient


def segments(parts: Iterable[tuple[int, int]]) -> list[Segment]:
    """The segments of a flat buffer in which parts of given ``(length, group)`` lie side by side.

    None is empty: there would be nothing to compute of it.

    >>> segments([(3, 0), (2, 0), (0, 2), (4, 1)])
    [Segment(start=0, stop=5, group=0), Segment(start=5, stop=9, group=1)]
    """
    found: list[Segment] = []
    stop = 0
    for length, group in parts:
        start, stop = stop, stop + length
        if found and found[-1].group == group:
            found[-1] = found[-1]._replace(stop=stop)
        elif length:
            found.append(Segment(start, stop, group))
    return found


def rows_and_values(gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A row-sparse gradient's distinct rows, and their values as a matrix."""
    # Repeated rows must be added up before they are squared.
    gradient = gradient.coalesce()
    values = gradient.values()
    return gradient.indices()[0], values.reshape(len(values), math.prod(gradient.shape[1:]))


def sparse_gradient(rows: torch.Tensor, values: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Undo :func:`rows_and_values`."""
    return torch.sparse_coo_tensor(
        rows[None],
        values.reshape(-1, *parameter.shape[1:]),
        parameter.shape,
        is_coalesced=True,
        check_invariants=False,
    )
