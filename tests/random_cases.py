"""Random training jobs, each drawn from a seed, beside the oracle. Runs on the ranks, but for `agree_with_the_oracle`.

A case is some parameters, some options, and for every step and rank some gradients, with things that go wrong: values
that are not finite, gradients that are missing, layers that are frozen, ranks that run out of data and join. The same
seed gives the same case on every rank and in every run, so `RANDOM_SEED=17 RANDOM_CASES=1` repeats what failed.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import harness
import numpy as np
import torch

SEED = int(os.environ.get("RANDOM_SEED", random.randrange(10**9)))
CASES = int(os.environ.get("RANDOM_CASES", "1000000"))
SHAPES = [(), (1,), (7,), (3, 5), (64,), (2, 3, 4), (0, 3), (301,)]
TYPES = ["float32"] * 6 + ["float64"] * 3 + ["float16", "bfloat16", "complex64"]
# Of one rounding, relative to what is rounded.
PRECISION = {"float64": 2.0**-23, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7, "complex64": 2.0**-23}


@dataclass(frozen=True)
class Case:
    """A case is everything that is drawn before the first step."""

    seed: int
    shapes: list[tuple[int, ...]]
    types: list[str]
    #: Parameters whose gradients are row-sparse.
    sparse: list[int]
    aggregator: dict[str, Any]
    nonfinite: str
    #: Arguments of DistributedOptimizer; groups and granularity as lists of parameters' numbers.
    options: dict[str, Any]
    granularity: str | list[list[int]]
    groups: int | list[list[int]] | None
    fp16: bool
    optimizer: str
    #: How many backward passes there are in a step, whatever was announced.
    passes: int
    #: How many steps each rank has data for.
    steps: list[int]
    #: (step, rank, parameter, value): what one gradient holds in one place.
    poison: list[tuple[int, int, int, float]]
    #: (step, rank, parameter) without a gradient.
    missing: list[tuple[int, int, int]]
    #: parameter -> steps in which it is frozen, on all ranks.
    frozen: dict[int, tuple[int, int]]
    #: Factors of the ranks' gradients.
    sizes: list[float]


def draw(seed: int, workers: int, schedules: list[str]) -> Case:
    """The case of this seed."""
    chance = random.Random(seed)
    count = chance.randint(1, 6)
    shapes = [chance.choice(SHAPES) for _ in range(count)]
    types = [chance.choice(TYPES) for _ in range(count)]
    if chance.random() < 0.4:
        types = [types[0]] * count
    sparse = [i for i in range(count) if len(shapes[i]) == 2 and shapes[i][0] and types[i] == "float32"]
    sparse = sparse if chance.random() < 0.4 else []
    fp16 = chance.random() < 0.2
    length = chance.randint(2, 7)
    nonfinite = chance.choice(["propagate", "propagate", "exclude", "raise"])
    leaves = chance.random() < 0.2 and workers > 1
    steps = [length] * workers
    if leaves:
        for rank in chance.sample(range(workers), chance.randint(1, workers - 1)):
            steps[rank] = chance.randint(1, length)
    places = [(chance.randrange(length), chance.randrange(workers), chance.randrange(count)) for _ in range(3)]
    values = [float("nan"), float("inf"), float("-inf")]
    poison = [(*place, chance.choice(values)) for place in places] if chance.random() < 0.4 else []
    if poison and chance.random() < 0.2:  # everyone at once
        step, _, parameter, value = poison[0]
        poison = [(step, rank, parameter, value) for rank in range(workers)]
    everything = list(range(count))
    halves = [everything[::2], everything[1::2]]
    return Case(
        seed,
        shapes,
        types,
        sparse,
        {
            "momentum": chance.choice([0.0, 0.9, 0.99]),
            "normalize": chance.random() < 0.7,
            "scale": chance.choice(["unit", "average"]),
        },
        nonfinite,
        {
            "schedule": chance.choice(["auto", *schedules]),
            "bucket_bytes": chance.choice([1, 64, 1024, 32 << 20]),
            "overlap": chance.random() < 0.8,
            "backward_passes_per_step": chance.randint(1, 2),
            "sparse_as_dense": chance.random() < 0.3,
            "gradient_predivide_factor": chance.choice([1.0, 1.0, 2.0, 8.0]),
        },
        chance.choice(["model", "model", "layer", halves, halves[:1]]),
        chance.choice([None, None, 1, 2, halves, halves[1:]]),
        fp16,
        # Adam cannot take sparse gradients.
        "SGD" if sparse else chance.choice(["SGD", "Adam"]),
        chance.choice([1, 1, 1, 2, 3]),
        steps,
        poison,
        [(chance.randrange(length), chance.randrange(workers), chance.randrange(count)) for _ in range(3)]
        if chance.random() < 0.3
        else [],
        {chance.randrange(count): (chance.randint(0, 2), chance.randint(1, 4))} if chance.random() < 0.2 else {},
        [chance.choice([1.0, 1.0, 0.2, 3.0]) for _ in range(workers)],
    )


def gradient(case: Case, step: int, turn: int, rank: int, number: int) -> torch.Tensor | None:
    """Return what one backward pass adds to one parameter's gradient on one rank; None for nothing."""
    if (step, rank, number) in case.missing:
        return None
    shape, kind = case.shapes[number], getattr(torch, case.types[number])
    wide = torch.complex128 if kind.is_complex else torch.float64
    ours = torch.Generator().manual_seed(case.seed * 1000 + number)
    mine = torch.Generator().manual_seed(hash((case.seed, step, turn, rank, number)) % 2**62)
    value = torch.randn(shape, generator=ours, dtype=wide) + 0.4 * torch.randn(shape, generator=mine, dtype=wide)
    value = (value * case.sizes[rank]).to(kind)
    for at, who, which, what in case.poison:
        if (at, who, which) == (step, rank, number) and value.numel():
            value.view(-1)[0] = what
    return value


