"""Logs of real runs, and the pictures `adacons plot` makes of them."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import harness
import pytest
from command import answer, assert_one_sentence

from adacons_hvd.costs import Choice
from adacons_hvd.logging import ReportLog, log_reports
from adacons_hvd.report import Report

PNG = b"\x89PNG"


# --- runs, on the ranks -----------------------------------------------------------------------------


def digest(tensors) -> str:
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()


def train_torch(path: str, every: int, steps: int, ddp: bool = False) -> tuple[str, list[dict], bool]:
    """Train with a log and without: the parameters' digest, every step's report, whether both runs ended alike."""
    import torch

    from adacons_hvd import AdaCons
    from adacons_hvd.logging import log_reports

    def run(logged: bool) -> tuple[str, list[dict]]:
        model = torch.nn.Linear(6, 2)
        torch.nn.init.constant_(model.weight, 0.1)
        torch.nn.init.zeros_(model.bias)
        parameters = list(model.parameters())
        optimizer = torch.optim.SGD(parameters, lr=0.01)
        if ddp:
            import torch.distributed as dist

            import adacons_hvd.ddp

            if not dist.is_initialized():
                dist.init_process_group("gloo")
            model = torch.nn.parallel.DistributedDataParallel(model)
            adacons_hvd.ddp.attach(model, optimizer, AdaCons())
        else:
            harness.horovod_torch()
            import adacons_hvd.torch as hvd

            optimizer = hvd.DistributedOptimizer(
                optimizer, [(f"{logged}.{i}", p) for i, p in enumerate(parameters)], aggregator=AdaCons()
            )
        log = log_reports(optimizer, path, every) if logged else None
        generator = torch.Generator().manual_seed(harness.rank())
        reports = []
        for _ in range(steps):
            optimizer.zero_grad()
            x = torch.randn(8, 6, generator=generator)
            (model(x).sum(1) - 3 - x.sum(1)).square().mean().backward()
            optimizer.step()
            reports.append(optimizer.report.as_dict())
        if log is not None:
            log.close()
        return digest(parameters), reports

    ended, reports = run(logged=True)
    return ended, reports, run(logged=False)[0] == ended


def train_keras(path: str, events: str) -> tuple[str, list[dict]]:
    harness.horovod_keras()
    import keras
    import numpy as np
    import tensorflow as tf

    import adacons_hvd.tensorflow.keras as hvd
    from adacons_hvd.logging import keras_callback

    rng = np.random.default_rng(harness.rank())
    x = rng.standard_normal((48, 6)).astype("float32")
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(1, kernel_initializer="ones")])
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.01), aggregator=hvd.AdaCons())
    model.compile(optimizer, loss="mse")
    reports: list[dict] = []
    watch = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: reports.append(
            optimizer.report.as_dict() | {"loss": float(logs["loss"])}
        )
    )
    writer = tf.summary.create_file_writer(events)
    logs = [keras_callback(path, every=2), keras_callback(writer, every=3)]
    model.fit(x, 3 + x[:, :1], batch_size=8, epochs=1, shuffle=False, verbose=0, callbacks=[watch, *logs])
    writer.close()
    ended = hashlib.sha256(b"".join(w.tobytes() for w in model.get_weights())).hexdigest()
    return ended, reports


def read_events(folder: str) -> list[tuple[int, dict[str, float]]]:
    """By TensorFlow's own reader."""
    import tensorflow as tf

    found: dict[int, dict[str, float]] = {}
    for file in sorted(Path(folder).glob("events*")):
        for event in tf.compat.v1.train.summary_iterator(str(file)):
            for value in event.summary.value:
                found.setdefault(event.step, {})[value.tag] = value.simple_value
    return sorted(found.items())


# --- what is logged -------------------------------------------------------------------------------


def rounded(report: dict) -> dict:
    """Return a report as a log keeps it: with six digits."""
    text = json.dumps(report)
    return json.loads(text, parse_float=lambda digits: float(f"{float(digits):.6g}"))


def assert_logged(path: Path, reports: list[dict], every: int) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["steps"] for line in lines] == list(range(1, len(reports) + 1, every))
    for line in lines:
        expected = rounded(reports[line["steps"] - 1])
        assert abs(line.pop("time") - time.time()) < 600
        assert line.pop("reason", reports[0]["reason"]) == expected.pop("reason")
        assert line == expected
    assert "reason" in path.read_text().splitlines()[0]


