"""The large operations on an NVIDIA GPU, as kernels that read each gradient once; see :mod:`.torch`, which calls them.

Written in Triton, which PyTorch for CUDA brings along; importing this module needs it. PyTorch's own operations need
several passes, or are made for other shapes: a matrix of 4 rows and millions of columns is rare elsewhere.

Every rank may compute the same thing for itself, so results are the same bits every time: no two programs add to the
same place, and how work is divided depends on the rows' shape and alignment, which ranks share, not on the GPU. Sums
are kept in single precision for as long as a program runs, at most ``_TILES`` tiles, in hundreds of parts side by side;
programs are added up in double precision.

The kernels are compiled on first use, one for each element type, number of rows and alignment, and kept on disk by
Triton. Lengths are arguments, so that a new one compiles nothing.
"""

# Kernels are compiled, not run: what their arguments are, the compiler sees. And Triton is not everywhere.
# mypy: disable-error-code="no-untyped-def, import-not-found, import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: Up to so many rows there are kernels: as many as fit in registers.
MOST_ROWS = 64

# Programs are given more than one tile once there are so many; and so many tiles at most.
_PROGRAMS = 1024
_TILES = 32
_WARPS = 4
_THREADS = 32 * _WARPS


# --- kernels ----------------------------------------------------------------------------------------------------------
#
# Tiles that lie wholly within the rows are read without a mask, because a mask keeps the compiler from reading 16 bytes
# at a time. The rest of the columns, less than a tile, is masked, and given to the last program.