def array(tensor: torch.Tensor | None, like: torch.Tensor) -> np.ndarray:
    """As real float64 numbers, zeros where there is nothing."""
    tensor = torch.zeros_like(like) if tensor is None else tensor.detach()
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.to(torch.float64).reshape(-1).numpy().copy()


class Judge:
    """The method for one group, in float64, where only some of N workers take part."""

    def __init__(self, workers: int, momentum: float, normalize: bool, scale: str) -> None:
        self.workers, self.beta, self.normalize, self.scale = workers, momentum, normalize, scale
        self.m: np.ndarray | None = None
        #: How far a single-precision result may be off, in units of one rounding.
        self.slack = 0.0
        #: Whether a rounding may decide between the method and the average.
        self.close = False

    def __call__(self, gradients: dict[int, np.ndarray]) -> np.ndarray:
        with np.errstate(all="ignore"):
            return self._aggregate(list(gradients.values()))

    def _aggregate(self, g: list[np.ndarray]) -> np.ndarray:
        mean = sum(g) / len(g)
        n = np.array([np.sqrt(x @ x) for x in g])
        self.slack = sum(float(np.linalg.norm(x[np.isfinite(x)])) for x in g) / len(g)
        self.close = False
        if not np.isfinite(n).all() or not n.any():
            return mean
        alpha = np.array([x @ mean / k if k else 0.0 for x, k in zip(g, n, strict=True)])
        if self.beta:
            alpha = self._smooth(alpha)
        # A mean in which much cancels has the roundings of what there was, and so has every coefficient.
        slack = n.sum()
        if self.normalize:
            whole, size = alpha.sum(), np.abs(alpha).sum()
            self.close = abs(whole - 1e-2 * size) < 1e-3 * size
            if whole <= 1e-2 * size:
                return mean
            alpha = alpha / whole
            slack = slack / whole * (1 + np.abs(alpha).sum())
        gamma = np.array([a / k if k else 0.0 for a, k in zip(alpha, n, strict=True)])
        factor = 1.0 if self.scale == "unit" else n.sum() / len(g) if self.normalize else 1 / len(g)
        self.slack = float(factor * (slack + np.abs(alpha).sum()))
        return factor * sum(w * x for w, x in zip(gamma, g, strict=True))

    def _smooth(self, alpha: np.ndarray) -> np.ndarray:
        order = np.argsort(alpha, kind="stable")
        # The sorted values as a curve over [0, 1], whoever is there.
        all_points, points = np.linspace(0, 1, self.workers), np.linspace(0, 1, len(alpha))
        curve = np.interp(all_points, points, alpha[order])
        if self.m is None:
            self.m = curve
            return alpha
        old = np.empty_like(alpha)
        old[order] = np.interp(points, all_points, self.m)
        self.m = self.beta * self.m + (1 - self.beta) * curve
        return self.beta * old + (1 - self.beta) * alpha


