"""PyTorch's operations; see the package docstring for what belongs here and why."""

from __future__ import annotations

import functools
import importlib.util
import random
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..torch_host import OnItsWay
from . import TURN
from .plain import Plain
from .protocol import Tensor
from .torch_graphs import Recorded

if TYPE_CHECKING:
    from . import torch_cuda

# Elements handled at a time by the large operations. Each block is read from memory once and then
# used from cache by everything that needs it, and block results are added in float64, so that
# sums over millions of elements keep single-precision accuracy. On an accelerator a block is
# larger, because there a launch costs more than a trip to memory.
_BLOCK_CPU = 1 << 17
_BLOCK_ACCELERATOR = 1 << 24


def owns(tensor: object) -> bool:
    return isinstance(tensor, torch.Tensor)


# --- small operations -----------------------------------------------------------------------


def wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float64)


def floating(x: torch.Tensor) -> torch.Tensor:
    """``x`` as real numbers that have fractions; whole numbers are converted."""
    if x.is_complex():
        raise TypeError(
            "an aggregator combines real gradients; give complex ones as torch.view_as_real(...).flatten(1)"
        )
    return x if x.is_floating_point() else x.to(torch.get_default_dtype())


def like(values: Iterable[float], reference: torch.Tensor) -> torch.Tensor:
    """Constants, where ``reference`` is. They must not be changed in place."""
    if reference.device.type == "cpu":
        return torch.tensor(list(values), dtype=torch.float64)
    return _constant(tuple(values), reference.device)


@functools.cache
def _constant(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Numbers brought to an accelerator, and kept: the host waits for the copy, and every step needs the same ones.

    They are kept for good, because what was recorded goes on reading them where they are.
    """
    return torch.tensor(values, dtype=torch.float64, device=device)


def cast_like(x: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """``x`` in the element type of ``reference``."""
    return x.to(reference.dtype)


def beside(x: Tensor, reference: torch.Tensor) -> torch.Tensor:
    """``x`` on the device of ``reference``; a :class:`Plain` becomes a tensor there."""
    if isinstance(x, Plain):
        kind = torch.bool if isinstance(x.rows[0][0], bool) else torch.float64
        return torch.tensor(x.rows, dtype=kind, device=reference.device).view(x.shape)
    moved: torch.Tensor = x.to(reference.device)
    return moved


def on_host(x: torch.Tensor) -> bool:
    """Whether reading the values of ``x`` waits for nothing."""
    return x.device.type == "cpu"


def zeros(shape: Sequence[int], reference: torch.Tensor) -> torch.Tensor:
    return torch.zeros(tuple(shape), dtype=torch.float64, device=reference.device)


def booleans(shape: Sequence[int], value: bool, reference: torch.Tensor) -> torch.Tensor:
    """A tensor that is true everywhere, or false."""
    return torch.full(tuple(shape), value, dtype=torch.bool, device=reference.device)


def zeros_like(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x)


def ones_like(x: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(x)


def shape(x: torch.Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def to_list(x: torch.Tensor) -> list[Any]:
    """The values as Python numbers: waits for the device, so never called in a normal step."""
    return x.tolist()


def sqrt(x: torch.Tensor) -> torch.Tensor:
    return torch.sqrt(x)


def absolute(x: torch.Tensor) -> torch.Tensor:
    return torch.abs(x)


def floor(x: torch.Tensor) -> torch.Tensor:
    return torch.floor(x)


def clip(x: torch.Tensor, lowest: float, highest: float) -> torch.Tensor:
    return torch.clamp(x, lowest, highest)


def where(condition: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.where(condition, x, y)


def isfinite(x: torch.Tensor) -> torch.Tensor:
    return torch.isfinite(x)


def total(x: torch.Tensor) -> torch.Tensor:
    """The sum over the last axis, which is kept."""
    return x.sum(-1, keepdim=True)


def every(x: torch.Tensor) -> torch.Tensor:
    """Whether all are true along the last axis, which is kept."""
    return x.all(-1, keepdim=True)


def any_of(x: torch.Tensor) -> torch.Tensor:
    """Whether any is true along the last axis, which is kept."""
    return x.any(-1, keepdim=True)


def argsort(x: torch.Tensor) -> torch.Tensor:
    """The stable ascending order along the last axis: the same on every rank, ties included."""
    return torch.argsort(x, dim=-1, stable=True)


def take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``x[..., index[..., k]]`` along the last axis."""
    return torch.gather(x, -1, index.to(torch.int64))


def diagonal(x: torch.Tensor) -> torch.Tensor:
    return torch.diagonal(x, dim1=-2, dim2=-1)


def stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(tensors))


