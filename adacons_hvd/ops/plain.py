"""Small operations on Python's own numbers, for statistics that lie on the host.

An operation on a tensor of four numbers costs a hundred times what the four numbers cost. So where a few workers'
statistics are in the host's memory anyway, the same mathematics runs on lists. Every number is a float of 64 bits, and
every sum is made from left to right, so ranks with other versions of Python compute the same bits.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .protocol import Tensor

Number = float | bool
Row = list[Any]


class Plain:
    """An array of Python's numbers: rows along the last axis, and any number of axes before it.

    Operators broadcast as tensors' do, as far as the mathematics needs it: along the last axis, and a single row along
    all others.

    >>> x = Plain([[1.0, 2.0], [3.0, 4.0]], (2, 2))
    >>> (x * total(x)).rows
    [[3.0, 6.0], [21.0, 28.0]]
    """

    __slots__ = ("rows", "shape")

    def __init__(self, rows: list[Row], shape: tuple[int, ...]) -> None:
        self.rows = rows
        self.shape = shape

    @classmethod
    def of(cls, values: Any, shape: tuple[int, ...]) -> Plain:
        """The array of nested lists, or of a number."""
        if not shape:
            return cls([[values]], shape)
        rows = [values] if len(shape) == 1 else values
        for _ in shape[2:]:
            rows = [row for block in rows for row in block]
        return cls(rows, shape)

    def __getitem__(self, index: Any) -> Plain:
        if not (isinstance(index, tuple) and len(index) == 2 and index[0] is Ellipsis and isinstance(index[1], int)):
            raise IndexError(f"only [..., number] is known here, got {index!r}")
        return reshape(Plain([[row[index[1]] for row in self.rows]], (len(self.rows),)), self.shape[:-1])

    def __add__(self, other: Any) -> Plain:
        return _with(self, other, operator.add)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Plain:
        return _with(self, other, operator.sub)

    def __rsub__(self, other: float) -> Plain:
        return _each(self, lambda x: other - x)

    def __mul__(self, other: Any) -> Plain:
        return _with(self, other, operator.mul)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Plain:
        return _with(self, other, _divided)

    def __rtruediv__(self, other: float) -> Plain:
        return _each(self, lambda x: _divided(other, x))

    def __gt__(self, other: Any) -> Plain:
        return _with(self, other, operator.gt)

    def __ge__(self, other: Any) -> Plain:
        return _with(self, other, operator.ge)

    def __lt__(self, other: Any) -> Plain:
        return _with(self, other, operator.lt)

    def __le__(self, other: Any) -> Plain:
        return _with(self, other, operator.le)

    def __eq__(self, other: object) -> Plain:  # type: ignore[override]
        return _with(self, other, operator.eq)

    def __and__(self, other: Plain) -> Plain:
        return _with(self, other, operator.and_)

    def __or__(self, other: Plain) -> Plain:
        return _with(self, other, operator.or_)

    def __invert__(self) -> Plain:
        return _each(self, operator.not_)

    __hash__ = None  # type: ignore[assignment]


def _with(x: Plain, other: Any, function: Callable[[Any, Any], Any]) -> Plain:
    """Apply a function to each pair of elements, of which one side may be broadcast."""
    if not isinstance(other, Plain):
        return Plain([[function(a, other) for a in row] for row in x.rows], x.shape)
    mine, theirs = x.rows, other.rows
    if x.shape == other.shape:
        return Plain([list(map(function, a, b)) for a, b in zip(mine, theirs, strict=True)], x.shape)
    count = max(len(mine), len(theirs))
    rows = []
    for a, b in zip(_times(x, count), _times(other, count), strict=True):
        if len(a) == len(b):
            rows.append(list(map(function, a, b)))
        elif len(b) == 1:
            rows.append([function(value, b[0]) for value in a])
        else:
            rows.append([function(a[0], value) for value in b])
    longer = max(x.shape, other.shape, key=len)
    return Plain(rows, (*longer[:-1], len(rows[0])))


def _each(x: Plain, function: Callable[[Any], Any]) -> Plain:
    return Plain([list(map(function, row)) for row in x.rows], x.shape)


def _divided(x: float, y: float) -> float:
    """``x / y`` as IEEE 754 has it: dividing by zero is no error."""
    if y:
        return x / y
    return math.nan if x == 0 or math.isnan(x) else math.copysign(math.inf, x) * math.copysign(1.0, y)


# --- the operations of `SmallOps` -----------------------------------------------------------------


def owns(tensor: object) -> bool:
    return isinstance(tensor, Plain)


def wide(x: Plain) -> Plain:
    return _each(x, float)


def like(values: Iterable[float], reference: Tensor) -> Plain:
    row = [float(value) for value in values]
    return Plain([row], (len(row),))


def zeros(shape: Sequence[int], reference: Tensor) -> Plain:
    return _filled(0.0, tuple(shape))


def booleans(shape: Sequence[int], value: bool, reference: Tensor) -> Plain:
    return _filled(value, tuple(shape))


def _filled(value: Number, shape: tuple[int, ...]) -> Plain:
    count = math.prod(shape[:-1])
    return Plain([[value] * (shape[-1] if shape else 1) for _ in range(count)], shape)


def zeros_like(x: Plain) -> Plain:
    return _filled(0.0, x.shape)


def ones_like(x: Plain) -> Plain:
    return _filled(1.0, x.shape)


def shape(x: Plain) -> tuple[int, ...]:
    return x.shape


def to_list(x: Plain) -> Any:
    if not x.shape:
        return x.rows[0][0]
    nested: list[Any] = x.rows
    for side in reversed(x.shape[1:-1]):
        nested = [nested[start : start + side] for start in range(0, len(nested), side)]
    return nested if len(x.shape) > 1 else x.rows[0]


def sqrt(x: Plain) -> Plain:
    return _each(x, math.sqrt)


def absolute(x: Plain) -> Plain:
    return _each(x, abs)


def floor(x: Plain) -> Plain:
    return _each(x, lambda value: float(math.floor(value)))


def clip(x: Plain, lowest: float, highest: float) -> Plain:
    return _each(x, lambda value: min(max(value, lowest), highest))


def where(condition: Plain, x: Plain, y: Plain) -> Plain:
    count = max(len(condition.rows), len(x.rows), len(y.rows))
    rows = []
    for c, a, b in zip(_times(condition, count), _times(x, count), _times(y, count), strict=True):
        width = max(len(c), len(a), len(b))
        if len(c) == 1:
            chosen = a if c[0] else b
            rows.append(chosen if len(chosen) == width else chosen * width)
        else:
            a, b = (row if len(row) == width else row * width for row in (a, b))
            rows.append([one if take_it else other for take_it, one, other in zip(c, a, b, strict=True)])
    longest = max(condition.shape, x.shape, y.shape, key=len)
    return Plain(rows, (*longest[:-1], len(rows[0])))


def _times(x: Plain, count: int) -> list[Row]:
    """The rows, or one of them that many times."""
    return x.rows if len(x.rows) == count else x.rows * count


def isfinite(x: Plain) -> Plain:
    return _each(x, math.isfinite)


def total(x: Plain) -> Plain:
    return Plain([[_sum(row)] for row in x.rows], (*x.shape[:-1], 1))


def _sum(row: Row) -> float:
    # Not sum(): from Python 3.12 on that adds floats in another way.
    result = 0.0
    for value in row:
        result += value
    return result


def every(x: Plain) -> Plain:
    return Plain([[all(row)] for row in x.rows], (*x.shape[:-1], 1))


def any_of(x: Plain) -> Plain:
    return Plain([[any(row)] for row in x.rows], (*x.shape[:-1], 1))


def argsort(x: Plain) -> Plain:
    # Python's sort is stable.
    return Plain([sorted(range(len(row)), key=row.__getitem__) for row in x.rows], x.shape)


def take(x: Plain, index: Plain) -> Plain:
    rows = zip(x.rows, index.rows, strict=True)
    return Plain([[row[int(place)] for place in places] for row, places in rows], index.shape)


def stack(tensors: Sequence[Plain]) -> Plain:
    return Plain([row for tensor in tensors for row in tensor.rows], (len(tensors), *tensors[0].shape))


def add_n(tensors: Sequence[Plain]) -> Plain:
    result = tensors[0]
    for tensor in tensors[1:]:
        result = result + tensor
    return result


def concat(tensors: Sequence[Plain]) -> Plain:
    row = [value for tensor in tensors for value in tensor.rows[0]]
    return Plain([row], (len(row),))


def in_row(x: Plain, row: int, rows: int) -> Plain:
    width = x.shape[-1]
    blank = [0.0] * width
    placed = [own if place == row else list(blank) for own in x.rows for place in range(rows)]
    return Plain(placed, (*x.shape[:-1], rows, width))


def reshape(x: Plain, shape: Sequence[int]) -> Plain:
    flat = [value for row in x.rows for value in row]
    known = math.prod(side for side in shape if side != -1)
    sides = tuple(len(flat) // known if side == -1 else side for side in shape)
    return Plain([flat[start : start + sides[-1]] for start in range(0, len(flat), sides[-1])], sides)


def transposed(x: Plain) -> Plain:
    if len(x.shape) != 2:
        raise ValueError(f"only two axes are exchanged here, got the shape {x.shape}")
    return Plain([list(column) for column in zip(*x.rows, strict=True)], (x.shape[1], x.shape[0]))


def first_row(x: Plain) -> Plain:
    return Plain(x.rows[:1], x.shape[-1:])
