"""Would AdaCons differ from averaging on your model and data? Simulates N workers in one process.

The entry point, `module:function`, is a function of yours without arguments. For PyTorch it returns

    model, loss, data                   or    model, loss, data, optimizer

where loss(model, batch) gives the mean loss of a batch; for Keras it returns

    model, data

with a compiled model and batches that are (x, y). `data` is a tuple or dict of tensors or arrays with one row a
sample, a data set with a length, an iterable of batches, or a function of (worker, size) that returns a batch: the
one kind that lets workers have different data.
"""

from __future__ import annotations

import argparse
import importlib
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from ..aggregators import AdaCons, Memory, Statistics
from ..ops import ops_for
from .display import console, progress, show_json, show_table
from .errors import CommandError
from .models import Model, model_of
from .sampling import sampler_of

__all__ = ["add_arguments", "run"]

#: Degrees between AdaCons and the average, below which they are the same, or nearly.
_SAME, _NEAR = 1.0, 5.0
#: How many samples, times those of the largest global batch, the gradient has that both are held against.
_REFERENCE = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    parser.add_argument("entry", metavar="module:function", help="what returns your model and data")
    parser.add_argument("--workers", type=_numbers, default=[8, 32], metavar="LIST", help="how many (8,32)")
    parser.add_argument("--batch-sizes", type=_numbers, default=[16, 64], metavar="LIST", help="of each worker (16,64)")
    parser.add_argument("--steps", type=_numbers, default=[0, 20, 100], metavar="LIST", help="when to look (0,20,100)")
    parser.add_argument("--repeats", type=int, default=5, help="how often to draw batches at each of them (5)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (0)")


def run(options: argparse.Namespace) -> int:
    screen = console(options.json)
    if options.repeats < 1 or min(options.workers) < 2 or min(options.batch_sizes) < 1:
        raise CommandError("probing takes at least 2 workers, and batches and repeats of at least 1")
    model, data = _load(options.entry)
    draw = sampler_of(data, model, options.seed)
    _check_memory(max(options.workers) + 1, model.parameters)
    rows = _probe(model, draw, options)
    result: dict[str, Any] = {"parameters": model.parameters, "optimizer": model.optimizer, "rows": rows}
    result["verdict"] = _verdict(rows)
    if screen is None:
        show_json(result)
    else:
        _show(screen, result)
    return 0


# --- what is probed -------------------------------------------------------------------------------


