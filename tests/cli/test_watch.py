"""`adacons watch`: what a logged run shows in the terminal, while it goes on."""

from __future__ import annotations

import functools
import json
import os
import pty
import re
import signal
import subprocess
import time

import torch
from command import COMMAND, adacons, answer, assert_one_sentence

from adacons_hvd import Mean, Statistics
from adacons_hvd.costs import Choice
from adacons_hvd.insight import SickWorkers
from adacons_hvd.logging import ReportLog
from adacons_hvd.report import Report


def write(path, steps: int, first: int = 0, sick: bool = True) -> Report:
    """Log a run of four workers, one of which goes another way from step 20 on; return its last report."""
    aggregator, memory = SickWorkers(Mean(), callback=lambda worker: None), {}
    with ReportLog(path, every=1) as log:
        for step in range(steps):
            rows = torch.randn(4, 60, generator=torch.Generator().manual_seed(step)) + 0.6
            if sick and step >= 20:
                rows[2] *= -1
            statistics = Statistics.of(rows)
            decision = aggregator.decide(statistics, memory)
            memory = decision.memory
            report = Report(decision, statistics, Choice("gather", "a test"))
            log.loss = torch.tensor(1 / (step + 1))
            if step >= first:
                log(report)
    return report


def test_what_is_shown_and_drawn(tmp_path, here):
    report = write(tmp_path / "run.jsonl", 50)
    assert report.sick == [2]
    last = json.loads((tmp_path / "run.jsonl").read_text().splitlines()[-1])
    found = answer("watch", "run.jsonl", folder=tmp_path, run=here)
    for name in ("agreement", "norms", "noise_scale", "adascale_gain"):
        assert found[name] == last[name][0]
    assert (found["loss"], found["sick"], found["step"], found["schedule"]) == (0.02, [2], 50, "gather")
    text = adacons("watch", "run.jsonl", "--once", folder=tmp_path).stdout
    assert re.search(r"step +50, by gather, 0 fallbacks", text)
    assert re.search(r"loss +0\.02 +█", text)
    assert "noise scale" in text
    rows = [line for line in text.splitlines() if re.match(r"│ +\d ", line)]
    assert [("sick" in row) for row in rows] == [False, False, True, False]
    assert f"{last['agreement'][0][2]:.3f}" in rows[2]

    from test_logging import reds

    answer("plot", "run.jsonl", folder=tmp_path, run=here)
    assert reds(tmp_path / "run.png") > 50
    (tmp_path / "run.jsonl").unlink()
    write(tmp_path / "run.jsonl", 50, sick=False)
    answer("plot", "run.jsonl", folder=tmp_path, run=here)
    assert reds(tmp_path / "run.png") == 0


def test_a_run_is_followed_while_it_goes_on(tmp_path):
    write(tmp_path / "run.jsonl", 10)
    main, side = pty.openpty()
    command = [*COMMAND, "watch", "run.jsonl", "--every", "0.1"]
    env = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    # Where tests run in the background of a shell, they and what they start would not hear of an interruption.
    hears = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, cwd=tmp_path, stdin=side, stdout=side, stderr=side, env=env, preexec_fn=hears)
    shown, until, more = "", time.monotonic() + 60, False
    while "by gather" not in shown[shown.find("12, ") :] or not more:
        assert time.monotonic() < until, shown
        shown += os.read(main, 1 << 16).decode(errors="replace")
        if not more and "10, by gather" in shown:
            write(tmp_path / "run.jsonl", 12, first=10)
            more = True
        if more and "12, by gather" in shown:
            break
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130


def test_what_cannot_be_shown_is_said_in_one_sentence(tmp_path):
    assert_one_sentence(adacons("watch", "run.jsonl", folder=tmp_path), "cannot read run.jsonl")
    write(tmp_path / "run.jsonl", 2)
    assert_one_sentence(adacons("watch", "run.jsonl", "--group", 3, folder=tmp_path), "--group must be from 0 to 0")
    assert_one_sentence(adacons("watch", "run.jsonl", "--every", 0, folder=tmp_path), "--every must be positive")
