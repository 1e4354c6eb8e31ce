"""One process: from statistics to weights, and the local arithmetic beside copying the same memory."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable

import torch

from adacons_hvd import AdaCons, Aggregator, Curvature, Statistics
from adacons_hvd.aggregators import Memory
from adacons_hvd.ops import torch as ops
from benchmarks.ranks import arguments


def seconds(once: Callable[[], object], device: str) -> float:
    """The median of 20 turns of as many calls as take a few milliseconds."""

    def turn(calls: int) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            once()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls

    turn(3)
    calls = max(1, int(0.005 / turn(1)))
    return sorted(turn(calls) for _ in range(20))[10]


def deciding(aggregator: Aggregator, statistics: Statistics, device: str) -> float:
    """Seconds of a decision once the aggregator's memory is full."""
    memory: Memory = {}
    for _ in range(aggregator.history + 1):
        memory = aggregator.decide(statistics, memory).memory
    return seconds(functools.partial(aggregator.decide, statistics, memory), device)


def measure(device: str, length: int) -> dict[str, dict[str, float]]:
    weights: dict[str, float] = {}
    curvature: dict[str, float] = {}
    for workers in (4, 32, 256, 1024, 4096):
        statistics = Statistics.of(torch.randn(workers, 64, device=device) + 0.5)
        weights[str(workers)] = deciding(AdaCons(), statistics, device)
        if workers <= 1024:
            past = torch.randn(Curvature().history + 1, 4096, device=device)
            statistics = Statistics.of(torch.randn(workers, 4096, device=device) + 0.5, gramian=True, past=past)
            curvature[str(workers)] = deciding(Curvature(), statistics, device)
    workers = 4
    rows = torch.randn(workers, length // workers, device=device)
    flat, other = rows.view(-1), torch.empty(length, device=device)
    gamma = torch.full((workers,), 0.25, dtype=torch.float64, device=device)
    out = rows.new_empty(length // workers)
    # Bytes each moves; a copy reads and writes.
    bytes_moved = {"copy": 8 * length, "look": 4 * length, "combine": 5 * length, "own": 8 * length}
    times = {
        "copy": seconds(lambda: other.copy_(flat), device),
        "look": seconds(lambda: ops.consensus(rows), device),
        "combine": seconds(lambda: ops.combine(gamma, rows, out=out), device),
        "own": seconds(lambda: ops.moments(flat, other), device),
    }
    bandwidth = {name: bytes_moved[name] / taken for name, taken in times.items()}
    return {"weights": weights, "curvature": curvature, "bandwidth": bandwidth}


def main() -> None:
    case, results = arguments()
    torch.set_num_threads(1)
    results.write_text(json.dumps(measure(case["device"], case["length"])), encoding="utf-8")


if __name__ == "__main__":
    main()
