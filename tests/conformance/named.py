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
    "gradients": [plain()],
    "gradients by layer": [plain(granularity="layer")],
    "gradients in groups": [plain(granularity=[[2], [0]], shapes=[(64,), (3, 5), (7,)], types=["float32"] * 3)],
    "another form of AdaCons": [plain(aggregator={"momentum": 0.99, "normalize": False, "scale": "average"})],
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
        plain(shapes=[(30, 4), (4, 1), (6, 2), (5, 4)], types=["float32"] * 4, sparse=[0, 2, 3], missing=always((1, 3)))
    ],
    "sparse gradients by layer": [
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
    "several passes": [plain(passes=3), plain(passes=2, granularity="layer")],
    "several passes, of which one is not finite": [
        plain(passes=2, nonfinite="raise", poison=[(1, 1, 0, float("inf"))])
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
    **{
        f"values that are not finite: {nonfinite}": [
            plain(
                nonfinite=nonfinite,
                granularity="layer" if value > 0 else "model",
                poison=[(step, rank, 1, value) for step in steps for rank in ranks],
            )
            for value in (float("nan"), float("inf"))
            for ranks in ([1], [0, 1, 2])
            for steps in ([2], [2, 3, 4])
        ]
        for nonfinite in ("propagate", "exclude", "raise")
    },
    "values that are not finite where ranks join": [
        plain(nonfinite=nonfinite, steps=[1, 4, 4], poison=[(2, 2, 0, float("inf"))])
        for nonfinite in ("exclude", "raise")
    ],
}


def cases_of(feature: str, every: bool) -> Iterator[Case]:
    """A feature's cases with every schedule; or one of them with one. Every other feature has an even seed."""
    cases, turn = FEATURES[feature], list(FEATURES).index(feature)
    for number, case in enumerate(cases if every else [cases[turn // 2 % len(cases)]]):
        for schedule in SCHEDULES if every else [SCHEDULES[turn % 3]]:
            yield replace(case, seed=turn + number, options={**case.options, "schedule": schedule})


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


#: Arguments that one rank gives, each with what all ranks are then told of it.
DISAGREEMENTS: list[dict[str, str]] = [
    {
        "aggregator=AdaCons(momentum=0.5)": "momentum=0.5, normalize=True",
        "schedule='gather'": "schedule: one-pass on ranks 0, 2; gather on rank 1",
        "granularity='layer'": "granularity: model on ranks 0, 2; layer on rank 1",
        "groups=2": "groups: ",
        "compression=fp16": "compression: NoneCompressor on ranks 0, 2",
        "gradient_predivide_factor=2.0": "gradient_predivide_factor: 1.0 on ranks 0, 2; 2.0",
    },
    {
        "aggregator=AdaCons(normalize=False)": "normalize=False, scale='unit'",
        "granularity=[parameters[:1]]": "granularity: model on ranks 0, 2; explicit groups on rank 1",
        "groups=[parameters[:1]]": "groups: ",
        "bucket_bytes=99": "bucket_bytes: ",
        "sparse_as_dense=True": "sparse_as_dense: False on ranks 0, 2; True on rank 1",
    },
    {
        "aggregator=AdaCons(scale='average')": "scale='average', nonfinite",
        "overlap=False": "overlap: True on ranks 0, 2; False on rank 1",
        "check_replicas=10": "check_replicas: 100 on ranks 0, 2; 10 on rank 1",
        "may_differ=parameters[:1]": "may_differ, first difference at number 0: none on ranks 0, 2; a on rank 1",
    },
    {
        "aggregator=AdaCons(nonfinite='raise')": "nonfinite='raise') on rank 1",
        "grad_scaler=torch.amp.GradScaler('cpu')": "grad_scaler: False on ranks 0, 2; True on rank 1",
    },
    {"aggregator=Mean()": "Mean(nonfinite='propagate') on rank 1"},
    # Nothing else is of account then.
    {"aggregator=None": "aggregator: AdaCons("},
]


def disagree(module: str) -> list[tuple[list[str], list[str]]]:
    """On a rank: of the arguments that the binding has, what rank 1 gives otherwise, and what this rank is told."""
    binding = importlib.import_module(module)
    told = []
    for arguments in DISAGREEMENTS:
        given = [each for each in arguments if each.partition("=")[0] in binding.ARGUMENTS]
        scope = {"AdaCons": AdaCons, "Mean": Mean, "torch": torch, "fp16": getattr(binding, "FP16", None)}

        def options(parameters: list[Any], given: list[str] = given, scope: dict[str, Any] = scope) -> dict[str, Any]:
            mine = eval(f"dict({', '.join(given)})", {**scope, "parameters": parameters}) if harness.rank() == 1 else {}
            return {"aggregator": AdaCons(), **mine}

        try:
            binding.Training(options).step(0)
        except DisagreementError as error:
            # A graph puts lines of its own around the message.
            told.append((given, [line.strip() for line in str(error).splitlines() if " on rank 1" in line]))
        else:
            told.append((given, []))
    return told
