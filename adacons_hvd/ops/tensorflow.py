"""TensorFlow's operations; see the package docstring for what belongs here and why.

They mean what PyTorch's do, with two differences that a graph asks for. Nothing is changed in
place: where PyTorch's functions fill a buffer, these return a new tensor. And nothing may need a
value while a ``tf.function`` is traced, so lengths come from static shapes; only the number of
rows of a sparse gradient is free to differ from step to step.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tensorflow as tf

from . import TURN, tensorflow_graphs
from .plain import Plain
from .protocol import Tensor

# Elements handled at a time by the large operations: a block is read from memory once and then
# used from cache, and block results are added in float64, so that sums over millions of elements
# keep single-precision accuracy. Loops over blocks are unrolled into the graph, so blocks are
# also large enough to keep it small.
_BLOCK_CPU = 1 << 18
_BLOCK_ACCELERATOR = 1 << 24


def owns(tensor: object) -> bool:
    return isinstance(tensor, (tf.Tensor, tf.Variable))


# --- small operations -----------------------------------------------------------------------


def wide(x: tf.Tensor) -> tf.Tensor:
    return tf.cast(x, tf.float64)


def floating(x: tf.Tensor) -> tf.Tensor:
    """``x`` as real numbers that have fractions; whole numbers are converted."""
    if x.dtype.is_complex:
        raise TypeError("an aggregator combines real gradients; give a complex one's real and imaginary parts instead")
    return x if x.dtype.is_floating else tf.cast(x, tf.float32)


def like(values: Iterable[float], reference: tf.Tensor) -> tf.Tensor:
    return tf.constant([float(value) for value in values], tf.float64)


def cast_like(x: tf.Tensor, reference: tf.Tensor) -> tf.Tensor:
    """``x`` in the element type of ``reference``."""
    return tf.cast(x, reference.dtype)


def beside(x: Tensor, reference: tf.Tensor) -> tf.Tensor:
    """``x``: TensorFlow moves it to the device of ``reference`` when both are used."""
    return tf.reshape(tf.constant(x.rows), x.shape) if isinstance(x, Plain) else x


def on_host(x: tf.Tensor) -> bool:
    """Whether reading the values of ``x`` waits for nothing: never, since a graph has none."""
    return False


def zeros(shape: Sequence[int], reference: tf.Tensor) -> tf.Tensor:
    return tf.zeros(tuple(shape), tf.float64)


def booleans(shape: Sequence[int], value: bool, reference: tf.Tensor) -> tf.Tensor:
    """A tensor that is true everywhere, or false."""
    return tf.fill(tuple(shape), value)


def zeros_like(x: tf.Tensor) -> tf.Tensor:
    return tf.zeros_like(x)


def ones_like(x: tf.Tensor) -> tf.Tensor:
    return tf.ones_like(x)


def shape(x: tf.Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def to_list(x: tf.Tensor) -> list[Any]:
    """The values as Python numbers: waits for the device, so never called in a normal step."""
    values: list[Any] = x.numpy().tolist()
    return values


def sqrt(x: tf.Tensor) -> tf.Tensor:
    return tf.sqrt(x)


def absolute(x: tf.Tensor) -> tf.Tensor:
    return tf.abs(x)


def floor(x: tf.Tensor) -> tf.Tensor:
    return tf.floor(x)


def clip(x: tf.Tensor, lowest: float, highest: float) -> tf.Tensor:
    return tf.clip_by_value(x, lowest, highest)


def where(condition: tf.Tensor, x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    return tf.where(condition, x, y)


def isfinite(x: tf.Tensor) -> tf.Tensor:
    return tf.math.is_finite(x)


def total(x: tf.Tensor) -> tf.Tensor:
    """The sum over the last axis, which is kept."""
    return tf.reduce_sum(x, -1, keepdims=True)


def every(x: tf.Tensor) -> tf.Tensor:
    """Whether all are true along the last axis, which is kept."""
    return tf.reduce_all(x, -1, keepdims=True)


def any_of(x: tf.Tensor) -> tf.Tensor:
    """Whether any is true along the last axis, which is kept."""
    return tf.reduce_any(x, -1, keepdims=True)


def argsort(x: tf.Tensor) -> tf.Tensor:
    """The stable ascending order along the last axis: the same on every rank, ties included."""
    return tf.argsort(x, axis=-1, stable=True)


def take(x: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
    """``x[..., index[..., k]]`` along the last axis."""
    return tf.gather(x, tf.cast(index, tf.int64), axis=-1, batch_dims=len(x.shape) - 1)


def diagonal(x: tf.Tensor) -> tf.Tensor:
    return tf.linalg.diag_part(x)


def stack(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    return tf.stack(list(tensors))


def add_n(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    result = tensors[0]
    for tensor in tensors[1:]:
        result = result + tensor
    return result


def concat(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    """Join flat tensors."""
    return tf.concat(list(tensors), 0)


def in_row(x: tf.Tensor, row: int, rows: int) -> tf.Tensor:
    """``[..., rows, k]``: zeros, but for ``x``, ``[..., k]``, in one row."""
    return tf.pad(tf.expand_dims(x, -2), [[0, 0]] * (x.shape.rank - 1) + [[row, rows - 1 - row], [0, 0]])


def join(tensors: Sequence[tf.Tensor], axis: int) -> tf.Tensor:
    """Join tensors along an axis that is there."""
    return tf.concat(list(tensors), axis)


def bordered(table: tf.Tensor, across: tf.Tensor, corner: tf.Tensor) -> tf.Tensor:
    """The symmetric matrix with ``table`` and ``corner`` on its diagonal, and ``across`` on the table's right."""
    return join([join([table, across], -1), join([transposed(across), corner], -1)], -2)