def run(case: Case) -> Counter[str]:
    """Train, compare, and count what was met."""
    import adacons_hvd.torch as hvd

    hvd.init()
    me = harness.rank()
    kinds = [getattr(torch, kind) for kind in case.types]
    parameters = [torch.nn.Parameter(torch.ones(s, dtype=k)) for s, k in zip(case.shapes, kinds, strict=True)]

    optimizer = hvd.DistributedOptimizer(
        getattr(torch.optim, case.optimizer)(parameters, lr=0.01),
        [(f"p{i}", p) for i, p in enumerate(parameters)],
        aggregator=hvd.AdaCons(**case.aggregator, nonfinite=case.nonfinite),
        compression=hvd.Compression.fp16 if case.fp16 else hvd.Compression.none,
        granularity=pick(case.granularity, parameters),
        groups=pick(case.groups, parameters),
        **case.options,
    )
    raw, found = [], []
    for step in range(case.steps[me]):
        for number, (start, duration) in case.frozen.items():
            parameters[number].requires_grad_(not start <= step < start + duration)
        optimizer.zero_grad()
        for turn in range(case.passes):
            backward(case, parameters, step, turn)
        raw.append([array(p.grad, p) for p in parameters])
        found.append(step_and_see(optimizer, parameters))
    hvd.join()
    return judged(case, raw, found, [array(p, p) for p in parameters], optimizer.state_dict()["adacons"])


def pick(numbers: Any, parameters: Sequence[Any]) -> Any:
    """Lists of parameters from lists of their numbers; anything else stays."""
    return [[parameters[i] for i in some] for some in numbers] if isinstance(numbers, list) else numbers


def judged(
    case: Case, raw: list[Any], found: list[Any], parameters: list[np.ndarray], memory: Mapping[str, Any]
) -> Counter[str]:
    """Compare ranks with each other, and rank 0 all of them with the oracle; what was met."""
    everyone = harness.gather((raw, found))
    workers = range(len(everyone))
    for step in range(max(case.steps)):
        results = [everyone[rank][1][step] for rank in workers if step < case.steps[rank]]
        assert all(same(results[0], other) for other in results[1:]), f"step {step}: the ranks differ"
    bits = harness.gather(hashlib.sha256(repr([p.tolist() for p in parameters]).encode()).hexdigest())
    stayed = [rank for rank in workers if case.steps[rank] == max(case.steps)]
    assert len({bits[rank] for rank in stayed}) == 1, "parameters differ"
    assert all(np.isfinite(np.asarray(value)).all() for value in memory.values()), "the momentum is not finite"
    if harness.rank():
        return Counter()
    return compare(case, [theirs for theirs, _ in everyone], [theirs for _, theirs in everyone])


def backward(case: Case, parameters: list[torch.Tensor], step: int, turn: int) -> None:
    outputs, gradients = [], []
    for number, p in enumerate(parameters):
        value = gradient(case, step, turn, harness.rank(), number)
        if value is None or not p.requires_grad:
            continue
        if number in case.sparse:
            # Every row twice and one not at all; what is sparse is added up by the optimizer, not by autograd.
            rows = torch.arange(len(p) - 1).repeat(2)
            outputs.append(torch.nn.functional.embedding(rows, p, sparse=True))
            value = value[:-1].repeat(2, 1)
        else:
            outputs.append(p.clone())
        gradients.append(value)
    if outputs:
        torch.autograd.backward(outputs, gradients)


def step_and_see(optimizer: Any, parameters: list[torch.Tensor]) -> list[np.ndarray] | str:
    """The aggregated gradients, or the error there was instead."""
    try:
        optimizer.synchronize()
    except FloatingPointError as error:
        return str(error)
    seen = [array(p.grad, p) for p in parameters]
    with optimizer.skip_synchronize():
        optimizer.step()
    return seen