def add_n(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    result = tensors[0]
    for tensor in tensors[1:]:
        result = result + tensor
    return result


def concat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Join flat tensors."""
    return torch.cat(list(tensors))


def in_row(x: torch.Tensor, row: int, rows: int) -> torch.Tensor:
    """``[..., rows, k]``: zeros, but for ``x``, ``[..., k]``, in one row."""
    result = x.new_zeros((*x.shape[:-1], rows, x.shape[-1]))
    result[..., row, :] = x
    return result


def join(tensors: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
    """Join tensors along an axis that is there."""
    return torch.cat(list(tensors), axis)


def bordered(table: torch.Tensor, across: torch.Tensor, corner: torch.Tensor) -> torch.Tensor:
    """The symmetric matrix with ``table`` and ``corner`` on its diagonal, and ``across`` on the table's right."""
    n, size = table.shape[-1], table.shape[-1] + corner.shape[-1]
    result = table.new_empty((*table.shape[:-2], size, size))  # written once; two times join() would write it twice
    result[..., :n, :n], result[..., n:, n:] = table, corner
    result[..., :n, n:], result[..., n:, :n] = across, across.mT
    return result


def transposed(x: torch.Tensor) -> torch.Tensor:
    """``x`` with its last two axes exchanged."""
    return x.mT


def first_row(x: torch.Tensor) -> torch.Tensor:
    """The first of the rows along the last axis."""
    return x.reshape(-1, x.shape[-1])[0]


def on_its_way(x: torch.Tensor) -> Callable[[], list[float]]:
    """Begin to copy a flat tensor to the host; the function that is returned waits for its values."""
    copy = OnItsWay(x)
    return lambda: copy.read().tolist()


def solve(matrix: torch.Tensor, right: torch.Tensor, ridge: torch.Tensor) -> torch.Tensor:
    """The solution w of ``(matrix + ridge * I) w = right``, for ``[..., n, n]``, ``[..., n]`` and ``[..., 1]``.

    The matrix is changed: to copy one of a thousand workers takes half as long as to solve. It is symmetric, and its
    columns are what LAPACK can factor in place.
    """
    factor = matrix.mT
    factor.diagonal(dim1=-2, dim2=-1).add_(ridge)
    failed = matrix.new_empty(matrix.shape[:-2], dtype=torch.int32)
    torch.linalg.cholesky_ex(factor, out=(factor, failed))  # unlike cholesky() it does not wait for the device
    half = torch.linalg.solve_triangular(factor, right[..., None], upper=False)  # cholesky_solve() copies the factor
    solved: torch.Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    return solved[..., 0]


def reshape(x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    return x.reshape(tuple(shape))


# --- large operations -----------------------------------------------------------------------


def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with a key before its arguments, on an NVIDIA GPU by one launch; see :class:`Recorded`."""
    return Recorded(function)


def bound(function: Callable[[torch.Tensor], torch.Tensor], argument: torch.Tensor) -> Callable[[], torch.Tensor]:
    """``function`` of this argument, in the form in which it runs in training: as it is."""
    return lambda: function(argument)


def gradient(x: torch.Tensor, half: bool = False) -> torch.Tensor:
    """``x`` in an element type that gradients have."""
    return x.half() if half else x.float()


def placed(x: torch.Tensor, row: int, rows: int, out: torch.Tensor) -> torch.Tensor:
    """A matrix of zeros with ``x`` in one row, flat."""
    out.zero_()
    out.view(rows, -1)[row] = x
    return out


def width(x: torch.Tensor) -> int:
    """The bytes of one element."""
    return x.element_size()


def is_half(x: torch.Tensor) -> bool:
    """Whether the element type has too little range for sums and for unit-length results."""
    return x.dtype == torch.float16


def room(x: torch.Tensor, length: int, half: bool) -> torch.Tensor | None:
    """Memory for a flat result of ``x``'s type, or a half-precision one, for use in every step."""
    return x.new_zeros(length, dtype=torch.float16 if half else x.dtype)


def blank_unless(condition: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``x``, or zeros in its place unless the 0-dimensional ``condition`` holds."""
    return x.masked_fill_(~condition, 0)


def _blocks(length: int, rows: int, device: torch.device) -> list[slice]:
    size = _BLOCK_CPU if device.type == "cpu" else _BLOCK_ACCELERATOR
    size = max(1024, size // rows)
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _working(x: torch.Tensor) -> torch.Tensor:
    """``x`` in the precision arithmetic is done in: float32, or float64 if it came so."""
    return x if x.dtype in _EXACT_TYPES else x.float()


# The precisions arithmetic is done in.
_EXACT_TYPES = (torch.float32, torch.float64)


# What kernels take; other element types are rare on a GPU.
_KERNEL_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def _has_kernels(*tensors: torch.Tensor, beside: torch.Tensor | None = None) -> bool:
    """Whether :mod:`.torch_cuda` can do these tensors' arithmetic, with weights ``beside`` them on the device."""
    device = tensors[0].device
    if device.type != "cuda" or not all(map(_plain, tensors)) or (beside is not None and beside.device != device):
        return False
    return _compiled(device)


def _plain(x: torch.Tensor) -> bool:
    """Whether there is nothing but numbers to it, one beside the other along the last axis."""
    known = type(x) is torch.Tensor and x.dtype in _KERNEL_TYPES and not x.requires_grad
    return known and x.stride(-1) == 1 and x.numel() > 0


@functools.cache
def _compiled(device: torch.device) -> bool:
    """Whether kernels run on this device: an NVIDIA GPU that knows bfloat16, and a machine that has Triton."""
    global torch_cuda
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0) or not importlib.util.find_spec("triton"):
        return False
    try:
        from . import torch_cuda

        torch_cuda.try_out(device)
    except Exception as error:  # Triton needs a C compiler, a folder it may write to, ...
        warnings.warn(
            f"Triton cannot compile kernels for {device}, so gradients are combined by PyTorch's slower operations; "
            f"every rank must do the same: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def arithmetic(device: torch.device) -> str:
    """Name the arithmetic of a device. Ranks must have it in common, because last bits of results depend on it."""
    return "Triton's kernels" if device.type == "cuda" and _compiled(device) else "PyTorch's operations"


def square(gradient: torch.Tensor) -> torch.Tensor:
    """``<g, g>`` of a flat gradient."""
    if _has_kernels(gradient):
        return torch_cuda.consensus(gradient[None])[0, 1]
    working = (_working(gradient[b]) for b in _blocks(gradient.numel(), 1, gradient.device))
    parts = [torch.dot(g, g) for g in working]
    return torch.stack(parts).sum(dtype=torch.float64) if parts else zeros((), gradient)


def moments(gradient: torch.Tensor, summed: torch.Tensor) -> torch.Tensor:
    """``[<g, s>, <g, g>]`` of two flat tensors, each read from memory once."""
    if _has_kernels(gradient, summed):
        return torch_cuda.moments(gradient, summed)
    parts = []
    for block in _blocks(gradient.numel(), 2, gradient.device):
        g = _working(gradient[block])
        parts += [torch.dot(g, _working(summed[block])), torch.dot(g, g)]
    return torch.stack(parts).view(-1, 2).sum(0, dtype=torch.float64)


def gramian(rows: torch.Tensor) -> torch.Tensor:
    """``rows @ rows.T`` of an N x d matrix."""
    workers, length = rows.shape
    blocks = _blocks(length, workers, rows.device)
    if len(blocks) == 1:  # as of most layers, of which there may be thousands
        return _products(_working(rows)).double()
    result = zeros((workers, workers), rows)
    for block in blocks:
        result += _products(_working(rows[:, block]))
    return result


# Columns that make a matrix product of their own on an accelerator.
_PIECE = 4096


def _products(part: torch.Tensor) -> torch.Tensor:
    """``part @ part.T``.

    Of a few rows of millions of columns most of an accelerator has nothing to do, unless pieces are multiplied each for
    itself.
    """
    if part.device.type == "cpu" or part.shape[1] <= _PIECE:
        return part @ part.T
    whole = part.shape[1] // _PIECE * _PIECE
    pieces = part[:, :whole].unflatten(1, (-1, _PIECE)).transpose(0, 1)
    rest = part[:, whole:]
    return torch.bmm(pieces, pieces.transpose(1, 2)).sum(0, dtype=torch.float64) + rest @ rest.T


# Up to this many workers the whole Gramian is cheaper than the two moments it contains, because it
# is a single matrix product; beyond, its N * N * d multiplications show.
_FEW_WORKERS = 16


def consensus(rows: torch.Tensor) -> torch.Tensor:
    """``[<g_i, sum_j g_j>, <g_i, g_i>]`` for each row of an N x d matrix."""
    workers, length = rows.shape
    if _has_kernels(rows) and workers <= torch_cuda.MOST_ROWS:
        return torch_cuda.consensus(rows)
    if workers <= _FEW_WORKERS:
        products = gramian(rows)
        return torch.stack([products.sum(1), products.diagonal()], dim=1)
    result = zeros((workers, 2), rows)
    for block in _blocks(length, workers, rows.device):
        part = _working(rows[:, block])
        result[:, 0] += torch.mv(part, part.sum(0))
        result[:, 1] += torch.linalg.vecdot(part, part)
    return result


def combine(weights: torch.Tensor, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """``weights @ rows``, reading ``rows`` once, into ``out`` if given."""
    result = rows.new_empty(rows.shape[1]) if out is None else out
    if _has_kernels(rows, result, beside=weights):
        return torch_cuda.combine(weights, rows, result)
    apart = result.untyped_storage().data_ptr() != rows.untyped_storage().data_ptr()
    if apart and rows.dtype == result.dtype and rows.dtype in _EXACT_TYPES:
        return torch.mv(rows.T, weights.to(rows.dtype), out=result)
    for block in _blocks(rows.shape[1], rows.shape[0], rows.device):
        part = _working(rows[:, block])
        result[block] = torch.mv(part.T, weights.to(part.dtype))
    return result


def combine_segments(
    rows: torch.Tensor,
    pieces: Sequence[tuple[int, int, torch.Tensor]],
    out: torch.Tensor | None,
    past: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`combine` with other weights for each ``(start, stop, weights)``; the rest is unset.

    Where there is a ``past``, the weights go on with those of its rows, the last excepted.
    """
    result = rows.new_empty(rows.shape[1]) if out is None else out
    for start, stop, weights in pieces:
        if past is None:
            combine(weights, rows[:, start:stop], out=result[start:stop])
        else:
            _combine_with_past(weights, rows[:, start:stop], past[:-1, start:stop], out=result[start:stop])
    return result


def _combine_with_past(weights: torch.Tensor, rows: torch.Tensor, past: torch.Tensor, out: torch.Tensor) -> None:
    workers = rows.shape[0]
    weights = weights.to(past.dtype)
    for block in _blocks(rows.shape[1], workers, rows.device):
        part = torch.mv(_working(rows[:, block]).T, weights[:workers])
        out[block] = part.addmv_(past[:, block].T, weights[workers:])


def assemble(
    like: torch.Tensor, pieces: Sequence[tuple[int, int, torch.Tensor]], out: torch.Tensor | None
) -> torch.Tensor:
    """A flat tensor as long as ``like``'s rows, with these parts in it; the rest is unset."""
    result = like.new_empty(like.shape[-1]) if out is None else out
    for start, stop, part in pieces:
        result[start:stop] = part
    return result


# --- the mean gradients of earlier steps ----------------------------------------------------


def working(x: torch.Tensor) -> torch.Tensor:
    """``x`` in the precision arithmetic is done in: float32, or float64 if it came so."""
    return _working(x)


def past_room(x: torch.Tensor, steps: int, length: int) -> torch.Tensor:
    """Zeros for the means of so many steps, and one row more for what is not to be kept, in working precision."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.zeros(steps + 1, length, dtype=dtype, device=x.device)


def keep_row(past: torch.Tensor, slot: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """``past``, changed in place, with ``row`` in the place that ``slot``, a ``[1]``, says."""
    return past.index_copy_(0, slot.to(torch.int64), row[None].to(past.dtype))


def current(past: torch.Tensor) -> torch.Tensor:
    """The rows as they are now."""
    return past


def filled(past: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``past``, changed in place, with these rows at its beginning and zeros elsewhere."""
    past.zero_()
    past[: rows.shape[0], : rows.shape[1]] = rows
    return past


def bytes_of(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


def cross(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """``rows @ others.T`` of an N x d and an m x d matrix."""
    result = zeros((rows.shape[0], others.shape[0]), rows)
    # Nothing of a block is used again, so it need not fit into a cache as a whole.
    for block in _blocks(rows.shape[1], rows.shape[0], rows.device):
        result += _working(rows[:, block]) @ others[:, block].T
    return result


def scale_segments(buffer: torch.Tensor, pieces: Sequence[tuple[int, int, torch.Tensor]]) -> torch.Tensor:
    """Multiply ``buffer`` in place by a 0-dimensional weight for each ``(start, stop, weight)``."""
    for start, stop, weight in pieces:
        part = buffer[start:stop]
        if _has_kernels(part, beside=weight):
            torch_cuda.scale(weight, part, part)
        elif part.dtype in (torch.float32, torch.float64):
            part.mul_(weight)
        else:
            # The weight may be outside a half's range although the product is not.
            part.copy_(part.float() * weight.float())
    return buffer


def narrow_segments(
    buffer: torch.Tensor,
    pieces: Sequence[tuple[int, int, torch.Tensor]],
    out: torch.Tensor,
) -> torch.Tensor:
    """``buffer`` times a 0-dimensional factor for each ``(start, stop, factor)``, in half precision."""
    for start, stop, factor in pieces:
        target = out[start:stop]
        if _has_kernels(buffer[start:stop], target, beside=factor):
            torch_cuda.scale(factor, buffer[start:stop], target)
            continue
        part = _working(buffer[start:stop])
        for block in _blocks(part.numel(), 2, buffer.device):
            target[block].copy_(part[block] * factor.to(part.dtype))
    return out


def signs(length: int, known: torch.Tensor | None, reference: torch.Tensor) -> torch.Tensor:
    """Random signs, the same everywhere and always; ``known`` if those are already."""
    if known is not None:
        return known
    draws = torch.frombuffer(bytearray(random.Random(0).randbytes(length)), dtype=torch.uint8)
    return ((draws & 1).to(_working(reference).dtype) * 2 - 1).to(reference.device)


def sketch_segments(
    buffer: torch.Tensor,
    segments: Sequence[tuple[int, int, int]],
    lengths: Sequence[int],
    signs: torch.Tensor,
    stride: int,
    step: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """Each segment's pieces of the length given, added up with random signs; side by side."""
    position = 0
    for (start, stop, _), length in zip(segments, lengths, strict=True):
        count = -(-(stop - start) // length)
        flips = _flips(step, count).to(signs.dtype)
        result = out[position : position + length]
        position += length
        # The last piece may be shorter: one element less in each of the columns it lacks.
        short = stop - start - (count - 1) * length
        for first, width, pieces in ((0, short, count), (short, length - short, count - 1)):
            for block in _blocks(width, max(pieces, 1), buffer.device):
                column, shape = first + block.start, (pieces, block.stop - block.start)
                part = buffer.as_strided(shape, (length, 1), buffer.storage_offset() + start + column)
                varied = _working(part) * signs.as_strided(shape, (stride, 1), column)
                torch.mv(varied.T, flips[:pieces], out=result[column : column + shape[1]])
    return out


def _flips(step: torch.Tensor, count: int) -> torch.Tensor:
    """``count`` signs that are others in every step, found without asking the device for it."""
    turns = torch.arange(1, count + 1, dtype=torch.float64, device=step.device) * TURN
    return torch.where(torch.cos(turns * (step + 1) * (step + 2)) < 0, -1.0, 1.0)


# --- sparse operations ----------------------------------------------------------------------


def pack_rows(rows: torch.Tensor, values: torch.Tensor, rank: int, workers: int) -> torch.Tensor:
    """Rows and their values as one matrix of the values' type."""
    return torch.cat([(rows * workers + rank)[:, None].view(values.dtype), values], 1)


def unpack_rows(packed: torch.Tensor, workers: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Undo :func:`pack_rows`: owners, rows and values."""
    width = torch.int64.itemsize // packed.element_size()
    # A copy, because a single row counts as contiguous, however long it is, and cannot be read in another type.
    keys = packed[:, :width].clone(memory_format=torch.contiguous_format).view(torch.int64)[:, 0]
    return keys % workers, keys // workers, packed[:, width:]


def distinct(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows, each of them once and in order, and for each of ``rows`` its place among them."""
    unique, places = torch.unique(rows, return_inverse=True)
    return unique, places


def sum_rows(values: torch.Tensor, places: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Add up the values that have one place among distinct ``rows``."""
    values = _working(values)
    return _added(values.new_zeros((len(rows), values.shape[1])), places, values)


def sparse_consensus(
    owners: torch.Tensor, places: torch.Tensor, summed: torch.Tensor, values: torch.Tensor, workers: int
) -> torch.Tensor:
    """:func:`consensus` of gradients given as rows that belong to workers, distinct for each."""
    values = _working(values)
    moments_ = torch.stack([(values * summed[places]).sum(1), (values * values).sum(1)], dim=1).double()
    return _added(zeros((workers, 2), values), owners, moments_)


def _added(matrix: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """``matrix`` with ``values`` added to its ``rows``, in an order that is the same on all ranks.

    ``index_add_`` has one on a CPU; on a GPU threads add in the order in which they come. This is for tables that every
    rank computes for itself, and a last bit that differs would let parameters drift apart.
    """
    if matrix.device.type == "cpu":
        return matrix.index_add_(0, rows, values)
    return matrix.index_put_((rows,), values, accumulate=True)  # sorts by row first


def sparse_gramian(
    owners: torch.Tensor, places: torch.Tensor, rows: torch.Tensor, values: torch.Tensor, workers: int
) -> torch.Tensor:
    """:func:`gramian` of gradients given as rows that belong to workers, distinct for each."""
    values = _working(values)
    dense = values.new_zeros((workers, len(rows), values.shape[1]))
    dense[owners, places] = values
    return gramian(dense.reshape(workers, -1))


def sparse_weigh(owners: torch.Tensor, values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Multiply each row by its owner's weight."""
    values = _working(values)
    return values * weights.to(values.dtype)[owners][:, None]


# --- comparing replicas ---------------------------------------------------------------------


def digest(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """A number (int64, on the tensors' device) that differs if bits of the tensors do.

    The sum of their bits, eight bytes at a time. Integers are added, so the order in which a device adds makes no
    difference: equal tensors have equal digests whatever processors hold them. Small tensors are joined first, because
    a model can have thousands.
    """
    parts: list[torch.Tensor] = []
    small: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        flat = _bytes(tensor.detach())
        if flat.numel() >= _BLOCK_CPU:
            parts.append(_sum_of_words(flat))
        elif flat.numel():
            small.setdefault(flat.device, []).append(flat)
    parts += [_sum_of_words(torch.cat(some)) for some in small.values()]
    if not parts:
        return torch.zeros((), dtype=torch.int64)
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.contiguous().view(-1).view(torch.uint8)


def _sum_of_words(flat: torch.Tensor) -> torch.Tensor:
    if flat.storage_offset() % 8:
        flat = flat.clone()  # words must begin at a multiple of their size
    whole = flat.numel() // 8 * 8
    return flat[:whole].view(torch.int64).sum() + flat[whole:].sum(dtype=torch.int64)