def transposed(x: tf.Tensor) -> tf.Tensor:
    """``x`` with its last two axes exchanged."""
    return tf.linalg.matrix_transpose(x)


def first_row(x: tf.Tensor) -> tf.Tensor:
    """The first of the rows along the last axis."""
    return tf.reshape(x, (-1, x.shape[-1]))[0]


def on_its_way(x: tf.Tensor) -> Callable[[], list[float]]:
    """Begin to copy a flat tensor to the host; the function that is returned waits for its values."""
    return lambda: x.numpy().tolist()  # type: ignore[no-any-return]


def solve(matrix: tf.Tensor, right: tf.Tensor, ridge: tf.Tensor) -> tf.Tensor:
    """The solution w of ``(matrix + ridge * I) w = right``, for ``[..., n, n]``, ``[..., n]`` and ``[..., 1]``."""
    damped = tf.linalg.set_diag(matrix, tf.linalg.diag_part(matrix) + ridge)
    return tf.linalg.cholesky_solve(tf.linalg.cholesky(damped), right[..., None])[..., 0]


def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with a key before its arguments, its graph made once for all graphs that it is a part of."""
    return tensorflow_graphs.recorded(function)


def reshape(x: tf.Tensor, shape: Sequence[int]) -> tf.Tensor:
    return tf.reshape(x, tuple(shape))


# --- large operations -----------------------------------------------------------------------


def bound(function: Callable[[tf.Tensor], tf.Tensor], argument: tf.Tensor) -> Callable[[], tf.Tensor]:
    """``function`` of this argument, in the form in which it runs in training: a graph."""
    graph = tensorflow_graphs.make_graph(function, tf.TensorSpec(argument.shape, argument.dtype))
    return lambda: graph(argument)


def gradient(x: tf.Tensor, half: bool = False) -> tf.Tensor:
    """``x`` in an element type that gradients have."""
    return tf.cast(x, tf.float16 if half else tf.float32)


def width(x: tf.Tensor) -> int:
    """The bytes of one element."""
    return int(x.dtype.size)


def is_half(x: tf.Tensor) -> bool:
    """Whether the element type has too little range for sums and for unit-length results."""
    return bool(x.dtype == tf.float16)


def room(x: tf.Tensor, length: int, half: bool) -> tf.Tensor | None:
    """Memory for a flat result: none, because TensorFlow plans memory by itself."""
    return None


def placed(x: tf.Tensor, row: int, rows: int, out: tf.Tensor | None) -> tf.Tensor:
    """A matrix of zeros with ``x`` in one row, flat."""
    length = int(x.shape[0])
    return tf.pad(x, [[row * length, (rows - 1 - row) * length]])


def blank_unless(condition: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """``x``, or zeros in its place unless the 0-dimensional ``condition`` holds."""
    return tf.where(condition, x, tf.zeros_like(x))


def _has_accelerator() -> bool:
    return bool(tf.config.list_physical_devices("GPU"))


def _blocks(length: int, rows: int) -> list[slice]:
    size = _BLOCK_ACCELERATOR if _has_accelerator() else _BLOCK_CPU
    size = max(1024, size // rows)
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _working(x: tf.Tensor) -> tf.Tensor:
    """``x`` in the precision arithmetic is done in: float32, or float64 if it came so."""
    return x if x.dtype in (tf.float32, tf.float64) else tf.cast(x, tf.float32)


def _dot(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    """``<x, y>`` of two flat tensors of equal length, in float64."""
    length = x.shape[0]
    if length is None:
        return tf.reduce_sum(wide(x) * wide(y))
    # TensorFlow's own dot product adds one by one; a sum over a tensor adds in pairs.
    parts = [wide(tf.reduce_sum(_working(x[block]) * _working(y[block]))) for block in _blocks(length, 2)]
    return add_n(parts) if parts else zeros((), x)


def _products(part: tf.Tensor) -> tf.Tensor:
    """``part @ part.T``, never in the ten-bit arithmetic that TensorFlow uses on a GPU."""
    if _has_accelerator():
        return tf.stack([tf.reduce_sum(part * row, 1) for row in tf.unstack(part)])
    return tf.matmul(part, part, transpose_b=True)


def square(gradient: tf.Tensor) -> tf.Tensor:
    """``<g, g>`` of a flat gradient."""
    return _dot(gradient, gradient)


def moments(gradient: tf.Tensor, summed: tf.Tensor) -> tf.Tensor:
    """``[<g, s>, <g, g>]`` of two flat tensors."""
    return tf.stack([_dot(gradient, summed), _dot(gradient, gradient)])


def gramian(rows: tf.Tensor) -> tf.Tensor:
    """``rows @ rows.T`` of an N x d matrix."""
    workers, length = rows.shape
    parts = [wide(_products(_working(rows[:, block]))) for block in _blocks(length, workers)]
    return add_n(parts) if parts else zeros((workers, workers), rows)


# Up to this many workers the whole Gramian is cheaper than the two moments it contains, because it
# is a single matrix product; beyond, its N * N * d multiplications show.
_FEW_WORKERS = 16


def consensus(rows: tf.Tensor) -> tf.Tensor:
    """``[<g_i, sum_j g_j>, <g_i, g_i>]`` for each row of an N x d matrix."""
    workers, length = rows.shape
    if workers <= _FEW_WORKERS:
        products = gramian(rows)
        return tf.stack([tf.reduce_sum(products, 1), diagonal(products)], 1)
    parts = []
    for block in _blocks(length, workers):
        part = _working(rows[:, block])
        dots = tf.reduce_sum(part * tf.reduce_sum(part, 0), 1)
        parts.append(wide(tf.stack([dots, tf.reduce_sum(part * part, 1)], 1)))
    return add_n(parts) if parts else zeros((workers, 2), rows)


def combine(weights: tf.Tensor, rows: tf.Tensor, out: tf.Tensor | None = None) -> tf.Tensor:
    """``weights @ rows``, in the type of ``rows``."""
    if _has_accelerator():
        working = tf.float64 if rows.dtype == tf.float64 else tf.float32
        scales = tf.unstack(tf.cast(weights, working))
        weighted = [_working(row) * w for row, w in zip(tf.unstack(rows), scales, strict=True)]
        return tf.cast(add_n(weighted), rows.dtype)
    parts = []
    for block in [slice(None)] if rows.dtype in (tf.float32, tf.float64) else _blocks(rows.shape[1], rows.shape[0]):
        part = _working(rows[:, block])
        parts.append(tf.cast(tf.matmul(tf.cast(weights, part.dtype)[None], part)[0], rows.dtype))
    return tf.concat(parts, 0) if parts else tf.zeros((0,), rows.dtype)


def combine_segments(
    rows: tf.Tensor,
    pieces: Sequence[tuple[int, int, tf.Tensor]],
    out: tf.Tensor | None,
    past: tf.Tensor | None = None,
) -> tf.Tensor:
    """:func:`combine` with other weights for each ``(start, stop, weights)``; zeros elsewhere.

    Where there is a ``past``, the weights go on with those of its rows, the last excepted.
    """
    workers = rows.shape[0]
    parts = []
    for start, stop, weights in pieces:
        part = rows[:, start:stop]
        if past is None:
            parts.append((start, stop, combine(weights, part)))
        else:
            whole = combine(weights[:workers], _working(part)) + combine(weights[workers:], past[:-1, start:stop])
            parts.append((start, stop, tf.cast(whole, rows.dtype)))
    return _assemble(rows.shape[1], rows.dtype, parts)


def assemble(like: tf.Tensor, pieces: Sequence[tuple[int, int, tf.Tensor]], out: tf.Tensor | None) -> tf.Tensor:
    """A flat tensor as long as ``like``'s rows, with these parts in it; zeros elsewhere."""
    return _assemble(like.shape[-1], like.dtype, pieces)


