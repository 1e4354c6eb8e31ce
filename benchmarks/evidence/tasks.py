"""Three tasks that train in seconds: what is learned, from what data, and how well it went."""

from __future__ import annotations

import functools
import gzip
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional

IMAGES = Path("/usr/share/datasets/fashion-mnist")
LICENCES = Path("/usr/share/common-licenses")

Parameters = dict[str, torch.Tensor]
Examples = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Task:
    """A model as a function of named parameters, and its data."""

    #: Shapes of the parameters. Matrices start with entries of variance one over their columns, vectors with zeros.
    shapes: dict[str, tuple[int, ...]]
    #: What the model says for a batch.
    model: Callable[[Parameters, torch.Tensor], torch.Tensor]
    #: The mean loss of outputs and targets.
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    train: Examples
    #: Where learning rates are chosen.
    validation: Examples
    #: Where results are measured.
    test: Examples
    #: The matrices between the first layer's input and the last layer, for optimizers that treat them on their own.
    hidden: tuple[str, ...]
    #: The figure reported, of outputs and targets, and its name; ``best`` is ``max`` or ``min``.
    score: Callable[[torch.Tensor, torch.Tensor], float]
    metric: str
    best: Callable[..., float]

    def start(self, generator: torch.Generator) -> torch.Tensor:
        """All parameters in one vector."""
        pieces = [
            torch.randn(shape, generator=generator).flatten() / math.sqrt(shape[-1])
            if len(shape) > 1
            else torch.zeros(shape)
            for shape in self.shapes.values()
        ]
        return torch.cat(pieces)

    def named(self, vector: torch.Tensor) -> Parameters:
        """Views of that vector."""
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        pieces = vector.split(sizes)
        return {name: piece.view(shape) for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)}


#: How wide a model is in order to have about so many parameters.
IMAGE_WIDTHS = {"": 64, "100k": 230, "1M": 900, "10M": 3050}
LANGUAGE_WIDTHS = {"": 32, "100k": 84, "1M": 280, "10M": 904}


@functools.cache
def task(name: str) -> Task:
    """A task by its name, which may end in the number of parameters: ``"images"``, ``"images 1M"``."""
    what, _, size = name.partition(" ")
    if what == "images":
        return _images(IMAGE_WIDTHS[size])
    return _language(LANGUAGE_WIDTHS[size]) if what == "language" else _recommender()


def _accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    return 100 * float((outputs.argmax(1) == targets).float().mean())


@functools.cache
def _fashion(name: str) -> Examples:
    """Fashion-MNIST at half its resolution."""

    def read(file: str, header: int) -> torch.Tensor:
        data = gzip.decompress((IMAGES / f"{name}-{file}.gz").read_bytes())
        return torch.frombuffer(bytearray(data[header:]), dtype=torch.uint8)

    pixels = (read("images-idx3-ubyte", 16).view(-1, 1, 28, 28).float() / 255 - 0.286) / 0.353
    return functional.avg_pool2d(pixels, 2).flatten(1), read("labels-idx1-ubyte", 8).long()


