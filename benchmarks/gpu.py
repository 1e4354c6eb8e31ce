"""Measure on a GPU: ``python -m benchmarks.gpu``, or ``make gpu-test``, which runs the tests as well.

What is measured, all of it printed as JSON and written to ``--out``:

* the large operations of each schedule, in bytes a second and as a share of what copying memory reaches; the largest
  ones also without this package's kernels, by PyTorch's operations alone;
* the small ones: from statistics to weights, and the digest that replicas are compared by;
* whole training steps with averaging and with each schedule: time until the GPU is done, time until the host is free
  again, and how many kernels were launched. Over NCCL with one rank, and with two ranks that share the GPU, where
  messages go through the host.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import statistics as numbers
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from adacons_hvd import AdaCons, Aggregator, Curvature, Decision, Statistics
from adacons_hvd.aggregators import Memory
from adacons_hvd.aggregators.base import table_of
from adacons_hvd.ops import torch as ops

from .ranks import take_turns

ROOT = Path(__file__).resolve().parents[1]
#: More than any cache holds: operations take turns on copies of their operands until so many bytes are in use.
BEYOND_CACHE = 256 << 20
CONTENDERS = ("average", "two-pass", "one-pass", "gather")

Result = dict[str, Any]


# --- one process: arithmetic ------------------------------------------------------------------------------------------


def seconds(once: Callable[[], object], device: str, turns: int = 15) -> float:
    """The median of turns of as many calls as take a few milliseconds."""

    def turn(calls: int) -> float:
        finish(device)
        start = time.perf_counter()
        for _ in range(calls):
            once()
        finish(device)
        return (time.perf_counter() - start) / calls

    turn(3)
    calls = max(1, int(0.005 / turn(1)))
    return numbers.median(turn(calls) for _ in range(turns))


def finish(device: str) -> None:
    """Wait until the device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def in_turn(make: Callable[[], tuple[torch.Tensor, ...]], size: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Operands of so many bytes, each time others than the last, so that none is in a cache."""
    return itertools.cycle([make() for _ in range(max(1, BEYOND_CACHE // size))])


def arithmetic(device: str, elements: list[int]) -> Result:
    """The large operations: the fewest bytes each has to move, per second and beside copying."""
    largest = max(elements)
    copying = copying_rate(largest, device)
    rows: list[Result] = []

    def measure(name: str, workers: int, length: int, dtype: torch.dtype, moved: float, operation: Any) -> None:
        size = length * dtype.itemsize
        operands = in_turn(lambda: (torch.randn(workers, length // workers, device=device).to(dtype),), size)
        taken = seconds(lambda: operation(*next(operands)), device)
        rate = moved * dtype.itemsize / taken
        shape = {"rows": workers, "elements": length, "type": str(dtype).removeprefix("torch.")}
        figures = {"ms": 1e3 * taken, "GB/s": rate / 1e9, "share of copying": rate / copying}
        if length == largest and device == "cuda":
            # Not a mock: its own time would count.
            with mock.patch.object(ops, "_has_kernels", lambda *_, **__: False):  # noqa: PT008
                figures["without kernels, ms"] = 1e3 * seconds(lambda: operation(*next(operands)), device, turns=5)
        rows.append({"operation": name, **shape, **figures})

    for length, dtype in [*((n, torch.float32) for n in elements), (largest, torch.bfloat16)]:
        for workers in (2, 4, 8, 32):
            gamma = torch.full((workers,), 1 / workers, dtype=torch.float64, device=device)
            out = torch.empty(length // workers, dtype=dtype, device=device)
            combined = length + length / workers
            measure("consensus", workers, length, dtype, length, ops.consensus)
            measure("combine", workers, length, dtype, combined, lambda x, g=gamma, o=out: ops.combine(g, x, out=o))
            measure("gramian", workers, length, dtype, length, ops.gramian)
        other = torch.randn(length, device=device).to(dtype)
        one = torch.ones((), dtype=torch.float64, device=device)
        narrow = torch.empty(length, dtype=torch.float16, device=device)
        pieces = [(0, length, one)]
        measure("moments", 1, length, dtype, 2 * length, lambda x, o=other: ops.moments(x[0], o))
        measure("square", 1, length, dtype, length, lambda x: ops.square(x[0]))
        measure("scale", 1, length, dtype, 2 * length, lambda x, p=pieces: ops.scale_segments(x[0], p))
        half = length + length * 2 / dtype.itemsize
        measure("narrow", 1, length, dtype, half, lambda x, p=pieces, o=narrow: ops.narrow_segments(x[0], p, o))
        lengths, signs = [-(-length // 64)], ops.signs(length // 64 + 64 * 97 + 1, None, other)
        sketch = torch.empty(lengths[0], device=device)
        segments = [(0, length, 0)]
        measure(
            "sketch",
            1,
            length,
            dtype,
            length,
            lambda x, s=segments, n=lengths, f=signs, o=sketch, z=one: ops.sketch_segments(x[0], s, n, f, 97, z, o),
        )
    return {"copying, GB/s": copying / 1e9, "operations": rows}


def copying_rate(length: int, device: str) -> float:
    """Bytes read and written a second by a copy of so many single-precision numbers."""
    source, target = torch.randn(length, device=device), torch.empty(length, device=device)
    return 8 * length / seconds(lambda: target.copy_(source), device)


def small(device: str) -> Result:
    """From statistics to weights by number of workers, and the digest of 25 million parameters."""
    weights = {
        f"{workers}, {aggregator!r}": decision(aggregator, workers, device)
        for aggregator in (AdaCons(), Curvature())
        for workers in (4, 32, 1024)
    }
    parameters = [p.detach() for p in model_of("25M", device).parameters()]
    digest = {"ms": 1e3 * seconds(lambda: ops.digest(parameters), device)}
    return {"weights, by workers": weights, "digest of 25M parameters": digest}


def decision(aggregator: Aggregator, workers: int, device: str) -> Result:
    """From a table of inner products to weights, operation by operation and recorded."""
    rows = torch.randn(workers, 256, device=device) + 0.5
    past = torch.randn(aggregator.history + 1, 256, device=device) if aggregator.history else None
    table = table_of(rows, aggregator.needs_gramian, past)
    present = torch.ones(workers, dtype=torch.bool, device=device)

    def decide(table: torch.Tensor, memory: Memory) -> Decision:
        return aggregator.decide(Statistics.read(table, present, aggregator.needs_gramian, aggregator.history), memory)

    memory = decide(table, {}).memory
    recorded = ops.recorded(decide)
    ways: dict[str, Callable[[], object]] = {
        "plain": lambda: decide(table, memory),
        "recorded": lambda: recorded("", table, memory),
    }
    return {name: {"ms": 1e3 * seconds(once, device), **launches(once, device)} for name, once in ways.items()}


def launches(once: Callable[[], object], device: str) -> dict[str, int]:
    """Count what one call gives the device to do, by PyTorch's profiler."""
    if device != "cuda":
        return {}
    from torch.profiler import ProfilerActivity, profile

    once()
    finish(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        once()
        finish(device)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    kinds = Counter(event.get("cat") for event in events)
    # This function itself waits for the device as a whole.
    waits = ("cudaStreamSynchronize", "cudaEventSynchronize")
    waited = sum(event.get("name", "").startswith(waits) for event in events)
    return {"kernels": kinds["kernel"], "copies": kinds["gpu_memcpy"] + kinds["gpu_memset"], "waits": waited}


# --- every rank: training steps ---------------------------------------------------------------------------------------


#: Width and number of layers.
SHAPES = {"0.2M": (100, 20), "25M": (2048, 6)}


def model_of(name: str, device: str) -> nn.Sequential:
    """A network of many small tensors (0.2 million parameters in 40 of them), or of few large ones (25 million)."""
    torch.manual_seed(0)
    width, layers = SHAPES[name]
    return nn.Sequential(*(part for _ in range(layers) for part in (nn.Linear(width, width), nn.Tanh()))).to(device)


class Ranks:
    """The ranks of a job as `take_turns` wants them, whatever carries their gradients."""

    def __init__(self, rank: int, size: int, folder: Path) -> None:
        self.own, self.size = rank, size
        dist.init_process_group("gloo", init_method=f"file://{folder / 'ranks'}", rank=rank, world_size=size)

    def rank(self) -> int:
        return self.own

    def barrier(self) -> object:
        return dist.barrier()

    def allgather_object(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def training(case: Result, ranks: Ranks, name: str, contender: str, group: Any) -> Callable[[], object]:
    """A training step of a model of its own."""
    device = case["device"]
    model = model_of(name, device)
    inputs = torch.randn(32, SHAPES[name][0], generator=torch.Generator().manual_seed(ranks.own)).to(device)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=1e-3)
    aggregator = None if contender == "average" else AdaCons()
    arguments: Result = {} if aggregator is None else {"schedule": contender}
    wrapped: nn.Module = model
    if case["binding"] == "horovod":
        import adacons_hvd.torch as hvd

        optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), aggregator=aggregator, **arguments)
    else:
        import adacons_hvd.ddp

        wrapped = DistributedDataParallel(model, process_group=group)
        if aggregator is not None:
            adacons_hvd.ddp.attach(wrapped, optimizer, aggregator, **arguments)

    def once() -> None:
        optimizer.zero_grad()
        wrapped(inputs).square().mean().backward()
        optimizer.step()

    return once