# --- the mean gradients of earlier steps ----------------------------------------------------


def working(x: tf.Tensor) -> tf.Tensor:
    """``x`` in the precision arithmetic is done in: float32, or float64 if it came so."""
    return _working(x)


def past_room(x: tf.Tensor, steps: int, length: int) -> tf.Tensor:
    """Zeros for the means of so many steps, and one row more for what is not to be kept, in working precision."""
    return tf.zeros((steps + 1, length), tf.float64 if x.dtype == tf.float64 else tf.float32)


def keep_row(past: tf.Tensor, slot: tf.Tensor, row: tf.Tensor) -> tf.Tensor:
    """``past`` with ``row`` in the place that ``slot``, a ``[1]``, says. A variable is changed in place."""
    row, place = tf.cast(row, past.dtype)[None], tf.cast(slot, tf.int64)
    if isinstance(past, tf.Variable):
        return past.scatter_update(tf.IndexedSlices(row, place))
    return tf.tensor_scatter_nd_update(past, place[:, None], row)


def current(past: tf.Tensor) -> tf.Tensor:
    """The rows as they are now."""
    return past.read_value() if isinstance(past, tf.Variable) else past


def filled(past: tf.Variable, rows: tf.Tensor) -> tf.Variable:
    """``past``, changed in place, with these rows at its beginning and zeros elsewhere."""
    around = [[0, past.shape[0] - rows.shape[0]], [0, past.shape[1] - rows.shape[1]]]
    past.assign(tf.pad(tf.cast(rows, past.dtype), around))
    return past