def _images(width: int) -> Task:
    """Fashion-MNIST, and a network of two hidden layers: 17,418 parameters at a width of 64."""

    def model(p: Parameters, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(functional.linear(x, p["w1"], p["b1"]))
        x = functional.relu(functional.linear(x, p["w2"], p["b2"]))
        return functional.linear(x, p["w3"], p["b3"])

    x, y = _fashion("train")
    shapes = {"w1": (width, 196), "b1": (width,), "w2": (width, width), "b2": (width,), "w3": (10, width), "b3": (10,)}
    return Task(
        shapes,
        model,
        functional.cross_entropy,
        train=(x[:50_000], y[:50_000]),
        validation=(x[50_000:], y[50_000:]),
        test=_fashion("t10k"),
        hidden=("w1", "w2"),
        score=_accuracy,
        metric="test accuracy, %",
        best=max,
    )


def _language(width: int) -> Task:
    """The next character of the licences that every Debian system holds; a transformer of one layer."""
    length = 32
    # The names that are links lead to texts that are read under their own names.
    files = sorted(path for path in LICENCES.iterdir() if not path.is_symlink())
    texts = [path.read_text(encoding="utf-8") for path in files]
    letters = {letter: number for number, letter in enumerate(sorted(set("".join(texts))))}

    def windows(parts: list[str], stride: int) -> Examples:
        codes = torch.tensor([letters[letter] for letter in "".join(parts)])
        found = codes.unfold(0, length + 1, stride)
        return found[:, :-1], found[:, 1:]

    def cut(first: float, last: float) -> list[str]:
        return [text[int(first * len(text)) : int(last * len(text))] for text in texts]

    def model(p: Parameters, x: torch.Tensor) -> torch.Tensor:
        x = p["letters"][x] + p["places"]
        q, k, v = functional.linear(functional.layer_norm(x, (width,)), p["qkv"]).unflatten(-1, (6, -1)).chunk(3, -2)
        scores = torch.einsum("...qhd,...khd->...hqk", q, k) / math.sqrt(q.shape[-1])
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        mixed = torch.einsum("...hqk,...khd->...qhd", scores.masked_fill(later, -torch.inf).softmax(-1), v)
        x = x + functional.linear(mixed.flatten(-2), p["mix"])
        hidden = functional.relu(functional.linear(functional.layer_norm(x, (width,)), p["up"]))
        x = x + functional.linear(hidden, p["down"])
        return functional.linear(functional.layer_norm(x, (width,)), p["head"])

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())

    return Task(
        {
            "letters": (len(letters), width),
            "places": (length, width),
            "qkv": (3 * width, width),
            "mix": (width, width),
            "up": (4 * width, width),
            "down": (width, 4 * width),
            "head": (len(letters), width),
        },
        model,
        loss,
        train=windows(cut(0, 0.8), 1),
        validation=windows(cut(0.8, 0.9), length),
        test=windows(cut(0.9, 1), length),
        hidden=("qkv", "mix", "up", "down"),
        score=lambda outputs, targets: float(loss(outputs, targets)),
        metric="test loss, nats per character",
        best=min,
    )


def _area(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    """The area under the ROC curve: how often a click is ranked above what was not clicked."""
    ranks = outputs.argsort().argsort().double()[targets > 0] + 1
    clicks, others = len(ranks), len(targets) - len(ranks)
    return 100 * float((ranks.sum() - clicks * (clicks + 1) / 2) / (clicks * others))


def _recommender() -> Task:
    """Clicks as Criteo's data has them: dense and categorical columns, few of whose values are common.

    The labels are drawn from a factorisation machine; the model has embeddings and a hidden layer.
    """
    rows, columns, values, dense, width = 130_000, 8, 200, 4, 8
    generator = torch.Generator().manual_seed(0)
    frequency = 1 / torch.arange(1, values + 1)
    chosen = torch.multinomial(frequency.expand(columns, -1), rows, replacement=True, generator=generator).T
    numbers = torch.randn(rows, dense, generator=generator)
    bias = torch.randn(columns, values, generator=generator)
    factors = torch.randn(columns, values, 4, generator=generator) / 2
    every = torch.arange(columns)
    looked_up = factors[every, chosen]
    pairs = (looked_up.sum(1).square() - looked_up.square().sum(1)).sum(1) / 2
    logits = bias[every, chosen].sum(1) / 2 + pairs / 2 + numbers @ torch.randn(dense, generator=generator) / 2 - 1
    clicks = (torch.rand(rows, generator=generator) < logits.sigmoid()).float()
    # Categories as numbers of rows in one table, beside the dense columns; all exact in float32.
    x = torch.cat([numbers, (chosen + every * values).float()], 1)

    def model(p: Parameters, x: torch.Tensor) -> torch.Tensor:
        found = functional.embedding(x[..., dense:].long(), p["table"]).flatten(-2)
        hidden = functional.relu(functional.linear(torch.cat([x[..., :dense], found], -1), p["w1"], p["b1"]))
        return functional.linear(hidden, p["w2"], p["b2"])[..., 0]

    first, second = rows - 30_000, rows - 20_000
    return Task(
        {
            "table": (columns * values, width),
            "w1": (32, dense + columns * width),
            "b1": (32,),
            "w2": (1, 32),
            "b2": (1,),
        },
        model,
        functional.binary_cross_entropy_with_logits,
        train=(x[:first], clicks[:first]),
        validation=(x[first:second], clicks[first:second]),
        test=(x[second:], clicks[second:]),
        hidden=("w1",),
        score=_area,
        metric="test AUC, %",
        best=max,
    )
