"""Training jobs beside the oracle: what every binding must do, written once. Runs on the ranks.

A case is some parameters, some options, and for every step and rank some gradients, with things that go wrong: values
that are not finite, gradients that are missing, layers that are frozen, ranks that run out of data and join. Cases are
drawn from a seed (`test_random.py`) or have a name (`test_conformance.py`). The same seed gives the same case on every
rank and in every run, so `RANDOM_SEED=17 RANDOM_CASES=1` repeats what failed.

A binding takes part by one module. `fitting(case)` is the case without what the binding does not have. `run(case)`
trains, and has :func:`judged` compare ranks and hold all of them against the oracle. A `Training(options, optimizer)`
takes steps one by one, can be saved and loaded (`memory.py`), and its parameters assigned on one rank alone
(`guards.py`); ranks may disagree about its `ARGUMENTS`.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import harness
import numpy as np
import oracle
import torch

SEED = int(os.environ.get("RANDOM_SEED", random.randrange(10**9)))
CASES = int(os.environ.get("RANDOM_CASES", "1000000"))
SHAPES = [(), (1,), (7,), (3, 5), (64,), (2, 3, 4), (0, 3), (301,)]
TYPES = ["float32"] * 6 + ["float64"] * 3 + ["float16", "bfloat16", "complex64"]
# Of one rounding, relative to what is rounded.
PRECISION = {
    "float64": 2.0**-23,
    "float32": 2.0**-23,
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
    "complex64": 2.0**-23,
    "complex128": 2.0**-23,
}


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
    #: How many steps each rank has data for, in each epoch.
    steps: list[int]
    #: (step, rank, parameter, value): what one gradient holds in one place.
    poison: list[tuple[int, int, int, float]]
    #: (step, rank, parameter) without a gradient.
    missing: list[tuple[int, int, int]]
    #: parameter -> steps in which it is frozen, on all ranks.
    frozen: dict[int, tuple[int, int]]
    #: Factors of the ranks' gradients.
    sizes: list[float]
    #: After each epoch all ranks join; then their parameters are made equal, and they begin the next.
    epochs: int = 1

    @property
    def last_to_join(self) -> int:
        """The rank with the most steps in each epoch."""
        return self.steps.index(max(self.steps))

    def times(self, rank: int) -> list[range]:
        """For each epoch the steps that this rank takes, numbered alike on all ranks."""
        longest = max(self.steps)
        return [range(epoch * longest, epoch * longest + self.steps[rank]) for epoch in range(self.epochs)]


def plain(**changes: Any) -> Case:
    """A case in which nothing happens: two float32 parameters, five steps, three workers of unlike lengths."""
    case = Case(
        seed=1,
        shapes=[(64,), (3, 5)],
        types=["float32", "float32"],
        sparse=[],
        aggregator={"momentum": 0.9, "normalize": True, "scale": "unit"},
        nonfinite="propagate",
        options={"schedule": "one-pass", "bucket_bytes": 64},
        granularity="model",
        groups=None,
        fp16=False,
        optimizer="SGD",
        passes=1,
        steps=[5, 5, 5],
        poison=[],
        missing=[],
        frozen={},
        sizes=[1.0, 0.5, 2.0],
    )
    return replace(case, **changes)


#: For trainings whose gradients are given, and what becomes of them is not held against the oracle.
GIVEN = plain()
#: The options of a training, given its parameters.
Options = Callable[[list[Any]], dict[str, Any]]


def no_options(parameters: list[Any]) -> dict[str, Any]:
    """Those of every training."""
    return {}


@dataclass(frozen=True)
class Seen:
    """What a rank sees of a step: the aggregated gradients, or the error there was instead, and some of the report."""

    gradients: list[np.ndarray] | str
    schedule: str = ""
    present: Sequence[bool] = ()

    @classmethod
    def of(cls, gradients: list[np.ndarray], report: Any) -> Seen:
        if report is None:
            return cls(gradients)
        assert not any(w for w, here in zip(report.weights[0], report.present[0], strict=True) if not here)
        return cls(gradients, report.schedule, tuple(report.present[0]))


@contextmanager
def joining(join: Callable[[], Any]) -> Iterator[None]:
    """A rank trains for as long as it has data, and joins then, whatever ended its training."""
    try:
        yield
    finally:
        join()


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


def given_gradients(step: int) -> list[torch.Tensor]:
    """This rank's gradients in a training that no oracle judges."""
    found = [gradient(GIVEN, step, 0, harness.rank(), number) for number in range(len(GIVEN.shapes))]
    return [each.double() for each in found if each is not None]


