"""Measures what approximate schedules lose: the weights' error against bytes sent, on real gradients.

``python -m benchmarks.errors`` trains two of the examples' networks, made smaller, on Fashion-MNIST
with 32 simulated workers, looks at their gradients early and late, and draws ``docs/errors.png``.
The statistics are computed from sketches and rounded means by the very operations that the
schedules use.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from adacons_hvd import AdaCons, Statistics
from adacons_hvd.ops import torch as ops
from adacons_hvd.schedules import Sketch

WORKERS = 32
DATA = Path("/usr/share/datasets/fashion-mnist")
FRACTIONS = (4, 16, 64, 256)
STEPS = {"early": 20, "late": 1500}


def networks() -> dict[str, Callable[[], nn.Module]]:
    # The examples are scripts: they import one another from their own folder.
    sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
    from image_classification import ResNet
    from vision_transformer import VisionTransformer

    return {
        "ResNet": lambda: ResNet((1, 1, 1, 1), classes=10, colours=1, width=16),
        "ViT": lambda: VisionTransformer(10, colours=1, image_size=28, patch=7, width=128, depth=4, heads=4),
    }


def data() -> tuple[torch.Tensor, torch.Tensor]:
    def read(name: str, header: int) -> torch.Tensor:
        with gzip.open(DATA / f"{name}.gz") as file:
            return torch.frombuffer(bytearray(file.read()[header:]), dtype=torch.uint8)

    images = read("train-images-idx3-ubyte", 16).view(-1, 1, 28, 28).float() / 255 - 0.5
    return images, read("train-labels-idx1-ubyte", 8).long()


def gradients(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, batch: int, seed: int) -> torch.Tensor:
    """One gradient per worker, each from a batch of its own."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(WORKERS):
        chosen = torch.randint(len(images), (batch,), generator=generator)
        loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    return torch.stack(rows)


def errors(rows: torch.Tensor) -> Iterator[tuple[str, float, float]]:
    """Yield each schedule, what it sends first as a fraction of the gradient, and the weights' relative error."""
    exact = Statistics.of(rows.double())
    aggregator = AdaCons(momentum=0.0)
    right = aggregator.decide(exact, {}).weights

    def off(dots: torch.Tensor) -> float:
        found = aggregator.decide(Statistics(dots / WORKERS, exact.squares, exact.present), {}).weights
        return float((found - right).norm() / right.norm())

    factor = 1024 / (exact.squares.mean().sqrt() * WORKERS)
    total = torch.zeros_like(rows[0]).half()
    for row in rows:
        total += ops.narrow_segments(row, [(0, len(row), factor)], torch.zeros_like(total))
    yield "half", 0.5, off(torch.stack([ops.moments(row, total)[0] for row in rows]) / factor)
    length = rows.shape[1]
    for fraction in FRACTIONS:
        m = -(-length // fraction)
        signs = ops.signs(m + fraction * Sketch.STRIDE, None, rows)
        found = []
        for step in range(5):
            at = torch.tensor(float(step), dtype=torch.float64)
            sketches = [
                ops.sketch_segments(row, [(0, length, 0)], [m], signs, Sketch.STRIDE, at, torch.zeros(m))
                for row in rows
            ]
            pairs = [ops.moments(sketch, torch.stack(sketches).sum(0)) for sketch in sketches]
            dots = torch.stack([pair[0] - pair[1] for pair in pairs]) + exact.squares
            found.append(off(dots))
        yield f"sketch 1/{fraction}", 1 / fraction, sum(found) / len(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--picture", type=Path, default=Path("docs/errors.png"))
    parser.add_argument("--figures", type=Path, default=Path("out/bench/errors.json"))
    args = parser.parse_args()
    images, labels = data()
    found = []
    for name, build in networks().items():
        torch.manual_seed(0)
        model = build()
        print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for step in range(max(STEPS.values()) + 1):
            for when in (when for when, at in STEPS.items() if at == step):
                for batch in (8, 64):
                    rows = gradients(model, images, labels, batch, step)
                    weights = AdaCons(momentum=0.0).decide(Statistics.of(rows), {}).weights
                    spread = float(weights.std() / weights.mean())
                    print(f"{name}, {when}, local batch {batch}: spread of the weights {spread:.2f}")
                    for what, sent, error in errors(rows):
                        print(f"  {what:14} {100 * error:.2g}%")
                        found.append(
                            {
                                "model": name,
                                "when": when,
                                "batch": batch,
                                "what": what,
                                "sent": sent,
                                "error": error,
                                "spread": spread,
                            }
                        )
            chosen = torch.randint(len(images), (64,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
    args.figures.parent.mkdir(parents=True, exist_ok=True)
    args.figures.write_text(json.dumps(found, indent=1), encoding="utf-8")
    draw(found, args.picture)


def draw(found: Sequence[Mapping[str, object]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    lines: dict[tuple[object, ...], list[tuple[float, float]]] = {}
    for point in found:
        key = (point["model"], point["when"], point["batch"])
        lines.setdefault(key, []).append((float(str(point["sent"])), float(str(point["error"]))))
    for number, ((model, when, batch), points) in enumerate(lines.items()):
        color, style = f"C{number // 2}", "-" if batch == 64 else "--"
        label = f"{model}, {when}, local batch {batch}"
        sketches = sorted(points[1:])
        axes.plot(*zip(*sketches, strict=True), style, color=color, marker="o", label=label)
        axes.plot(*points[0], color=color, marker="s", fillstyle="full" if batch == 64 else "none")
    axes.set(
        xscale="log", yscale="log", xlabel="sent in the first pass, of the gradient", ylabel="error of the weights"
    )
    axes.set_title(f"sketches (lines) and half precision (squares), {WORKERS} workers", fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
