"""The paper's experiments at their smallest, on two ranks, with both aggregators (some with one in the soak alone)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@dataclass(frozen=True)
class Case:
    """A script, what makes it small, and the loss it has to come down to, as a part of its first."""

    script: str
    arguments: str
    least: float = 0.9
    # What is measured beside the loss.
    metrics: tuple[str, ...] = ()
    # Whether averaging goes through this package and is reported, too.
    reports_mean: bool = False
    # What else makes it small: lines that are run in its module first.
    changes: str = ""

    def __str__(self) -> str:
        return f"{self.script} {self.arguments}".strip()


CASES = [
    Case("linear_regression.py", "--steps 60 --dimension 100 --log-every 5"),
    Case("image_classification.py", "--epochs 4", metrics=("test_loss", "test_accuracy")),
    Case("vision_transformer.py", "--epochs 3 --depth 2 --clip 0.5", metrics=("test_loss", "test_accuracy")),
    Case("bert_pretraining.py", "--steps 60 --length 32 --width 32 --depth 1", metrics=("held_out_loss",)),
    Case("object_detection.py", "--epochs 2 --image-size 64 --pyramid 16 --head-depth 1", metrics=("test_map",)),
]
OF_KERAS = [
    Case("linear_regression_keras.py", "--steps 60 --dimension 100 --log-every 5", reports_mean=True),
    Case(
        "recommendation.py",
        "--epochs 1 --samples 10000 --crossings 1",
        metrics=("test_auc",),
        reports_mean=True,
        # Graphs of 26 tables with sparse gradients take a third of a minute to make.
        changes="CATEGORIES = 4",
    ),
]


def runs(cases):
    """Averaging is one and the same thing in all scripts for a framework."""
    means = [pytest.param(case, "mean", marks=() if case is cases[0] else pytest.mark.soak) for case in cases]
    return pytest.mark.parametrize(("case", "aggregator"), [*((case, "adacons") for case in cases), *means], ids=str)


@pytest.mark.ranks(2, launcher="gloo")
@pytest.mark.time_limit(240)
@runs(CASES)
def test_an_experiment_learns_and_all_ranks_agree(cluster, tmp_path, case, aggregator):
    learns(cluster, tmp_path, case, aggregator)


@pytest.mark.ranks(2, launcher="gloo", pool="tensorflow")
@pytest.mark.time_limit(240)
@runs(OF_KERAS)
def test_an_experiment_with_keras(cluster, tmp_path, case, aggregator):
    learns(cluster, tmp_path, case, aggregator)


def learns(cluster, tmp_path, case, aggregator):
    arguments = [*case.arguments.split(), "--aggregator", aggregator, "--out", str(tmp_path)]
    program: Path | str = EXAMPLES / case.script
    if case.changes:
        module = case.script.removesuffix(".py")
        path = f"import sys; sys.path.insert(0, {str(EXAMPLES)!r})"
        program = f"{path}; import {module}; exec({case.changes!r}, vars({module})); {module}.main()"
    result = cluster.script(program, args=arguments, forked=True)
    assert result.exit_code == 0, str(result)
    assert "all 2 ranks have the same parameters" in result.stdout[0], str(result)
    assert result.stdout[1] == ""

    (metrics,) = tmp_path.glob("*.jsonl")
    assert metrics.stem.startswith(aggregator)
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) >= 3
    assert losses[-1] < case.least * losses[0], losses
    for name in case.metrics:
        assert all(math.isfinite(record[name]) for record in records if name in record)
        assert any(name in record for record in records)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")

    reports = tmp_path / "reports" / metrics.name
    assert reports.exists() == (aggregator == "adacons" or case.reports_mean)
    if reports.exists():
        (weights,) = json.loads(reports.read_text().splitlines()[0])["weights"]
        assert len(weights) == 2