def array(tensor: torch.Tensor | None, like: torch.Tensor) -> np.ndarray:
    """As real float64 numbers, zeros where there is nothing."""
    tensor = torch.zeros_like(like) if tensor is None else tensor.detach()
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.to(torch.float64).reshape(-1).numpy().copy()


def pick(numbers: Any, parameters: Sequence[Any]) -> Any:
    """Lists of parameters from lists of their numbers; anything else stays."""
    return [[parameters[i] for i in some] for some in numbers] if isinstance(numbers, list) else numbers


def judged(
    case: Case,
    raw: Mapping[int, list[np.ndarray]],
    seen: Mapping[int, Seen],
    parameters: list[np.ndarray],
    memory: Mapping[str, Any],
    only_sums_once_joined: bool = True,
) -> Counter[str]:
    """Compare ranks with each other, and rank 0 all of them with the oracle; what was met.

    ``raw`` and ``seen`` are by the step's number: this rank's gradients, and what became of them.
    """
    everyone = harness.gather((raw, seen))
    bits = harness.gather(hashlib.sha256(repr([p.tolist() for p in parameters]).encode()).hexdigest())
    if case.epochs > 1:  # after which they were made equal
        assert len(set(bits)) == 1, "parameters differ"
    stayed = [rank for rank, steps in enumerate(case.steps) if steps == max(case.steps)]
    assert len({bits[rank] for rank in stayed}) == 1, "parameters differ"
    assert all(np.isfinite(np.asarray(value)).all() for value in memory.values()), "the momentum is not finite"
    if harness.rank():
        return Counter()
    return compare(case, [theirs for theirs, _ in everyone], [theirs for _, theirs in everyone], only_sums_once_joined)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, str) or isinstance(b, str):
        return bool(a == b)
    return all(np.array_equal(x, y, equal_nan=True) for x, y in zip(a, b, strict=True))


def compare(
    case: Case, raw: list[Mapping[int, Any]], seen: list[Mapping[int, Seen]], only_sums_once_joined: bool
) -> Counter[str]:
    """Hold every step against the oracle; arguments by rank."""
    met: Counter[str] = Counter()
    workers, count = len(raw), len(case.shapes)
    groups = case.granularity
    if isinstance(groups, str):
        groups = [[i] for i in range(count)] if groups == "layer" else [list(range(count))]
    else:
        groups = [*groups, [i for i in range(count) if not any(i in some for some in groups)]]
    judges = [oracle.Judge(workers, **case.aggregator) for _ in groups]
    sure = [True] * len(groups)
    for step in sorted(set().union(*raw)):
        here = {rank: raw[rank][step] for rank in range(workers) if step in raw[rank]}
        first, *others = (seen[rank][step] for rank in here)
        assert all(same(first.gradients, other.gradients) for other in others), f"step {step}: the ranks differ"
        result = first.gradients
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
        asked = case.options["schedule"]
        if len(here) < workers and only_sums_once_joined:
            asked = "two-pass"
        if case.nonfinite == "exclude":
            here = {rank: g for rank, g in here.items() if rank not in bad}
        for each in (first, *others):
            if each.schedule:
                assert each.schedule == asked or asked == "auto", f"step {step}: {each.schedule}"
                assert each.present == tuple(rank in here for rank in range(workers)), f"step {step}: {each.present}"
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
    if case.types[number].startswith("complex") or (number in case.sparse and not case.options["sparse_as_dense"]):
        return x
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float64)


def agree_with_the_oracle(cluster: Any, seconds: float, module: str, **limits: float) -> None:
    """In the test: have the ranks take random cases for so long."""
    results = cluster.run(run_many, SEED, seconds, CASES, module, **limits)
    print(f"RANDOM_SEED={SEED} on {cluster.ranks} ranks under {cluster.launcher}: {results[0]}")
    assert results[0]["cases"] >= 1


def run_many(first: int, seconds: float, cases: int, module: str) -> dict[str, int]:
    """Cases from `first` on until the time or their number is up; what was met in them.

    `module` has a binding's part.
    """
    from adacons_hvd.schedules import SCHEDULES

    binding = importlib.import_module(module)
    torch.set_num_threads(1)
    exact = [name for name, schedule in SCHEDULES.items() if getattr(schedule, "exact", True)]
    met: Counter[str] = Counter()
    end = time.monotonic() + seconds
    seed = first
    while seed < first + cases and all(harness.gather(time.monotonic() < end)):
        case = binding.fitting(draw(seed, harness.size(), exact))
        print(f"seed {seed}", flush=True)
        try:
            met += binding.run(case)
        except BaseException as error:
            error.add_note(f"RANDOM_SEED={seed} RANDOM_CASES=1 on {harness.size()} ranks: {case}")
            raise
        met["cases"] += 1
        seed += 1
    return {**met, "next seed": seed}
