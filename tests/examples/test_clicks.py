"""Criteo's files as the recommender reads them, its network, and its measure."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from recommendation import (
    BINS,
    CATEGORIES,
    COUNTS,
    Crossing,
    Dlrm,
    area_under_curve,
    count_lines,
    files_of,
    make_clicks,
    read,
)


def line(label="0", counts=("1",) * COUNTS, categories=("68fd1e64",) * CATEGORIES):
    return "\t".join([label, *counts, *categories])


def write(path: Path, *lines: str) -> str:
    text = "".join(f"{text}\n" for text in lines)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return str(path)


def read_all(files, batch_size=10, rows=100, rank=0, ranks=1, drop_remainder=False):
    return [[part.numpy() for part in batch] for batch in read(files, batch_size, rows, rank, ranks, drop_remainder)]


def test_fields_and_what_is_missing(tmp_path):
    missing = line("1", ("", "-2", "0", "7", *[""] * 9), ("", "05db9164", "05db9164", *[""] * 23))
    ((counts, categories, labels),) = read_all([write(tmp_path / "day_0", missing, line())])
    assert labels.tolist() == [1, 0]
    assert counts[0] == pytest.approx([0, 0, 0, math.log(8), *[0] * 9])
    assert counts[1] == pytest.approx([math.log(2)] * COUNTS)
    assert categories.shape == (2, CATEGORIES)
    assert categories[0, 0] == 0
    assert categories[0, 1] == categories[0, 2]
    assert set(categories[0, 3:]) == {0}
    # No category shares the row of those that are missing.
    names = tmp_path / "day_1"
    write(names, *(line(categories=(f"{n:08x}",) * CATEGORIES) for n in range(200)))
    numbers = np.concatenate([batch[1][:, 0] for batch in read_all([str(names)], rows=5)])
    assert set(numbers) == {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (line().rpartition("\t")[0], "Expect 40 fields"),
        (line() + "\t1", "Expect 40 fields"),
        (line(label=""), "Field 0 is required"),
        (line(label="yes"), "Field 0"),
        (line(counts=("1", "many", *["1"] * 11)), "Field 2"),
    ],
)
def test_a_malformed_line_is_an_error(tmp_path, broken, complaint):
    file = write(tmp_path / "day_0", line(), broken)
    with pytest.raises(tf.errors.InvalidArgumentError, match=complaint):
        read_all([file])


def test_ranks_share_the_lines_of_all_files(tmp_path):
    first = write(tmp_path / "day_0", *(line(counts=(str(n), *["0"] * 12)) for n in range(5)))
    second = write(tmp_path / "day_1.gz", *(line(counts=(str(n), *["0"] * 12)) for n in range(5, 9)))
    seen = []
    for rank in range(2):
        found = read_all([first, second], 2, rank=rank, ranks=2)
        seen += [round(math.expm1(x)) for counts, _, _ in found for x in counts[:, 0]]
    assert seen == [0, 2, 4, 6, 8, 1, 3, 5, 7]
    assert [len(batch[2]) for batch in read_all([first, second], 2, ranks=2, drop_remainder=True)] == [2, 2]
    assert count_lines([first, second]) == 9


def test_days_are_in_the_order_of_their_numbers(tmp_path):
    with pytest.raises(SystemExit, match="must have two files"):
        files_of(tmp_path)
    for name in ("day_10", "day_2.gz", ".hidden", "day_0"):
        (tmp_path / name).touch()
    assert [Path(name).name for name in files_of(tmp_path)] == ["day_0", "day_2.gz", "day_10"]


def test_what_is_made_can_be_read(tmp_path):
    make_clicks(tmp_path / "data")
    *train, test = files_of(tmp_path / "data")
    assert (count_lines(train), count_lines([test])) == (20_000, 4_000)
    ((counts, categories, labels),) = read_all([test], 4000)
    assert 0.1 < labels.mean() < 0.5
    assert (categories == 0).mean() == pytest.approx(0.1, abs=0.01)
    assert np.isfinite(counts).all()


def test_a_crossing_layer_follows_its_formula():
    layer = Crossing(5, 2)
    first, x = np.random.default_rng(0).normal(size=(2, 3, 5)).astype("float32")
    result = layer(first, x)
    narrow, wide, bias = (weights.numpy() for weights in layer.weights)
    assert (narrow.shape, wide.shape) == ((5, 2), (2, 5))
    np.testing.assert_allclose(result, first * (x @ narrow @ wide + bias) + x, rtol=1e-5)


def test_gradients_of_tables_are_sparse():
    model = Dlrm(50, 4, [8], [8], 1, 2)
    with tf.GradientTape() as tape:
        output = model(tf.ones((3, COUNTS)), tf.fill((3, CATEGORIES), 7))
        loss = tf.reduce_sum(output)
    assert output.shape == (3,)
    gradients = tape.gradient(loss, model.trainable_variables)
    sparse = [g for g in gradients if isinstance(g, tf.IndexedSlices)]
    assert len(sparse) == CATEGORIES
    assert all(set(g.indices.numpy()) == {7} for g in sparse)


def test_area_under_the_curve():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, BINS, 200) // 300 * 300, rng.integers(0, 2, 200)
    pairs = [(a > b) + (a == b) / 2 for a in scores[labels == 1] for b in scores[labels == 0]]
    clicked, others = (np.bincount(scores[labels == label], minlength=BINS) for label in (1, 0))
    assert area_under_curve(clicked, others) == pytest.approx(sum(pairs) / len(pairs))
    ordered = np.eye(2)
    assert area_under_curve(ordered[1], ordered[0]) == 1
    assert area_under_curve(ordered[0], ordered[1]) == 0
