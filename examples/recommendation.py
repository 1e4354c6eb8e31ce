"""Which advertisement is clicked: DLRM with the crossing layers of DCN-v2 (section 4.4 of the paper), with Keras.

    horovodrun --gloo -np 2 python examples/recommendation.py

The data is a folder of files as Criteo has published them, as text or gzipped: a line for each
advertisement shown, with a label, 13 counts and 26 categories in hexadecimal, any of which may be
missing, between tabs. The last file, in the order of the numbers in the names, is tested on.
"""

from __future__ import annotations

import gzip
import re
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from common import Run, add_data_argument, find_data, make_aggregator, make_parser, parse, total

import adacons_hvd.tensorflow
import adacons_hvd.tensorflow.keras as hvd_keras
from adacons_hvd import Mean
from adacons_hvd.logging import ReportLog

# Horovod comes without types.
hvd: Any = adacons_hvd.tensorflow

COUNTS, CATEGORIES = 13, 26
FULL = {
    "width": 128,
    "rows": 1_000_000,
    "bottom": [512, 256],
    "top": [1024, 1024, 512, 256],
    "crossings": 3,
    "rank": 512,
    "epochs": 1,
    "batch_size": 8192,
    "learning_rate": 0.005,
    "log_every": 100,
}

# --- data -----------------------------------------------------------------------------------------


def files_of(folder: Path) -> list[str]:
    """The files to train on and, at the end, the one to test on: day_2 before day_10."""
    found = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    if len(found) < 2:
        raise SystemExit(
            f"{folder} must have two files or more: all but the last are trained on, that one is tested on"
        )
    order = {path: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)] for path in found}
    return [str(path) for path in sorted(found, key=order.__getitem__)]


def count_lines(files: list[str]) -> int:
    lines = 0
    for name in files:
        with gzip.open(name) if name.endswith(".gz") else Path(name).open("rb") as file:
            lines += sum(1 for _ in file)
    return lines


def read(files: list[str], batch_size: int, rows: int, rank: int, ranks: int, drop_remainder: bool) -> Any:
    """This rank's lines as batches of (counts, categories, labels).

    Counts become logarithms, 0 where they are missing or negative. Categories become numbers of
    rows of a table, row 0 where they are missing.
    """
    label, counts, categories = tf.constant([], tf.int32), tf.constant([0.0]), tf.constant([""])
    defaults = [label, *[counts] * COUNTS, *[categories] * CATEGORIES]

    def fields(lines: Any) -> tuple[Any, Any, Any]:
        label, *fields = tf.io.decode_csv(lines, defaults, field_delim="\t", use_quote_delim=False)
        counts = tf.stack(fields[:COUNTS], axis=1)
        names = tf.stack(fields[COUNTS:], axis=1)
        hashed = 1 + tf.strings.to_hash_bucket_fast(names, rows - 1)
        categories = tf.where(names == "", tf.zeros_like(hashed), hashed)
        return tf.math.log1p(tf.maximum(counts, 0.0)), categories, tf.cast(label, tf.float32)

    def lines_of(name: str) -> Any:
        return tf.data.TextLineDataset(name, "GZIP" if name.endswith(".gz") else "")

    lines = lines_of(files[0])
    for name in files[1:]:
        lines = lines.concatenate(lines_of(name))
    lines = lines.shard(ranks, rank).batch(batch_size, drop_remainder)
    return lines.map(fields, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)


def make_clicks(folder: Path) -> None:
    """Two days of clicks that depend on a few counts and on every category."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    effects = rng.normal(0, 0.5, (CATEGORIES, 40))
    for day, lines in enumerate((20_000, 4_000)):
        counts = rng.geometric(0.1, (lines, COUNTS)) - 2
        # Some of a field's categories are much more frequent than others.
        categories = (40 * rng.random((lines, CATEGORIES)) ** 2).astype(int)
        missing = rng.random((lines, COUNTS + CATEGORIES)) < 0.1
        score = np.log1p(counts[:, :4].clip(0)).sum(1) - 8
        score += np.where(missing[:, COUNTS:], 0, effects[np.arange(CATEGORIES), categories]).sum(1)
        clicks = rng.random(lines) < 1 / (1 + np.exp(-score))
        with (folder / f"day_{day}").open("w", encoding="ascii") as file:
            for click, integers, names, gaps in zip(clicks, counts, categories, missing, strict=True):
                texts = [*map(str, integers), *(f"{(name + 1) * 2654435761 % 2**32:08x}" for name in names)]
                kept = ("" if gap else text for text, gap in zip(texts, gaps, strict=True))
                print(int(click), *kept, sep="\t", file=file)


# --- network --------------------------------------------------------------------------------------


class Crossing(keras.layers.Layer):
    """A layer of DCN-v2: the input times a linear function of what the layers before made of it, of low rank."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.narrow = keras.layers.Dense(rank, use_bias=False)
        self.wide = keras.layers.Dense(width)

    def call(self, first: Any, x: Any) -> Any:
        return first * self.wide(self.narrow(x)) + x