def steps(case: Result, folder: Path) -> Result:
    """Time a step of every model with every contender, on this rank with the others."""
    rank, size = (
        next(int(os.environ[name]) for name in names if name in os.environ)
        for names in (("HOROVOD_RANK", "RANK"), ("HOROVOD_SIZE", "WORLD_SIZE"))
    )
    ranks = Ranks(rank, size, folder)
    if case["binding"] == "horovod":
        import horovod.torch as hvd

        hvd.init()
    backend = case.get("backend", "gloo")
    group = dist.group.WORLD if backend == "gloo" else dist.new_group(backend=backend)
    return {name: compare(case, ranks, name, group) for name in case["models"]}


def compare(case: Result, ranks: Ranks, name: str, group: Any) -> Result:
    """Time a step of this model with every contender."""
    device = case["device"]
    # To gather what is large is no contender where messages go through the host.
    names = [c for c in CONTENDERS if c != "gather" or name == "0.2M" or ranks.size == 1]
    contenders = {contender: training(case, ranks, name, contender, group) for contender in names}
    for once in contenders.values():
        for _ in range(5):
            once()

    def until_done(once: Callable[[], object]) -> None:
        once()
        finish(device)

    finish(device)
    whole = {contender: functools.partial(until_done, once) for contender, once in contenders.items()}
    times = take_turns(ranks, whole, case["turns"], case["seconds"])
    # The host is free again before the device is done.
    waiting: dict[str, list[float]] = {contender: [] for contender in contenders}
    for _ in range(min(case["turns"], 20)):
        for contender, once in contenders.items():
            finish(device)
            start = time.perf_counter()
            once()
            waiting[contender].append(time.perf_counter() - start)
    finish(device)
    result: Result = {}
    for contender, once in contenders.items():
        ratios = [own / peer for own, peer in zip(times[contender], times["average"], strict=True)]
        result[contender] = {
            "ms": 1e3 * numbers.median(times[contender]),
            "beside average": numbers.median(ratios),
            "host ms": 1e3 * numbers.median(waiting[contender]),
            **(launches(once, device) if ranks.size == 1 else {}),
        }
    dist.barrier()
    return result