def same(a: Any, b: Any) -> bool:
    if isinstance(a, str) or isinstance(b, str):
        return bool(a == b)
    return all(np.array_equal(x, y, equal_nan=True) for x, y in zip(a, b, strict=True))


def compare(case: Case, raw: list[Any], found: list[Any]) -> Counter[str]:
    """Hold every step against the oracle."""
    met: Counter[str] = Counter()
    workers, count = len(raw), len(case.shapes)
    groups = case.granularity
    if isinstance(groups, str):
        groups = [[i] for i in range(count)] if groups == "layer" else [list(range(count))]
    else:
        groups = [*groups, [i for i in range(count) if not any(i in some for some in groups)]]
    judges = [Judge(workers, **case.aggregator) for _ in groups]
    sure = [True] * len(groups)
    for step in range(max(case.steps)):
        here = {rank: raw[rank][step] for rank in range(workers) if step < case.steps[rank]}
        result = next(found[rank][step] for rank in here)
        if case.fp16:
            here = {rank: [halved(case, i, x) for i, x in enumerate(g)] for rank, g in here.items()}
        bad = [rank for rank, g in here.items() if not all(np.isfinite(x).all() for x in g)]
        met["steps"] += 1
        met["bad gradients"] += len(bad)
        met["absent ranks"] += workers - len(here)
        if bad and case.nonfinite == "raise":
            assert isinstance(result, str), f"step {step}: no error"
            assert f"rank {', '.join(map(str, bad))} holds" in result, result
            met["errors as documented"] += 1
            continue
        assert not isinstance(result, str), f"step {step}: {result}"
        if case.nonfinite == "exclude":
            here = {rank: g for rank, g in here.items() if rank not in bad}
        for index, (members, judge) in enumerate(zip(groups, judges, strict=True)):
            if not members:
                continue
            mine = {rank: np.concatenate([g[i] for i in members]) for rank, g in here.items()}
            got = np.concatenate([result[i] for i in members])
            expected = judge(mine) if mine else np.zeros_like(got)
            sure[index] = sure[index] and not judge.close
            if not sure[index]:
                met["too close to tell"] += 1
                continue
            rounding = max(PRECISION["float16" if case.fp16 else case.types[i]] for i in members)
            finite = np.isfinite(expected)
            assert (np.isfinite(got) == finite).all(), f"step {step}, group {index}: other values are not finite"
            off = float(np.linalg.norm((got - expected)[finite]))
            allowed = 40 * rounding * (judge.slack + float(np.linalg.norm(expected[finite])))
            assert off <= allowed, f"step {step}, group {index}: off by {off:.2e}, more than {allowed:.1e}"
            met["comparisons"] += 1
    return met


def halved(case: Case, number: int, x: np.ndarray) -> np.ndarray:
    """Return what fp16 compression leaves of a gradient."""
    if case.types[number] == "complex64" or (number in case.sparse and not case.options["sparse_as_dense"]):
        return x
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float64)


def agree_with_the_oracle(cluster: Any, seconds: float, module: str = __name__, **limits: float) -> None:
    """In the test: have the ranks take random cases for so long."""
    results = cluster.run(run_many, SEED, seconds, CASES, module, **limits)
    print(f"RANDOM_SEED={SEED} on {cluster.ranks} ranks under {cluster.launcher}: {results[0]}")
    assert results[0]["cases"] >= 1


def run_many(first: int, seconds: float, cases: int, module: str) -> dict[str, int]:
    """Cases from `first` on until the time or their number is up; what was met in them.

    `module` has the function `run` that takes a case.
    """
    from adacons_hvd.schedules import SCHEDULES

    take = importlib.import_module(module).run
    torch.set_num_threads(1)
    exact = [name for name, schedule in SCHEDULES.items() if getattr(schedule, "exact", True)]
    met: Counter[str] = Counter()
    end = time.monotonic() + seconds
    seed = first
    while seed < first + cases and all(harness.gather(time.monotonic() < end)):
        case = draw(seed, harness.size(), exact)
        print(f"seed {seed}", flush=True)
        try:
            met += take(case)
        except BaseException as error:
            error.add_note(f"RANDOM_SEED={seed} RANDOM_CASES=1 on {harness.size()} ranks: {case}")
            raise
        met["cases"] += 1
        seed += 1
    return {**met, "next seed": seed}
