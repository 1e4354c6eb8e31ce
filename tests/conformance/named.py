"""Cases with a name: one for each thing that every binding must do. Runs on the ranks."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import harness
import torch
from cases import Case, plain

from adacons_hvd import AdaCons, Mean
from adacons_hvd.agreement import DisagreementError

SCHEDULES = ["two-pass", "one-pass", "gather"]


def always(*pairs: tuple[int, int]) -> list[tuple[int, int, int]]:
    """These (rank, parameter) have no gradient in any of five steps."""
    return [(step, *pair) for step in range(5) for pair in sorted(pairs)]


#: What happens, by the name of what a binding must do about it.
FEATURES: dict[str, list[Case]] = {
    "gradients": [
        plain(),
        plain(granularity="layer"),
        plain(granularity=[[2], [0]], shapes=[(64,), (3, 5), (7,)], types=["float32"] * 3),
        plain(aggregator={"momentum": 0.99, "normalize": False, "scale": "average"}),
    ],
    "a rank whose gradients are zero": [plain(sizes=[1.0, 0.0, 2.0], granularity=g) for g in ("model", "layer")],
    "odd shapes": [
        # Alone of its type, one without elements; and in a group of its own.
        plain(shapes=[(0, 3), (), (1,), (301,)], types=["float64", "float32", "float32", "float32"]),
        plain(shapes=[(5,), (0, 3), ()], types=["float32"] * 3, granularity="layer"),
    ],
    "element types": [
        plain(shapes=[(40,), (3, 3), (7,), (40,)], types=["float64", "float32", "float16", "bfloat16"], granularity=g)
        for g in ("model", "layer")
    ],
    "complex gradients": [
        plain(shapes=[(2, 3), (5,), (7,)], types=["complex64", "float32", "complex128"], granularity=g)
        for g in ("model", "layer")
    ],
    "sparse gradients": [
        plain(
            shapes=[(30, 4), (4, 1), (6, 2), (5, 4)], types=["float32"] * 4, sparse=[0, 2, 3], missing=always((1, 3))
        ),
        plain(shapes=[(30, 4), (4, 1)], types=["float32"] * 2, sparse=[0], granularity="layer", missing=always((0, 0))),
    ],
    "sparse gradients on some steps": [
        plain(shapes=[(30, 4), (4,)], types=["float32"] * 2, sparse=[0], missing=[(2, 0, 0), *always((1, 0))[-1:]])
    ],
    "sparse gradients made dense": [
        plain(
            shapes=[(30, 4), (4, 1)],
            types=["float32"] * 2,
            sparse=[0],
            options={"schedule": "one-pass", "bucket_bytes": 64, "sparse_as_dense": True},
        )
    ],
    "gradients that one rank lacks": [plain(missing=always((1, 0))), plain(missing=always((0, 0), (2, 1)))],
    "gradients that are missing on some steps": [
        plain(missing=[(1, 0, 0), (1, 1, 0), (1, 2, 0), (2, 0, 1), (3, 0, 0), (3, 0, 1)])
    ],
    "layers that are frozen": [
        plain(shapes=[(64,), (3, 5), (7,)], types=["float32"] * 3, frozen={0: (0, 9), 1: (0, 1), 2: (2, 2)})
    ],
    "half precision on the wire": [plain(fp16=True), plain(fp16=True, granularity="layer")],
    # Without Eq. 13 a factor that is not undone shows in the result.
    "division before sums": [
        plain(
            aggregator={"momentum": 0.9, "normalize": False, "scale": "unit"},
            options={"schedule": "one-pass", "bucket_bytes": 64, "gradient_predivide_factor": 4.0},
        )
    ],
    "parameters that travel together": [plain(groups=groups) for groups in (1, 2, [[1]])],
    "several passes": [
        plain(passes=3),
        plain(passes=2, granularity="layer"),
        plain(passes=2, nonfinite="raise", poison=[(1, 1, 0, float("inf"))]),
    ],
    "other passes than announced, or as many": [
        plain(
            passes=passes, options={"schedule": "one-pass", "bucket_bytes": 64, "backward_passes_per_step": announced}
        )
        for passes, announced in ((3, 3), (1, 2), (3, 2))
    ],
    "ranks that join": [plain(steps=[4, 6, 5], epochs=2, granularity=g) for g in ("model", "layer")],
    "ranks that join, with sparse gradients": [
        plain(shapes=[(30, 4), (4, 1)], types=["float32"] * 2, sparse=[0], steps=[4, 6, 5], epochs=2)
    ],
    # NaN and infinity, on one rank and on all, in one step and from then on.
    "values that are not finite": [
        plain(
            nonfinite=nonfinite,
            granularity="layer" if value > 0 else "model",
            poison=[(step, rank, 1, value) for step in steps for rank in ranks],
        )
        for nonfinite in ("propagate", "exclude", "raise")
        for value in (float("nan"), float("inf"))
        for ranks in ([1], [0, 1, 2])
        for steps in ([2], [2, 3, 4])
    ],
    "values that are not finite where ranks join": [
        plain(nonfinite=nonfinite, steps=[1, 4, 4], poison=[(2, 2, 0, float("inf"))])
        for nonfinite in ("exclude", "raise")
    ],
}


def cases_of(feature: str, every: bool) -> Iterator[Case]:
    """A feature's cases with every schedule; or some of them, with one each. Every other seed is even."""
    cases = FEATURES[feature]
    for number, case in enumerate(cases if every else cases[:: 1 + len(cases) // 9]):
        for schedule in SCHEDULES if every else [SCHEDULES[number % 3]]:
            yield replace(case, seed=number, options={**case.options, "schedule": schedule})


def take_all(module: str, every: bool) -> list[str]:
    """On a rank: all cases that the binding has. Returns the features of which it has none."""
    binding = importlib.import_module(module)
    lacks = []
    for feature in FEATURES:
        taken = 0
        for case in cases_of(feature, every):
            if binding.fitting(case) != case:
                continue
            try:
                met = binding.run(case)
                if harness.rank() == 0:
                    raises = case.nonfinite == "raise"
                    assert met["errors as documented"] == raises * len({step for step, *_ in case.poison})
            except BaseException as error:
                error.add_note(f"{feature}, on {harness.size()} ranks: {case}")
                raise
            taken += 1
        if not taken:
            lacks.append(feature)
    return lacks


#: An argument that one rank gives, and what all ranks are then told.
DISAGREEMENTS = {
    "aggregator=AdaCons(momentum=0.5)": "momentum=0.5, normalize=True",
    "aggregator=AdaCons(normalize=False)": "normalize=False, scale='unit'",
    "aggregator=AdaCons(scale='average')": "scale='average', nonfinite",
    "aggregator=AdaCons(nonfinite='raise')": "nonfinite='raise') on rank 1",
    "aggregator=Mean()": "Mean(nonfinite='propagate') on rank 1",
    # Nothing else is of account then.
    "aggregator=None": "aggregator: AdaCons(",
    "schedule='gather'": "schedule: one-pass on ranks 0, 2; gather on rank 1",
    "granularity='layer'": "granularity: model on ranks 0, 2; layer on rank 1",
    "granularity=[parameters[:1]]": "granularity: model on ranks 0, 2; explicit groups on rank 1",
    "groups=2": "groups: ",
    "groups=[parameters[:1]]": "groups: ",
    "compression=fp16": "compression: NoneCompressor on ranks 0, 2",
    "bucket_bytes=99": "bucket_bytes: ",
    "sparse_as_dense=True": "sparse_as_dense: False on ranks 0, 2; True on rank 1",
    "gradient_predivide_factor=2.0": "gradient_predivide_factor: 1.0 on ranks 0, 2; 2.0",
    "overlap=False": "overlap: True on ranks 0, 2; False on rank 1",
    "grad_scaler=torch.amp.GradScaler('cpu')": "grad_scaler: False on ranks 0, 2; True on rank 1",
    "check_replicas=10": "check_replicas: 100 on ranks 0, 2; 10 on rank 1",
    "may_differ=parameters[:1]": "may_differ, first difference at number 0: none on ranks 0, 2; a on rank 1",
}


def disagree(module: str) -> dict[str, list[str]]:
    """On a rank: what it is told where rank 1 gives another argument, for all arguments that the binding has."""
    binding = importlib.import_module(module)
    told = {}
    for given in DISAGREEMENTS:
        if given.partition("=")[0] not in binding.ARGUMENTS:
            continue
        scope = {"AdaCons": AdaCons, "Mean": Mean, "torch": torch, "fp16": getattr(binding, "FP16", None)}

        def options(parameters: list[Any], given: str = given, scope: dict[str, Any] = scope) -> dict[str, Any]:
            mine = eval(f"dict({given})", {**scope, "parameters": parameters}) if harness.rank() == 1 else {}
            return {"aggregator": AdaCons(), **mine}

        try:
            binding.Training(options).step(0)
        except DisagreementError as error:
            # A graph puts lines of its own around the message.
            told[given] = [line.strip() for line in str(error).splitlines() if " on rank 1" in line]
        else:
            told[given] = []
    return told