# --- the whole --------------------------------------------------------------------------------------------------------


def jobs(device: str, quick: bool, staged: bool) -> list[tuple[int, Result]]:
    """Numbers of ranks, and what they do."""
    every = {"device": device, "models": ["0.2M"] if quick else [*SHAPES], "turns": 5 if quick else 30, "seconds": 4}
    found = [
        (1, {"binding": "ddp", "backend": "nccl" if device == "cuda" else "gloo", **every}),
        (2, {"binding": "ddp", "backend": "gloo", **every}),
        (1, {"binding": "horovod", **every}),
    ]
    if staged or device == "cpu":
        found.append((2, {"binding": "horovod", **every}))
    return found


def run(size: int, case: Result, staged: Path | None, timeout: float) -> Result:
    """Run a job; return what its rank 0 measured, or why it did not."""
    with tempfile.TemporaryDirectory(prefix="adacons-gpu-") as folder:
        results = Path(folder) / "results.json"
        program = [sys.executable, "-m", "benchmarks.gpu", "--case", json.dumps(case), "--out", str(results)]
        launcher = {
            "ddp": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), "--no-python"],
            "horovod": ["-m", "horovod.runner.launch", "--gloo", "-np", str(size)],
        }[case["binding"]]
        first = [str(staged)] if staged and size > 1 else []
        path = os.pathsep.join([*first, str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}
        with suppress(subprocess.TimeoutExpired):
            done = subprocess.run(
                [sys.executable, *launcher, *program], cwd=ROOT, env=environment, capture_output=True, timeout=timeout
            )
            if results.exists():
                return dict(json.loads(results.read_text(encoding="utf-8")))
            return {"failed": (done.stdout + done.stderr).decode(errors="replace")[-1500:]}
        return {"failed": f"no end after {timeout:g} s"}


def about(device: str) -> Result:
    """Describe the device and the libraries that the figures were measured with."""
    found: Result = {"torch": torch.__version__, "device": device}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "multiprocessors": properties.multi_processor_count}
        found |= {"CUDA": torch.version.cuda, "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}
    return found


def show(result: Result) -> None:
    """Print the figures in lines that fit a screen."""
    print(json.dumps(result["about"]))
    for what in ("weights, by workers", "digest of 25M parameters"):
        print(f"{what}: {json.dumps(_rounded(result.get(what)))}")
    table = result.get("arithmetic", {})
    print(f"copying: {table.get('copying, GB/s', 0):.0f} GB/s; operations: rows, elements, type, ms, share of copying")
    for row in table.get("operations", []):
        shape = f"{row['rows']:3} {row['elements']:9} {row['type']:9}"
        without = row.get("without kernels, ms")
        before = f"   without kernels {without:8.3f}" if without else ""
        print(f"  {row['operation']:10} {shape} {row['ms']:8.3f} {row['share of copying']:6.1%}{before}")
    for job in result.get("steps", []):
        print(f"{job['binding']} {job.get('backend', '')} {job['ranks']} ranks")
        for model, contenders in job["measured"].items():
            lines = contenders.items() if isinstance(contenders, dict) else [("", contenders)]
            for contender, figures in lines:
                print(f"  {model:5} {contender:9} {json.dumps(_rounded(figures))}")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    return float(f"{value:.3g}") if isinstance(value, float) else value


def main() -> int:
    """Measure everything, or as one rank what the case says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: to try the program itself")
    parser.add_argument("--quick", action="store_true", help="few sizes and turns")
    parser.add_argument("--steps-only", action="store_true", help="only training steps")
    parser.add_argument("--ranks", type=int, metavar="N", help="only training steps of so many ranks")
    parser.add_argument(
        "--staged", type=Path, metavar="DIR", help="a Horovod without GPU operations, for ranks that share the GPU"
    )
    parser.add_argument("--show", type=Path, metavar="FILE", help="print what was measured before, and measure nothing")
    parser.add_argument("--out", type=Path, default=Path("out/gpu/results.json"))
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        measured = steps(args.case, args.out.parent)
        if int(os.environ.get("HOROVOD_RANK", os.environ.get("RANK", "0"))) == 0:
            args.out.write_text(json.dumps(measured), encoding="utf-8")
        return 0
    if args.show:
        show(json.loads(args.show.read_text(encoding="utf-8")))
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print("No GPU: these are figures of one. `--device cpu --quick` tries the program without.", file=sys.stderr)
        return 1
    args.out.parent.mkdir(parents=True, exist_ok=True)
    result: Result = {"about": about(args.device)}

    def keep() -> None:
        args.out.write_text(json.dumps(result, indent=1), encoding="utf-8")

    if not args.steps_only:
        result |= small(args.device)
        keep()
        elements = [1 << 16, 1 << 18] if args.quick else [1 << 20, 1 << 23, 1 << 26]
        result["arithmetic"] = arithmetic(args.device, elements)
        keep()
    result["steps"] = []
    failures = 0
    for size, case in jobs(args.device, args.quick, args.staged is not None):
        if args.ranks not in (None, size):
            continue
        measured = run(size, case, args.staged, timeout=90)
        failures += "failed" in measured
        result["steps"].append({"ranks": size, **case, "measured": measured})
        keep()
    print(json.dumps(result))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
