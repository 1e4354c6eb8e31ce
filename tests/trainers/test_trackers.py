"""Logs of reports in Weights & Biases and in MLflow, as the real packages keep them without a network."""

from __future__ import annotations

import torch

from adacons_hvd import Mean, Statistics
from adacons_hvd.costs import Choice
from adacons_hvd.insight import MovingAverages
from adacons_hvd.logging import ReportLog
from adacons_hvd.report import Report


def reports() -> list[Report]:
    aggregator, memory, found = MovingAverages(Mean()), {}, []
    for step in range(3):
        rows = torch.randn(4, 20, generator=torch.Generator().manual_seed(step)) + 1
        statistics = Statistics.of(rows)
        decision = aggregator.decide(statistics, memory)
        memory = decision.memory
        found.append(Report(decision, statistics, Choice("gather", "a test")))
    return found


def log_into(destination: object) -> list[Report]:
    found = reports()
    with ReportLog(destination, every=1) as log:
        for report in found:
            log(report)
    return found


def test_weights_and_biases(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    import wandb

    with wandb.init(project="test", mode="offline", dir=tmp_path) as run:
        last = log_into(run)[-1]
        kept = dict(run.summary)
    assert kept["adacons/step"] == 3
    assert kept["adacons/noise scale"] == last.noise_scale[0]
    assert kept["adacons/agreement/rank 2"] == last.agreement[0][2]


def test_mlflow(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
    with mlflow.start_run() as run:
        found = log_into(run)
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "adacons/noise scale")
    assert [(metric.step, metric.value) for metric in history] == [
        (number + 1, report.noise_scale[0]) for number, report in enumerate(found)
    ]
