"""The experiments share the split of data, the command line and the record of a run."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from common import Run, add_data_argument, batches, label, make_aggregator, make_parser, parse, warmup_then_cosine

from adacons_hvd import AdaCons, Mean


class Alone:
    """A Horovod of one rank, or one whose other ranks say what they are told to."""

    def __init__(self, *others: object) -> None:
        self.others = others

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1 + len(self.others)

    def allgather_object(self, value):
        return [value, *self.others]


def arguments(monkeypatch, tmp_path, *words, **full):
    monkeypatch.setattr("sys.argv", ["script.py", "--out", str(tmp_path), *words])
    parser = make_parser("A script.", "script")
    add_data_argument(parser, "a folder")
    return parse(parser, **full)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_an_epoch(ranks):
    shares = [batches(50, 4, rank, ranks, seed=1, epoch=2) for rank in range(ranks)]
    assert {len(share) for share in shares} == {50 // (4 * ranks)}
    assert all(len(batch) == 4 for share in shares for batch in share)
    seen = [index for share in shares for batch in share for index in batch]
    assert len(set(seen)) == len(seen)
    assert set(seen) < set(range(50))
    assert batches(50, 4, 0, ranks, seed=1, epoch=2) == shares[0]
    assert batches(50, 4, 0, ranks, seed=1, epoch=3) != shares[0]
    assert batches(50, 4, 0, ranks, seed=2, epoch=2) != shares[0]


def test_too_few_samples_are_refused():
    with pytest.raises(SystemExit, match="7 samples are too few for one batch of 4 on each of 2 ranks"):
        batches(7, 4, 0, 2, 0, 0)


def test_full_changes_defaults_and_flags_still_count(monkeypatch, tmp_path):
    full = {"batch_size": 256, "learning_rate": 0.8}
    assert arguments(monkeypatch, tmp_path, **full).batch_size == 32
    args = arguments(monkeypatch, tmp_path, "--full", "--data", ".", "--learning-rate", "0.4", **full)
    assert (args.batch_size, args.learning_rate) == (256, 0.4)
    with pytest.raises(SystemExit):
        arguments(monkeypatch, tmp_path, "--full", **full)


def test_the_ablation_is_a_matter_of_flags(monkeypatch, tmp_path):
    names = {}
    for words, expected in {
        "--aggregator mean": None,
        "--momentum 0 --no-normalize": AdaCons(momentum=0, normalize=False),
        "--no-normalize": AdaCons(normalize=False),
        "--momentum 0": AdaCons(momentum=0),
        "": AdaCons(),
        "--scale average": AdaCons(scale="average"),
    }.items():
        args = arguments(monkeypatch, tmp_path, *words.split())
        assert make_aggregator(args) == expected
        names[label(args)] = words
    assert len(names) == 6
    assert make_aggregator(arguments(monkeypatch, tmp_path, "--aggregator", "mean"), Mean()) == Mean()


def test_a_run_is_written_and_drawn(monkeypatch, tmp_path):
    args = arguments(monkeypatch, tmp_path, "--log-every", "2")
    (tmp_path / "adacons-unit.jsonl").write_text("of an earlier run")
    run = Run(args, Alone([5.0]), steps=3)
    for loss in (1.0, 2.0, math.nan):
        run.step(loss)
    run.record(accuracy=0.5)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [(line["step"], line.get("loss"), line.get("accuracy")) for line in lines] == [
        (2, (1.5 + 5) / 2, None),
        (3, None, None),
        (3, None, 0.5),
    ]
    run.hvd = Alone()
    run.finish([np.arange(3.0)])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_ranks_that_differ_in_one_bit_are_noticed(monkeypatch, tmp_path):
    args = arguments(monkeypatch, tmp_path)
    digests = []

    class Copy(Alone):
        def allgather_object(self, value):
            digests.append(value)
            return [value, digests[0]]

    Run(args, Copy(), steps=1)
    run = Run(args, Copy(), steps=1)
    run.record(loss=1.0)
    run.finish([np.array([1.0, 2.0])])
    with pytest.raises(SystemExit, match="different parameters"):
        run.finish([np.array([1.0, np.nextafter(2.0, 3)])])


def test_the_learning_rate_rises_and_falls():
    rates = [warmup_then_cosine(step, 100, 10) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (k + 1) for k in range(10)])
    assert rates[10] == 1
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert 0 < rates[-1] < 0.001
    assert warmup_then_cosine(0, 100, 0) == 1
