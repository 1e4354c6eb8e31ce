"""The kernels of `ops/torch_cuda.py` beside float64: on a GPU or, without one, on a CPU by Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Iterator

import pytest
import torch

if not importlib.util.find_spec("triton"):
    pytest.skip("there is no Triton", allow_module_level=True)
GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"

from adacons_hvd.ops import torch as ops  # noqa: E402 - the interpreter must be asked for before
from adacons_hvd.ops import torch_cuda  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"
on_a_gpu = pytest.mark.skipif(not GPU, reason=f"PyTorch {torch.__version__} sees no GPU")

#: What an element type keeps of a number, give or take.
TYPES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
WORKERS = (1, 2, 3, 4, 8, 13, 16, 32, 33, 64)
#: Each is compiled several times, so of the shorter types there are a few.
CASES = [
    *((workers, torch.float32) for workers in WORKERS),
    *((workers, dtype) for dtype in (torch.float16, torch.bfloat16) for workers in (1, 3, 8, 32, 64)),
]
#: Less than a tile, tiles and nothing else, and a rest; the largest needs several programs with several tiles each.
LENGTHS = (1, 130, 4096, 3 * 4096 + 5, *((1 << 23, (1 << 23) + 7) if GPU else ()))


@pytest.fixture(autouse=True)
def _several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even short rows are several programs' work, with more than one tile each."""
    if not GPU:
        monkeypatch.setattr(torch_cuda, "_PROGRAMS", 3)


