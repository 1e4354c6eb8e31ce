"""What inner products tell of gradients' noise, and of each worker's agreement with the others."""

from __future__ import annotations

from ..aggregators import Statistics
from ..aggregators.base import count_present
from ..ops import Tensor, ops_for

__all__ = ["agreement", "cosine", "noise_and_signal"]

#: A difference of squares below this fraction of them is rounding.
ROUNDING = 1e-12


def noise_and_signal(statistics: Statistics) -> tuple[Tensor, Tensor]:
    """The variance of one worker's gradient and the squared length of the true one, ``[..., 1]``.

    Both are without bias, for workers that draw their batches at random from the same data. So the second can be
    below zero. Both are 0 where there are fewer than two workers.

    >>> import torch
    >>> noise, signal = noise_and_signal(Statistics.of(torch.tensor([[3.0, 1.0], [3.0, -1.0]])))
    >>> noise.tolist(), signal.tolist()
    ([2.0], [8.0])
    """
    ops = ops_for(statistics.squares)
    present = statistics.present
    count = count_present(present)
    zero = ops.zeros_like(count)
    mean = ops.total(ops.where(present, statistics.squares, ops.zeros_like(statistics.squares))) / count
    square = statistics.mean_square
    several = count > 1
    difference = mean - square
    noise = difference * count / ops.where(several, count - 1, count)
    noise = ops.where(several & (difference > 0), noise, zero)
    return noise, ops.where(several, square - noise / count, zero)


def agreement(statistics: Statistics) -> Tensor:
    """The cosine between each worker's gradient and the sum of the others', ``[..., N]``; 0 where one of them is zero.

    >>> import torch
    >>> agreement(Statistics.of(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]]))).tolist()
    [0.4472135954999579, 0.4472135954999579, 0.0]
    """
    count = count_present(statistics.present)
    dots = statistics.dots * count
    return cosine(dots, statistics.squares, statistics.mean_square * count * count, statistics.present)


def cosine(dots: Tensor, squares: Tensor, whole: Tensor, part: Tensor) -> Tensor:
    """The cosine between a gradient and a sum, without the gradient's own part in it.

    Args:
        dots: ``[..., N]``: each gradient's inner product with the sum.
        squares: ``[..., N]``: each gradient's squared length.
        whole: ``[..., 1]``: the squared length of the sum.
        part: ``[..., N]``, boolean: which gradients are in the sum.
    """
    ops = ops_for(squares)
    zero, one = ops.zeros_like(squares), ops.ones_like(squares)
    inside = ops.wide(part)
    others = whole - inside * (2 * dots - squares)
    product = squares * others
    fine = (others > ROUNDING * (squares + whole)) & (product > 0)
    found = (dots - inside * squares) / ops.sqrt(ops.where(fine, product, one))
    return ops.where(fine, ops.clip(found, -1, 1), zero)
