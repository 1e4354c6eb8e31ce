"""PyTorch gradients in the form that buckets hold them, and back.

For the bindings that aggregate PyTorch's gradients, over Horovod or ``torch.distributed``.
"""

from __future__ import annotations

import math

import torch

__all__ = ["numbers", "real", "rows_and_values", "sparse_gradient"]


def numbers(parameter: torch.Tensor) -> int:
    """How many real numbers a parameter's gradient consists of."""
    return parameter.numel() * (2 if parameter.is_complex() else 1)


def real(gradient: torch.Tensor) -> torch.Tensor:
    """The gradient itself as real numbers; those of a complex one in a further axis."""
    return torch.view_as_real(gradient) if gradient.is_complex() else gradient


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