class Dlrm(keras.Model):
    """Counts through a network, categories through tables, both crossed, then one more network to a logit."""

    def __init__(self, rows: int, width: int, bottom: list[int], top: list[int], crossings: int, rank: int) -> None:
        super().__init__()
        uniform = keras.initializers.RandomUniform(-(rows**-0.5), rows**-0.5)
        # Gradients of tables are sparse: only the rows that a batch has used.
        self.tables = [keras.layers.Embedding(rows, width, embeddings_initializer=uniform) for _ in range(CATEGORIES)]
        self.bottom = keras.Sequential([keras.layers.Dense(size, "relu") for size in [*bottom, width]])
        self.crossings = [Crossing((CATEGORIES + 1) * width, rank) for _ in range(crossings)]
        self.top = keras.Sequential([*(keras.layers.Dense(size, "relu") for size in top), keras.layers.Dense(1)])

    def call(self, counts: Any, categories: Any) -> Any:
        found = [table(categories[:, field]) for field, table in enumerate(self.tables)]
        first = x = keras.ops.concatenate([self.bottom(counts), *found], axis=1)
        for crossing in self.crossings:
            x = crossing(first, x)
        return self.top(x)[:, 0]


# --- training -------------------------------------------------------------------------------------

#: Into how many steps the predictions are divided to compare them.
BINS = 2**14


def area_under_curve(clicked: np.ndarray, others: np.ndarray) -> float:
    """How often a click was thought more likely than another line, from the counts of both by prediction."""
    below = np.cumsum(others) - others / 2
    return float((clicked * below).sum() / (clicked.sum() * others.sum()))


def evaluate(predict: Any, data: Any) -> float:
    """The area under the curve on the test set, of which each rank reads a part."""
    counted = np.zeros((2, BINS))
    for counts, categories, labels in data:
        bins = np.minimum(predict(counts, categories).numpy() * BINS, BINS - 1).astype(int)
        for label in (0, 1):
            counted[label] += np.bincount(bins[labels.numpy() == label], minlength=BINS)
    others, clicked = np.array(total(hvd, *counted.ravel())).reshape(2, BINS)
    return area_under_curve(clicked, others)


def main() -> None:
    # Adagrad divides by all gradients so far, and cannot know of a length that the first ones did not have.
    parser = make_parser(__doc__, "recommendation", scale="average")
    add_data_argument(parser, "folder with files in Criteo's format")
    parser.set_defaults(batch_size=128, learning_rate=0.02)
    parser.add_argument("--samples", type=int, help="lines to train on; without it they are counted first")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rows", type=int, default=1000, help="of each of the 26 tables")
    parser.add_argument("--width", type=int, default=8, help="of a row")
    parser.add_argument("--bottom", type=int, nargs="*", default=[32], help="layers for the counts")
    parser.add_argument("--top", type=int, nargs="*", default=[64, 32], help="layers after the crossing ones")
    parser.add_argument("--crossings", type=int, default=2, help="layers of DCN-v2")
    parser.add_argument("--rank", type=int, default=16, help="of their matrices")
    args = parse(parser, **FULL)

    hvd.init()
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        tf.config.set_visible_devices(gpus[hvd.local_rank()], "GPU")
    *train, test = files_of(find_data(args, hvd, make_clicks))
    samples = args.samples
    if samples is None:
        samples = hvd.broadcast_object(count_lines(train) if hvd.rank() == 0 else None, root_rank=0)
    # All ranks take the same number of batches, even if some have a line more.
    per_epoch = samples // hvd.size() // args.batch_size
    if per_epoch == 0:
        raise SystemExit(f"{samples} lines are too few for a batch of {args.batch_size} on each of {hvd.size()} ranks")
    share = (args.rows, hvd.rank(), hvd.size())
    batches = read(train, args.batch_size, *share, drop_remainder=True).take(per_epoch)
    held_out = read([test], args.batch_size, *share, drop_remainder=False)

    keras.utils.set_random_seed(args.seed)
    model = Dlrm(args.rows, args.width, args.bottom, args.top, args.crossings, args.rank)
    model(tf.zeros((1, COUNTS)), tf.zeros((1, CATEGORIES), tf.int64))
    adagrad = keras.optimizers.Adagrad(args.learning_rate, initial_accumulator_value=0.0, epsilon=1e-10)
    optimizer = hvd_keras.DistributedOptimizer(adagrad, aggregator=make_aggregator(args, Mean()))
    optimizer.build(model.trainable_variables)
    hvd.broadcast_variables([variable.value for variable in model.variables], root_rank=0)
    hvd.broadcast_variables([variable.value for variable in optimizer.variables], root_rank=0)

    @tf.function
    def step(counts: Any, categories: Any, labels: Any) -> Any:
        with tf.GradientTape() as tape:
            logits = model(counts, categories)
            loss = tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(labels, logits))
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(loss, variables), variables)
        return loss

    @tf.function(reduce_retracing=True)
    def predict(counts: Any, categories: Any) -> Any:
        return tf.sigmoid(model(counts, categories))

    run = Run(args, hvd, args.epochs * per_epoch)
    reports = ReportLog(run.reports)
    for _ in range(args.epochs):
        for counts, categories, labels in batches:
            run.step(step(counts, categories, labels))
            if run.first:
                reports(lambda: optimizer.report)
        run.record(test_auc=evaluate(predict, held_out))
    reports.close()
    run.finish(model.get_weights())


if __name__ == "__main__":
    main()