def matrices(workers: int, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Rows that agree somewhat, of all lengths; some begin where a GPU cannot read 16 bytes at once."""
    generator = torch.Generator(DEVICE).manual_seed(workers)
    for length in LENGTHS:
        if workers * length > (1 << 26 if GPU else 1 << 16):
            continue
        shared = torch.randn(length + 16, generator=generator, device=DEVICE)
        rows = shared + torch.randn(workers, length + 16, generator=generator, device=DEVICE)
        rows = rows.to(dtype)
        yield rows[:, :length]
        yield rows[:, 3 : length + 3]


def off(found: torch.Tensor, right: torch.Tensor) -> float:
    """The relative error."""
    return float((found.double() - right).norm() / right.norm())


@pytest.mark.parametrize(("workers", "dtype"), CASES, ids=str)
def test_consensus(workers, dtype):
    for rows in matrices(workers, dtype):
        wide = rows.double()
        dots, squares = wide @ wide.sum(0), wide.square().sum(1)
        found = torch_cuda.consensus(rows)
        assert found.shape == (workers, 2)
        assert found.dtype == torch.float64
        # A dot product of vectors that stand upright on each other is as exact as they are long.
        assert float((found[:, 0] - dots).norm()) < 1e-6 * float(squares.sum().sqrt() * wide.sum(0).norm())
        assert off(found[:, 1], squares) < 1e-6


@pytest.mark.parametrize(("workers", "dtype"), [*CASES, (100, torch.float32)], ids=str)
def test_combine(workers, dtype):
    weights = torch.linspace(-1, 2, workers, dtype=torch.float64, device=DEVICE)
    for rows in matrices(workers, dtype):
        length = rows.shape[1]
        wide = rows.double()
        bound = TYPES[dtype] * (weights.abs() @ wide.abs()) + 1e-12
        # Between other numbers, which stay; out begins at a multiple of 16 bytes if the rows do.
        room = torch.full((length + 32,), 7.0, dtype=dtype, device=DEVICE)
        start = 16 + rows.storage_offset()
        out = room[start : start + length]
        assert torch_cuda.combine(weights, rows, out) is out
        assert ((out.double() - weights @ wide).abs() <= bound).all()
        assert (room[:start] == 7).all()
        assert (room[start + length :] == 7).all()
        # Into one of the rows that are combined.
        rows = rows.clone()
        torch_cuda.combine(weights, rows, rows[0])
        assert torch.equal(rows[0], out)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_moments_of_two_types(dtype):
    for rows in matrices(2, torch.float32):
        g, s = rows[0].to(dtype), rows[1]
        found = torch_cuda.moments(g, s)
        right = torch.stack([g.double() @ s.double(), g.double() @ g.double()])
        assert float((found - right).abs().max()) < 1e-6 * float(g.double().norm() * (g.double().norm() + s.norm()))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_scale(dtype):
    factor = torch.tensor(0.3, dtype=torch.float64, device=DEVICE)
    for rows in matrices(1, dtype):
        g = rows[0].clone()
        narrow = torch.empty(len(g), dtype=torch.float16, device=DEVICE)
        torch_cuda.scale(factor, g, narrow)
        assert off(narrow, 0.3 * g.double()) < 1e-3
        right = 0.3 * g.double()
        torch_cuda.scale(factor, g, g)
        assert off(g, right) < TYPES[dtype]


def test_a_weight_outside_the_range_of_the_elements():
    x = torch.full((10,), 1e-4, dtype=torch.float16, device=DEVICE)
    torch_cuda.scale(torch.tensor(1e6, dtype=torch.float64, device=DEVICE), x, x)
    assert torch.allclose(x.double(), torch.tensor(100.0, dtype=torch.float64, device=DEVICE), rtol=1e-3)


def test_what_is_not_finite_stays_so():
    rows = torch.ones(3, 5000, device=DEVICE)
    rows[1, 4999] = float("nan")
    rows[2, 17] = float("inf")
    found = torch_cuda.consensus(rows)
    assert found[0].isnan().any() or found[0].isinf().any()
    assert found[1, 1].isnan()
    assert found[2, 1].isinf()
    assert found[0, 1] == 5000


@on_a_gpu
def test_the_operations_use_the_kernels():
    rows = torch.randn(4, 1000, device=DEVICE)
    assert ops._has_kernels(rows, beside=torch.ones(4, device=DEVICE))
    assert torch.equal(ops.consensus(rows), torch_cuda.consensus(rows))
    # And PyTorch's operations for what the kernels are not made for.
    for other in (rows.double(), rows[:, ::2], rows[:, :0], rows.clone().requires_grad_(), rows.cpu()):
        assert not ops._has_kernels(other)
    assert not ops._has_kernels(rows, beside=torch.ones(4))
    many = torch.randn(65, 1000, device=DEVICE)
    assert off(ops.consensus(many)[:, 1], many.double().square().sum(1)) < 1e-6


@on_a_gpu
def test_the_same_bits_every_time():
    """Every rank computes these for itself."""
    draw = random.Random(0)
    for workers in WORKERS:
        rows = torch.randn(workers, draw.randrange(1, 3_000_000), device=DEVICE)
        weights = torch.rand(workers, device=DEVICE).double()
        first = torch_cuda.consensus(rows), torch_cuda.combine(weights, rows, torch.empty_like(rows[0]))
        for _ in range(10):
            assert torch.equal(torch_cuda.consensus(rows), first[0])
            assert torch.equal(torch_cuda.combine(weights, rows, torch.empty_like(rows[0])), first[1])


@on_a_gpu
def test_more_elements_than_a_32_bit_number_counts():
    length = (1 << 30) + 5
    rows = torch.ones(3, length, dtype=torch.bfloat16, device=DEVICE)
    rows[2, -1] = 3
    found = torch_cuda.consensus(rows)
    assert found[:, 1].tolist() == [length, length, length + 8]
    assert found[:, 0].tolist() == [3 * length + 2, 3 * length + 2, 3 * length + 12]
    flat = rows.view(-1)
    assert torch_cuda.moments(flat, flat).tolist() == [3 * length + 8] * 2
    torch_cuda.combine(torch.tensor([1.0, 1, 2], device=DEVICE), rows, rows[0])
    assert rows[0, [0, length - 2, length - 1]].tolist() == [4, 4, 8]
    torch_cuda.scale(torch.tensor(2.0, device=DEVICE), flat, flat)
    assert flat[[0, length, 3 * length - 2, 3 * length - 1]].tolist() == [8, 2, 2, 6]


@on_a_gpu
def test_another_stream_than_the_default_one():
    rows = torch.randn(4, 1 << 22, device=DEVICE)
    right = rows.double().square().sum(1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        changed = rows.clone()
        for _ in range(50):
            changed.mul_(2).mul_(0.5)
        found = torch_cuda.consensus(changed)
    torch.cuda.current_stream().wait_stream(stream)
    assert off(found[:, 1], right) < 1e-6