@pytest.mark.ranks(2, launcher="gloo")
def test_a_torch_run_and_its_picture(cluster, tmp_path):
    path = tmp_path / "logs" / "run.jsonl"
    results = cluster.run(train_torch, str(path), every=3, steps=10)
    assert results[0][0] == results[1][0], "ranks ended with different parameters"
    assert all(same for _, _, same in results), "logging changed the result"
    assert results[0][1] == results[1][1]
    assert_logged(path, results[0][1], every=3)
    assert [file.name for file in path.parent.iterdir()] == ["run.jsonl"]

    found = answer("plot", path, folder=tmp_path)
    assert (found["first_step"], found["last_step"], found["workers"], found["records"]) == (1, 10, 2, 4)
    assert Path(found["picture"]).read_bytes().startswith(PNG)


@pytest.mark.ranks(2, launcher="torchrun")
def test_a_ddp_run(cluster, tmp_path):
    path = tmp_path / "run.jsonl"
    results = cluster.run(train_torch, str(path), every=4, steps=6, ddp=True)
    assert results[0][0] == results[1][0], "ranks ended with different parameters"
    assert all(same for _, _, same in results), "logging changed the result"
    assert_logged(path, results[0][1], every=4)


@pytest.mark.ranks(2, launcher="gloo", pool="tensorflow")
def test_a_keras_run_its_picture_and_tensorboard(cluster, tmp_path, here):
    path, events = tmp_path / "run.jsonl", tmp_path / "events"
    results = cluster.run(train_keras, str(path), str(events))
    assert results[0][0] == results[1][0], "ranks ended with different weights"
    reports = results[0][1]
    assert_logged(path, reports, every=2)

    seen = cluster.run(read_events, str(events))[0]
    assert [step for step, _ in seen] == [1, 4]
    for step, scalars in seen:
        (weights,) = reports[step - 1]["weights"]
        mean = sum(weights) / 2
        assert scalars["adacons/spread"] == pytest.approx(reports[step - 1]["spread"][0], rel=1e-5)
        assert scalars["adacons/largest weight"] == pytest.approx(max(weights) / mean, rel=1e-5)
        assert scalars["adacons/smallest weight"] == pytest.approx(min(weights) / mean, rel=1e-5)
        assert scalars["adacons/fallbacks"] == 0

    done = here("plot", path, "--output", tmp_path / "pictures" / "keras.svg", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "after normalization" in (tmp_path / "pictures" / "keras.svg").read_text()


# --- how it is logged -----------------------------------------------------------------------------


def a_report(step: int = 1, workers: int = 3, nan: bool = False) -> Report:
    import torch

    from adacons_hvd import AdaCons, Statistics

    gradients = torch.randn(workers, 5, generator=torch.Generator().manual_seed(step)) + 1
    if nan:
        gradients[0] = float("nan")
    decision, _ = AdaCons().explain(gradients)
    return Report(decision, Statistics.of(gradients), Choice("gather", "a test"))


class SlowReport(Report):
    """Its numbers are still being computed."""

    ready = threading.Event()

    def as_dict(self) -> dict:
        assert self.ready.wait(60)
        return super().as_dict()


def test_training_never_waits_for_the_numbers(tmp_path):
    report = a_report()
    slow = SlowReport(report.decision, report.statistics, report.choice)
    log = ReportLog(tmp_path / "run.jsonl", every=1)
    log(slow)
    log(slow)
    assert not (tmp_path / "run.jsonl").exists()
    slow.ready.set()
    log.close()
    assert len((tmp_path / "run.jsonl").read_text().splitlines()) == 2


def test_what_is_waiting_is_written_when_the_program_ends(tmp_path):
    """Even if nobody closes the log."""
    program = """if True:
        import sys, time, torch
        from adacons_hvd import AdaCons, Statistics
        from adacons_hvd.costs import Choice
        from adacons_hvd.logging import ReportLog
        from adacons_hvd.report import Report

        class SlowReport(Report):
            def as_dict(self):
                time.sleep(0.2)
                return super().as_dict()

        log, gradients = ReportLog(sys.argv[1], every=1), torch.ones(2, 3)
        for _ in range(3):
            decision, _ = AdaCons().explain(gradients)
            log(SlowReport(decision, Statistics.of(gradients), Choice("gather", "a test")))
    """
    subprocess.run([sys.executable, "-c", program, tmp_path / "run.jsonl"], timeout=60, check=True)
    assert len((tmp_path / "run.jsonl").read_text().splitlines()) == 3


def test_what_is_not_finite_is_null(tmp_path):
    with ReportLog(tmp_path / "run.jsonl") as log:
        log(a_report(nan=True))
    line = json.loads((tmp_path / "run.jsonl").read_text(), parse_constant=pytest.fail)
    assert line["norms"][0][0] is None
    assert line["fell_back"] == [True]


def test_a_log_that_cannot_be_written_does_not_end_the_training(tmp_path):
    def two_steps() -> None:
        with ReportLog(tmp_path, every=1) as log:
            log(a_report())
            log(a_report())

    with pytest.warns(UserWarning, match="log of aggregation reports ends here") as warned:
        two_steps()
    assert len(warned) == 1


def test_a_summary_writer_gets_scalars():
    class Writer:
        """As much of a SummaryWriter as is used; the package tensorboard is not part of the tested stack."""

        def __init__(self) -> None:
            self.scalars: dict[str, list[tuple[float, int]]] = {}

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.scalars.setdefault(name, []).append((value, step))

    writer, report = Writer(), a_report()
    with ReportLog(writer) as log:
        log(report)
    assert writer.scalars["adacons/spread"] == [(report.spread[0], 1)]


def test_arguments():
    import torch

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(TypeError, match=r"SGD has no aggregator.*aggregator=Mean\(\)"):
        log_reports(optimizer, "run.jsonl")
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        ReportLog("run.jsonl", every=0)
    with pytest.raises(TypeError, match="a path, a TensorBoard writer, or a run of Weights & Biases or MLflow, got 3"):
        ReportLog(3)


# --- pictures -------------------------------------------------------------------------------------


def line(step: int, fallbacks: int = 0, workers: int = 3, **more) -> str:
    rows = [[0.1 * (worker + 1) for worker in range(workers)]] * 2
    record = {
        "steps": step,
        "fallbacks": fallbacks,
        "schedule": "gather",
        "spread": [0.1, 0.2],
        "weights": rows,
        "norms": rows,
        "coefficients": {"first-order": rows, "normalized": rows},
    }
    return json.dumps(record | more) + "\n"


def reds(picture: Path) -> int:
    """How many pixels have the color of a fallback."""
    import matplotlib.image
    import numpy as np

    pixels = matplotlib.image.imread(picture)[..., :3]
    return int((np.abs(pixels - [0.839, 0.153, 0.157]) < 0.1).all(axis=2).sum())


def test_fallbacks_are_marked(tmp_path, here):
    (tmp_path / "run.jsonl").write_text("".join(line(step, fallbacks=int(step > 5)) for step in range(1, 10)))
    found = answer("plot", "run.jsonl", "--group", 1, folder=tmp_path, run=here)
    assert (found["fallbacks"], found["spread"]) == (1, pytest.approx(0.2))
    assert reds(tmp_path / "run.png") > 50
    (tmp_path / "run.jsonl").write_text("".join(line(step) for step in range(1, 10)))
    answer("plot", "run.jsonl", folder=tmp_path, run=here)
    assert reds(tmp_path / "run.png") == 0


def test_a_run_that_was_restarted_from_a_checkpoint_and_grew(tmp_path, here):
    steps = [line(step) for step in (1, 11, 21)] + [line(step, workers=4) for step in (15, 25)]
    (tmp_path / "run.jsonl").write_text("".join(steps) + '{"steps": 35, "wei')
    found = answer("plot", "run.jsonl", folder=tmp_path, run=here)
    assert (found["records"], found["first_step"], found["last_step"], found["workers"]) == (4, 1, 25, 4)


def test_steps_without_numbers_are_gaps(tmp_path, here):
    nothing = [[None] * 3] * 2
    steps = [line(1), line(2, norms=nothing, spread=[None, None], fallbacks=1), line(3, fallbacks=1)]
    (tmp_path / "run.jsonl").write_text("".join(steps))
    assert answer("plot", "run.jsonl", folder=tmp_path, run=here)["nonfinite_steps"] == 1


@pytest.mark.parametrize(
    ("text", "arguments", "words"),
    [
        ("", [], ["run.jsonl is empty"]),
        ('{"loss": 3}\n{"loss": 2}\n', [], ["line 1 of run.jsonl"]),
        (line(1), ["--group", 7], ["--group must be from 0 to 1"]),
        (line(1), ["--output", "run.xyz"], ["cannot write run.xyz"]),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_sentence(text, arguments, words, tmp_path, here):
    (tmp_path / "run.jsonl").write_text(text)
    assert_one_sentence(here("plot", "run.jsonl", *arguments, folder=tmp_path), *words)
