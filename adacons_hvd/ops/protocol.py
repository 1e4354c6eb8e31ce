"""The tensor operations that the mathematics needs, as a type: what each framework's module has to offer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

__all__ = ["Ops", "SmallOps", "Tensor"]

#: A tensor of any supported framework, or a :class:`~.plain.Plain`. The mathematics only uses operators and an
#: :class:`Ops`.
Tensor = Any


class SmallOps(Protocol):
    """The operations on statistics, weights and memories. A module with these functions, as is ``ops/plain.py``."""

    def owns(self, tensor: object) -> bool: ...

    def wide(self, x: Tensor) -> Tensor: ...

    def like(self, values: Iterable[float], reference: Tensor) -> Tensor:
        """Constants, where ``reference`` is. They must not be changed in place."""
        ...

    def zeros(self, shape: Sequence[int], reference: Tensor) -> Tensor: ...

    def booleans(self, shape: Sequence[int], value: bool, reference: Tensor) -> Tensor:
        """A tensor that is true everywhere, or false."""
        ...

    def zeros_like(self, x: Tensor) -> Tensor: ...

    def ones_like(self, x: Tensor) -> Tensor: ...

    def shape(self, x: Tensor) -> tuple[int, ...]: ...

    def to_list(self, x: Tensor) -> Any:
        """The values as Python numbers: waits for the device, so never called in a normal step."""
        ...

    def sqrt(self, x: Tensor) -> Tensor: ...

    def absolute(self, x: Tensor) -> Tensor: ...

    def floor(self, x: Tensor) -> Tensor: ...

    def clip(self, x: Tensor, lowest: float, highest: float) -> Tensor: ...

    def where(self, condition: Tensor, x: Tensor, y: Tensor) -> Tensor: ...

    def isfinite(self, x: Tensor) -> Tensor: ...

    def total(self, x: Tensor) -> Tensor:
        """The sum over the last axis, which is kept."""
        ...

    def every(self, x: Tensor) -> Tensor:
        """Whether all are true along the last axis, which is kept."""
        ...

    def any_of(self, x: Tensor) -> Tensor:
        """Whether any is true along the last axis, which is kept."""
        ...

    def argsort(self, x: Tensor) -> Tensor:
        """The stable ascending order along the last axis: the same on every rank, ties included."""
        ...

    def take(self, x: Tensor, index: Tensor) -> Tensor:
        """``x[..., index[..., k]]`` along the last axis."""
        ...

    def stack(self, tensors: Sequence[Tensor]) -> Tensor: ...

    def add_n(self, tensors: Sequence[Tensor]) -> Tensor: ...

    def concat(self, tensors: Sequence[Tensor]) -> Tensor:
        """Join flat tensors."""
        ...

    def in_row(self, x: Tensor, row: int, rows: int) -> Tensor:
        """``[..., rows, k]``: zeros, but for ``x``, ``[..., k]``, in one row."""
        ...

    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor: ...

    def transposed(self, x: Tensor) -> Tensor:
        """``x`` with its last two axes exchanged."""
        ...

    def first_row(self, x: Tensor) -> Tensor:
        """The first of the rows along the last axis."""
        ...


class Ops(SmallOps, Protocol):
    """A framework's operations. A module with these functions for each framework."""

    def floating(self, x: Tensor) -> Tensor:
        """``x`` as real numbers that have fractions; whole numbers are converted."""
        ...

    def beside(self, x: Tensor, reference: Tensor) -> Tensor:
        """``x`` on the device of ``reference``; a :class:`~.plain.Plain` becomes a tensor there."""
        ...

    def cast_like(self, x: Tensor, reference: Tensor) -> Tensor:
        """``x`` in the element type of ``reference``."""
        ...

    def on_its_way(self, x: Tensor) -> Callable[[], list[float]]:
        """Begin to copy a flat tensor to the host; the function that is returned waits for its values."""
        ...

    def on_host(self, x: Tensor) -> bool:
        """Whether reading the values of ``x`` waits for nothing."""
        ...

    def diagonal(self, x: Tensor) -> Tensor: ...

    def join(self, tensors: Sequence[Tensor], axis: int) -> Tensor:
        """Join tensors along an axis that is there."""
        ...

    def bordered(self, table: Tensor, across: Tensor, corner: Tensor) -> Tensor:
        """The symmetric matrix with ``table`` and ``corner`` on its diagonal, and ``across`` on the table's right."""
        ...

    def solve(self, matrix: Tensor, right: Tensor, ridge: Tensor) -> Tensor:
        """The solution w of ``(matrix + ridge * I) w = right``, for ``[..., n, n]``, ``[..., n]`` and ``[..., 1]``.

        By Cholesky's method: the matrix in brackets must be positive definite. The matrix may be overwritten.
        """
        ...

    # --- large operations ---

    def recorded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` with a key before its arguments, its operations recorded once, where that is faster.

        It must depend on nothing but its arguments and what the key tells, change nothing, and read no number. In the
        whole process the key says which function it is, too.
        """
        ...

    def bound(self, function: Callable[[Tensor], Tensor], argument: Tensor) -> Callable[[], Tensor]:
        """``function`` of this argument, in the form in which it runs in training: as it is."""
        ...

    def gradient(self, x: Tensor, half: bool = False) -> Tensor:
        """``x`` in an element type that gradients have."""
        ...

    def placed(self, x: Tensor, row: int, rows: int, out: Tensor) -> Tensor:
        """A matrix of zeros with ``x`` in one row, flat."""
        ...

    def width(self, x: Tensor) -> int:
        """The bytes of one element."""
        ...

    def is_half(self, x: Tensor) -> bool:
        """Whether the element type has too little range for sums and for unit-length results."""
        ...

    def room(self, x: Tensor, length: int, half: bool) -> Tensor:
        """Memory for a flat result of ``x``'s type, or a half-precision one, for use in every step."""
        ...

    def blank_unless(self, condition: Tensor, x: Tensor) -> Tensor:
        """``x``, or zeros in its place unless the 0-dimensional ``condition`` holds."""
        ...

    def square(self, gradient: Tensor) -> Tensor:
        """``<g, g>`` of a flat gradient."""
        ...

    def moments(self, gradient: Tensor, summed: Tensor) -> Tensor:
        """``[<g, s>, <g, g>]`` of two flat tensors, each read from memory once."""
        ...

    def gramian(self, rows: Tensor) -> Tensor:
        """``rows @ rows.T`` of an N x d matrix."""
        ...

    def consensus(self, rows: Tensor) -> Tensor:
        """``[<g_i, sum_j g_j>, <g_i, g_i>]`` for each row of an N x d matrix."""
        ...

    def combine(self, weights: Tensor, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """``weights @ rows``, reading ``rows`` once, into ``out`` if given."""
        ...

    def combine_segments(
        self,
        rows: Tensor,
        pieces: Sequence[tuple[int, int, Tensor]],
        out: Tensor | None,
        past: Tensor | None = None,
    ) -> Tensor:
        """:func:`combine` with other weights for each ``(start, stop, weights)``; the rest is unset.

        Where there is a ``past``, the weights go on with those of its rows, the last excepted.
        """
        ...

    def assemble(self, like: Tensor, pieces: Sequence[tuple[int, int, Tensor]], out: Tensor | None) -> Tensor:
        """A flat tensor as long as ``like``'s rows, with these parts in it; the rest is unset."""
        ...

    # --- the mean gradients of earlier steps ---

    def working(self, x: Tensor) -> Tensor:
        """``x`` in the precision arithmetic is done in: float32, or float64 if it came so."""
        ...

    def past_room(self, x: Tensor, steps: int, length: int) -> Tensor:
        """Zeros for the means of so many steps, and one row more for what is not to be kept, in working precision."""
        ...

    def keep_row(self, past: Tensor, slot: Tensor, row: Tensor) -> Tensor:
        """``past``, changed in place if it can be, with ``row`` in the place that ``slot``, a ``[1]``, says."""
        ...

    def current(self, past: Tensor) -> Tensor:
        """The rows as they are now."""
        ...

    def filled(self, past: Tensor, rows: Tensor) -> Tensor:
        """``past``, changed in place, with these rows at its beginning and zeros elsewhere."""
        ...

    def bytes_of(self, x: Tensor) -> int: ...

    def cross(self, rows: Tensor, others: Tensor) -> Tensor:
        """``rows @ others.T`` of an N x d and an m x d matrix."""
        ...

    def scale_segments(self, buffer: Tensor, pieces: Sequence[tuple[int, int, Tensor]]) -> Tensor:
        """Multiply ``buffer`` in place by a 0-dimensional weight for each ``(start, stop, weight)``."""
        ...

    def narrow_segments(self, buffer: Tensor, pieces: Sequence[tuple[int, int, Tensor]], out: Tensor) -> Tensor:
        """``buffer`` times a 0-dimensional factor for each ``(start, stop, factor)``, in half precision."""
        ...

    def signs(self, length: int, known: Tensor | None, reference: Tensor) -> Tensor:
        """Random signs, the same everywhere and always; ``known`` if those are already."""
        ...

    def sketch_segments(
        self,
        buffer: Tensor,
        segments: Sequence[tuple[int, int, int]],
        lengths: Sequence[int],
        signs: Tensor,
        stride: int,
        step: Tensor,
        out: Tensor,
    ) -> Tensor:
        """Each segment's pieces of the length given, added up with random signs; side by side."""
        ...

    # --- sparse operations ---

    def pack_rows(self, rows: Tensor, values: Tensor, rank: int, workers: int) -> Tensor:
        """Rows and their values as one matrix of the values' type: a row's first elements say which it is, and whose.

        They are the bytes of ``row * workers + rank``, of which nothing must be computed.
        """
        ...

    def unpack_rows(self, packed: Tensor, workers: int) -> tuple[Tensor, Tensor, Tensor]:
        """Undo :func:`pack_rows`, for those of all workers: owners, rows and values."""
        ...

    def distinct(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The rows, each of them once, and for each of ``rows`` its place among them."""
        ...

    def sum_rows(self, values: Tensor, places: Tensor, rows: Tensor) -> Tensor:
        """Add up the values that have one place among :func:`distinct` rows.

        They are added in a fixed order, so that every rank computes the same bits.
        """
        ...

    def sparse_consensus(self, owners: Tensor, places: Tensor, summed: Tensor, values: Tensor, workers: int) -> Tensor:
        """:func:`consensus` of gradients given as rows that belong to workers, distinct for each.

        ``summed`` is their :func:`sum_rows`.
        """
        ...

    def sparse_gramian(self, owners: Tensor, places: Tensor, rows: Tensor, values: Tensor, workers: int) -> Tensor:
        """:func:`gramian` of gradients given as rows that belong to workers, distinct for each."""
        ...

    def sparse_weigh(self, owners: Tensor, values: Tensor, weights: Tensor) -> Tensor:
        """Multiply each row by its owner's weight."""
        ...

    # --- comparing replicas ---

    def digest(self, tensors: Iterable[Tensor]) -> Tensor:
        """A number (int64) that differs if bits of the tensors do, and is the same on any processor if not."""
        ...

    def arithmetic(self, device: Any) -> str:
        """Name the arithmetic of a device. Ranks must have it in common, because last bits of results depend on it."""
        ...