def _load(entry: str) -> tuple[Model, Any]:
    module_name, _, function_name = entry.partition(":")
    if not module_name or not function_name:
        raise CommandError(f"the entry point must look like module:function, not {entry!r}")
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name.split(".")[0] and error.name != module_name:
            raise CommandError(f"{module_name} imports {error.name}, which is not installed") from error
        raise CommandError(f"there is no module {module_name} here or among the installed ones") from error
    except Exception as error:
        raise CommandError(f"importing {module_name} failed: {_in_one_line(error)}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise CommandError(f"{module_name} has no function {function_name}")
    try:
        made = function()
    except Exception as error:
        raise CommandError(f"{entry} failed: {_in_one_line(error)}") from error
    return model_of(made, entry)


def _in_one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _check_memory(rows: int, parameters: int) -> None:
    needed = 4 * rows * parameters
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return
    free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    if needed > 0.8 * free:
        raise CommandError(
            f"{rows - 1} gradients of {parameters:,} parameters take {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB "
            "are free; give fewer --workers"
        )


# --- probing --------------------------------------------------------------------------------------


def _probe(model: Model, draw: Callable[[int, int], Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    points = sorted(set(options.steps))
    sizes, workers = sorted(set(options.batch_sizes)), sorted(set(options.workers))
    most = workers[-1]
    passes = most * len(sizes) * options.repeats + _REFERENCE * most
    rows: list[dict[str, Any]] = []
    with progress(passes * len(points) + workers[0] * points[-1]) as advance:

        def gradient(worker: int, size: int) -> Any:
            advance(f"step {taken}", 1)
            try:
                return model.gradient(draw(worker, size))
            except CommandError:
                raise
            except Exception as error:
                raise CommandError(f"a gradient of your model failed: {_in_one_line(error)}") from error

        taken = 0
        for point in points:
            for _ in range(point - taken):
                model.apply(_mean(gradient(worker, sizes[0]) for worker in range(workers[0])))
                taken += 1
            reference = _mean(gradient(worker, sizes[-1]) for worker in [*range(most)] * _REFERENCE)
            for size in sizes:
                tables = []
                for _ in range(options.repeats):
                    matrix = model.stack([*(gradient(worker, size) for worker in range(most)), reference])
                    tables.append(ops_for(matrix).gramian(matrix))
                rows += [
                    {"step": point, "workers": n, "batch_size": size, **_compare(tables, n, size)} for n in workers
                ]
    return rows


def _mean(gradients: Iterator[Any]) -> Any:
    total, count = next(gradients), 1
    for gradient in gradients:
        total, count = total + gradient, count + 1
    return total / count


def _compare(tables: list[Any], workers: int, size: int) -> dict[str, float | None]:
    """AdaCons beside the average of the first of the workers, over several draws at one point.

    A table holds the inner products of all workers' gradients and, in its last row and column, of
    those with the reference. All there is to know about sums of gradients follows from it.
    """
    aggregator, memory = AdaCons(), Memory()
    found: list[dict[str, float]] = []
    for table in tables:
        ops = ops_for(table)
        statistics = Statistics.read(table[:workers, :workers], ops.zeros((workers,), table) == 0, True)
        decision = aggregator.decide(statistics, memory)
        memory = decision.memory
        found.append(_figures(ops.to_list(table), ops.to_list(decision.weights)))
    if not all(figures["square"] > 0 for figures in found):
        raise CommandError("all gradients are zero, or some are not finite: is the loss connected to the model?")
    average = {name: fmean(figures[name] for figures in found) for name in found[0]}
    # A ratio of averages, because a single estimate of the signal may be negative.
    noise, signal = average.pop("noise"), average.pop("signal")
    del average["square"]
    return {**average, "noise_scale": size * noise / signal if signal > 0 else None}


def _figures(table: list[list[float]], gamma: list[float]) -> dict[str, float]:
    """From the inner products of gradients, and the weights of the first of them."""
    n, own = len(gamma), table[-1][-1]
    with_mean = [sum(row[:n]) / n for row in table]
    with_psi = [sum(g * x for g, x in zip(gamma, row[:n], strict=True)) for row in table]
    mean_square = sum(with_mean[:n]) / n
    psi_square = sum(g * x for g, x in zip(gamma, with_psi[:n], strict=True))
    squares = [table[i][i] for i in range(n)]
    # The variance of one worker's gradient, and what it leaves of the square of the mean.
    noise = (sum(squares) - n * mean_square) / (n - 1)
    parts = [g * square**0.5 for g, square in zip(gamma, squares, strict=True)]
    return {
        "spread": pstdev(parts) / abs(fmean(parts)) if any(parts) else 0.0,
        "cosine": _cosine(sum(with_psi[:n]) / n, mean_square, psi_square),
        "average_to_reference": _cosine(with_mean[-1], mean_square, own),
        "adacons_to_reference": _cosine(with_psi[-1], psi_square, own),
        "noise": noise,
        "signal": mean_square - noise / n,
        "square": mean_square,
    }


def _cosine(product: float, square: float, other_square: float) -> float:
    length = (square * other_square) ** 0.5
    return product / length if length else 0.0


# --- what it means --------------------------------------------------------------------------------


def _degrees(cosine: float) -> float:
    # Near 1 a cosine has no digits left for thousandths of a degree.
    return round(math.degrees(math.acos(max(-1.0, min(1.0, cosine)))), 3)


def _verdict(rows: list[dict[str, Any]]) -> str:
    largest = max(rows, key=lambda row: _degrees(row["cosine"]))
    angle = _degrees(largest["cosine"])
    where = f"at step {largest['step']} with {largest['workers']} workers and batches of {largest['batch_size']}"
    if angle < _SAME:
        return (
            f"AdaCons would be averaging: the directions never differ by more than {angle:.2g} degrees ({where}). "
            "Smaller local batches, or workers with different data, would set them apart."
        )
    much = "a little" if angle < _NEAR else "clearly"
    closer = sum(row["adacons_to_reference"] > row["average_to_reference"] for row in rows)
    return (
        f"AdaCons would differ from averaging {much}: by up to {angle:.2g} degrees ({where}). In {closer} of "
        f"{len(rows)} settings its direction is closer than the average's to the gradient of many more samples; "
        "whether that trains better only training tells."
    )


def _show(screen: Any, result: dict[str, Any]) -> None:
    rows = [
        [
            str(row["step"]),
            str(row["workers"]),
            str(row["batch_size"]),
            f"{row['spread']:.3g}",
            f"{_degrees(row['cosine']):.2g}°",
            f"{row['average_to_reference']:.4f}",
            f"{row['adacons_to_reference']:.4f}",
            "-" if row["noise_scale"] is None else f"{row['noise_scale']:,.0f}",
        ]
        for row in result["rows"]
    ]
    headings = [
        "step",
        "workers",
        "batch",
        "spread",
        "angle to average",
        "average to reference",
        "AdaCons to reference",
    ]
    title = f"{result['parameters']:,} parameters; averaged with {result['optimizer']} between steps"
    show_table(screen, title, [*headings, "noise scale"], rows)
    screen.print(
        "spread: standard deviation over mean of what workers contribute. to reference: cosine with the gradient of "
        "many more samples. noise scale: the batch whose gradient is half noise, in samples.\n",
        style="dim",
    )
    screen.print(result["verdict"])


def _numbers(text: str) -> list[int]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 8,32")
    return [int(part) for part in text.split(",")]