def bytes_of(x: tf.Tensor) -> int:
    return int(x.shape.num_elements() * x.dtype.size)


def cross(rows: tf.Tensor, others: tf.Tensor) -> tf.Tensor:
    """``rows @ others.T`` of an N x d and an m x d matrix."""
    parts = []
    for block in _blocks(rows.shape[1], rows.shape[0] + others.shape[0]):
        part, other = _working(rows[:, block]), others[:, block]
        if _has_accelerator():  # never in the ten-bit arithmetic that TensorFlow uses on a GPU
            parts.append(wide(tf.stack([tf.reduce_sum(part * row, 1) for row in tf.unstack(other)], 1)))
        else:
            parts.append(wide(tf.matmul(part, other, transpose_b=True)))
    return add_n(parts) if parts else zeros((rows.shape[0], others.shape[0]), rows)


def scale_segments(buffer: tf.Tensor, pieces: Sequence[tuple[int, int, tf.Tensor]]) -> tf.Tensor:
    """``buffer`` times a 0-dimensional weight for each ``(start, stop, weight)``; zeros elsewhere."""
    scaled = []
    for start, stop, weight in pieces:
        # The weight may be outside a half's range although the product is not.
        part = _working(buffer[start:stop])
        scaled.append((start, stop, tf.cast(part * tf.cast(weight, part.dtype), buffer.dtype)))
    return _assemble(buffer.shape[0], buffer.dtype, scaled)