@triton.jit
def _read(
    pointers, columns, length, N: tl.constexpr, NP: tl.constexpr, C: tl.constexpr, V: tl.constexpr, WHOLE: tl.constexpr
):
    """A tile in single precision, ``[rows, threads, what a thread reads at once]``."""
    row = tl.arange(0, NP)[:, None]
    if not WHOLE:
        x = tl.load(pointers, mask=(row < N) & (columns < length), other=0.0)
    elif N < NP:
        x = tl.load(pointers, mask=row < N, other=0.0)
    else:
        x = tl.load(pointers)
    return tl.reshape(x.to(tl.float32), (NP, C // V, V))


@triton.jit(do_not_specialize=["stride", "length", "tiles"])
def _consensus(
    rows,
    stride,
    length,
    tiles,
    out,
    UNIT: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    C: tl.constexpr,
    V: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, NP)
    columns = tl.arange(0, C)[None, :]
    pointers = rows + row.to(tl.int64)[:, None] * stride * UNIT + columns
    whole = length // C
    dots = tl.zeros((NP, C // V), tl.float32)
    squares = tl.zeros((NP, C // V), tl.float32)
    for tile in range(program * tiles, tl.minimum(program * tiles + tiles, whole)):
        x = _read(pointers + tile * C, columns, length, N, NP, C, V, True)
        dots += tl.sum(x * tl.sum(x, 0)[None, :, :], 2)
        squares += tl.sum(x * x, 2)
    if program == tl.num_programs(0) - 1:
        start = tl.cast(whole, tl.int64) * C
        x = _read(pointers + start, columns, length - start, N, NP, C, V, False)
        dots += tl.sum(x * tl.sum(x, 0)[None, :, :], 2)
        squares += tl.sum(x * x, 2)
    place = out + (program * N + row) * 2
    tl.store(place, tl.sum(dots, 1), mask=row < N)
    tl.store(place + 1, tl.sum(squares, 1), mask=row < N)


@triton.jit(do_not_specialize=["length", "tiles"])
def _moments(g, s, length, tiles, out, B: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, B)
    whole = length // B
    dots = tl.zeros((B,), tl.float32)
    squares = tl.zeros((B,), tl.float32)
    for tile in range(program * tiles, tl.minimum(program * tiles + tiles, whole)):
        x = tl.load(g + tile * B + columns).to(tl.float32)
        dots += x * tl.load(s + tile * B + columns).to(tl.float32)
        squares += x * x
    if program == tl.num_programs(0) - 1:
        start = tl.cast(whole, tl.int64) * B
        x = tl.load(g + start + columns, mask=columns < length - start, other=0.0).to(tl.float32)
        dots += x * tl.load(s + start + columns, mask=columns < length - start, other=0.0).to(tl.float32)
        squares += x * x
    tl.store(out + program * 2, tl.sum(dots, 0))
    tl.store(out + program * 2 + 1, tl.sum(squares, 0))


@triton.jit
def _weigh(weights, pointers, stride, mask, N: tl.constexpr, B: tl.constexpr, WHOLE: tl.constexpr):
    """The weighted sum of N rows, in the order of the rows."""
    result = tl.zeros((B,), tl.float32)
    # So many rows are on their way at once; a loop over all would be a large program to compile.
    for _ in range(N // 8):
        for _ in tl.static_range(8):
            result, weights, pointers = _add(result, weights, pointers, stride, mask, WHOLE)
    for _ in tl.static_range(N % 8):
        result, weights, pointers = _add(result, weights, pointers, stride, mask, WHOLE)
    return result


@triton.jit
def _add(result, weights, pointers, stride, mask, WHOLE: tl.constexpr):
    """One more row; returns what :func:`_weigh` goes on with."""
    x = tl.load(pointers) if WHOLE else tl.load(pointers, mask=mask, other=0.0)
    return result + x.to(tl.float32) * tl.load(weights).to(tl.float32), weights + 1, pointers + stride


@triton.jit(do_not_specialize=["stride", "length"])
def _combine(weights, rows, stride, length, out, UNIT: tl.constexpr, N: tl.constexpr, B: tl.constexpr):
    stride = stride.to(tl.int64) * UNIT
    start = tl.program_id(0).to(tl.int64) * B
    columns = start + tl.arange(0, B)
    mask = columns < length
    if start + B <= length:
        tl.store(out + columns, _weigh(weights, rows + columns, stride, mask, N, B, True).to(out.dtype.element_ty))
    else:
        result = _weigh(weights, rows + columns, stride, mask, N, B, False)
        tl.store(out + columns, result.to(out.dtype.element_ty), mask=mask)


# --- what calls them --------------------------------------------------------------------------------------------------


def _tile(rows: torch.Tensor, aligned: bool) -> dict[str, int]:
    """The shape of a tile: all rows, and as many columns as there are threads, times what each reads at once.

    Of few rows a thread reads 16 bytes at once, and more than one such piece; of many, what its registers hold; and
    single numbers where rows do not begin at multiples of 16 bytes.
    """
    padded = triton.next_power_of_2(len(rows))
    vector = min(16 // rows.element_size(), 128 // padded) if aligned and padded <= 32 else 1
    columns = max(_THREADS * vector, (4096 if aligned else 1024) // padded)
    return {"N": len(rows), "NP": padded, "C": columns, "V": vector}


def _divided(tiles: int) -> tuple[int, int]:
    """Among how many programs tiles are divided, and how many each is given."""
    each = min(_TILES, triton.cdiv(tiles, _PROGRAMS))
    return triton.cdiv(tiles, each), each


def consensus(rows: torch.Tensor) -> torch.Tensor:
    """``[<g_i, sum_j g_j>, <g_i, g_i>]`` for each row of an N x d matrix."""
    workers, length = rows.shape
    stride, unit = _stride(rows)
    tile = _tile(rows, aligned=unit > 1 and rows.data_ptr() % 16 == 0)
    programs, each = _divided(triton.cdiv(length, tile["C"]))
    parts = rows.new_empty((programs, workers, 2), dtype=torch.float32)
    with torch.cuda.device_of(rows):
        _consensus[(programs,)](rows, stride, length, each, parts, UNIT=unit, num_warps=_WARPS, **tile)
    return parts.sum(0, dtype=torch.float64)


def moments(gradient: torch.Tensor, summed: torch.Tensor) -> torch.Tensor:
    """``[<g, s>, <g, g>]`` of two flat tensors."""
    length, block = gradient.numel(), 4096
    programs, each = _divided(triton.cdiv(length, block))
    parts = gradient.new_empty((programs, 2), dtype=torch.float32)
    with torch.cuda.device_of(gradient):
        _moments[(programs,)](gradient, summed, length, each, parts, B=block, num_warps=2 * _WARPS)
    return parts.sum(0, dtype=torch.float64)


def combine(weights: torch.Tensor, rows: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``weights @ rows`` into ``out``, which may be one of the rows."""
    workers, length = rows.shape
    block = 2048 if workers <= 4 else 1024
    programs = triton.cdiv(length, block)
    stride, unit = _stride(rows)
    # Whether product and sum are one operation must not depend on where in memory the rows begin.
    options = {"num_warps": _WARPS, "enable_fp_fusion": False}
    with torch.cuda.device_of(rows):
        _combine[(programs,)](weights.contiguous(), rows, stride, length, out, UNIT=unit, N=workers, B=block, **options)
    return out


def try_out(device: torch.device) -> None:
    """Compile and start the smallest kernel; raises if that cannot be done here."""
    one = torch.ones(1, device=device)
    scale(one.double(), one, one)


def scale(factor: torch.Tensor, buffer: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """A flat tensor times a 0-dimensional factor, into ``out``, which may be the same."""
    return combine(factor.view(1), buffer[None], out)


def _stride(rows: torch.Tensor) -> tuple[int, int]:
    """From row to row, in units of so many elements.

    A constant factor tells the compiler that 16 bytes of every row may be read at once. Of a single row the stride
    makes no difference, and another one would compile another kernel.
    """
    stride, vector = rows.stride(0) if len(rows) > 1 else 0, 16 // rows.element_size()
    return (stride, 1) if stride % vector else (stride // vector, vector)