def narrow_segments(
    buffer: tf.Tensor,
    pieces: Sequence[tuple[int, int, tf.Tensor]],
    out: tf.Tensor | None,
) -> tf.Tensor:
    """``buffer`` times a 0-dimensional factor for each ``(start, stop, factor)``, in half precision."""
    narrow = []
    for start, stop, factor in pieces:
        part = _working(buffer[start:stop])
        narrow.append((start, stop, tf.cast(part * tf.cast(factor, part.dtype), tf.float16)))
    return _assemble(buffer.shape[0], tf.float16, narrow)


def signs(length: int, known: tf.Tensor | None, reference: tf.Tensor) -> tf.Tensor:
    """Random signs, the same everywhere and always; ``known`` if those are already."""
    if known is not None:
        return known
    draws = tf.io.decode_raw(tf.constant(random.Random(0).randbytes(length)), tf.uint8)
    return tf.cast(tf.bitwise.bitwise_and(draws, 1), _working(reference).dtype) * 2 - 1


def sketch_segments(
    buffer: tf.Tensor,
    segments: Sequence[tuple[int, int, int]],
    lengths: Sequence[int],
    signs: tf.Tensor,
    stride: int,
    step: tf.Tensor,
    out: tf.Tensor | None,
) -> tf.Tensor:
    """Each segment's pieces of the length given, added up with random signs; side by side."""
    results = []
    for (start, stop, _), length in zip(segments, lengths, strict=True):
        count = -(-(stop - start) // length)
        flips = tf.cast(_flips(step, count), signs.dtype)
        pieces = []
        for piece in range(count):
            part = _working(buffer[start + piece * length : min(start + (piece + 1) * length, stop)])
            part = part * signs[piece * stride : piece * stride + part.shape[0]] * flips[piece]
            pieces.append(tf.pad(part, [[0, length - part.shape[0]]]))
        results.append(add_n(pieces))
    return tf.concat(results, 0)


def _flips(step: tf.Tensor, count: int) -> tf.Tensor:
    """``count`` signs that are others in every step."""
    turns = tf.range(1, count + 1, dtype=tf.float64) * TURN
    return tf.where(tf.cos(turns * (step + 1) * (step + 2)) < 0, -tf.ones_like(turns), tf.ones_like(turns))


def _assemble(length: int, dtype: tf.DType, pieces: Sequence[tuple[int, int, tf.Tensor]]) -> tf.Tensor:
    """A flat tensor made of pieces in ascending order, with zeros where there is none."""
    parts = []
    position = 0
    for start, stop, part in pieces:
        if start > position:
            parts.append(tf.zeros((start - position,), dtype))
        parts.append(part)
        position = stop
    if position < length:
        parts.append(tf.zeros((length - position,), dtype))
    return parts[0] if len(parts) == 1 else tf.concat(parts, 0)


# --- sparse operations ----------------------------------------------------------------------


def pack_rows(rows: tf.Tensor, values: tf.Tensor, rank: int, workers: int) -> tf.Tensor:
    """Rows and their values as one matrix of the values' type."""
    keys = tf.bitcast(rows * workers + rank, values.dtype)
    return tf.concat([tf.reshape(keys, (-1, tf.int64.size // values.dtype.size)), values], 1)


def unpack_rows(packed: tf.Tensor, workers: int) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Undo :func:`pack_rows`: owners, rows and values."""
    width = tf.int64.size // packed.dtype.size
    keys = tf.bitcast(packed[:, :width] if width > 1 else packed[:, 0], tf.int64)
    return keys % workers, keys // workers, packed[:, width:]


def distinct(rows: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The rows, each of them once, in the order in which they first appear, and for each of ``rows`` its place."""
    unique, places = tf.unique(rows)
    return unique, places


def sum_rows(values: tf.Tensor, places: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
    """Add up the values that have one place among distinct ``rows``."""
    return tf.math.unsorted_segment_sum(_working(values), places, tf.size(rows))


def sparse_consensus(
    owners: tf.Tensor, places: tf.Tensor, summed: tf.Tensor, values: tf.Tensor, workers: int
) -> tf.Tensor:
    """:func:`consensus` of gradients given as rows that belong to workers, distinct for each."""
    values = _working(values)
    dots = tf.reduce_sum(wide(values) * wide(tf.gather(summed, places)), 1)
    squares = tf.reduce_sum(wide(values) * wide(values), 1)
    return tf.math.unsorted_segment_sum(tf.stack([dots, squares], 1), owners, workers)


def sparse_gramian(owners: tf.Tensor, places: tf.Tensor, rows: tf.Tensor, values: tf.Tensor, workers: int) -> tf.Tensor:
    """:func:`gramian` of gradients given as rows that belong to workers, distinct for each."""
    values = _working(values)
    count = tf.cast(tf.size(rows), tf.int64)
    place = owners * count + tf.cast(places, tf.int64)
    dense = tf.math.unsorted_segment_sum(values, place, workers * count)
    dense = wide(tf.reshape(dense, (workers, count * tf.cast(tf.shape(values)[1], tf.int64))))
    result = tf.matmul(dense, dense, transpose_b=True)
    return tf.ensure_shape(result, (workers, workers))


def sparse_weigh(owners: tf.Tensor, values: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """Multiply each row by its owner's weight."""
    values = _working(values)
    return values * tf.gather(tf.cast(weights, values.dtype), owners)[:, None]


# --- comparing replicas ---------------------------------------------------------------------


def digest(tensors: Iterable[tf.Tensor]) -> tf.Tensor:
    """A number (int64) that differs if bits of the tensors do.

    The sum of their bits, eight bytes at a time. Integers are added, so the order in which a device adds makes no
    difference: equal tensors have equal digests whatever processors hold them. Each tensor is read where it is.
    """
    sums = []
    for tensor in tensors:
        with tf.device(tensor.device):
            sums.append(_sum_of_words(tf.reshape(tensor, (-1,))))
    return add_n(sums) if sums else tf.constant(0, tf.int64)


def _sum_of_words(flat: tf.Tensor) -> tf.Tensor:
    if flat.dtype == tf.bool:
        flat = tf.cast(flat, tf.uint8)
    size = flat.dtype.size
    if size >= 8:
        return tf.reduce_sum(tf.bitcast(flat, tf.int64))
    together = 8 // size
    whole = flat.shape[0] // together * together
    rest = flat.shape[0] - whole
    total = tf.reduce_sum(tf.bitcast(tf.reshape(flat[:whole] if rest else flat, (-1, together)), tf.int64))
    if rest:
        total += tf.reduce_sum(tf.cast(tf.bitcast(flat[whole:], tf.uint8), tf.int64))
    return total


def arithmetic(device: str) -> str:
    """Name the arithmetic of a device. Ranks must have it in common, because last bits of results depend on it."""
    return "TensorFlow's operations"
