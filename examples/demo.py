"""Watch four Horovod processes train with an average, AdaCons and Curvature side by side. `make demo` runs this.

Three copies of one network start from the same weights and see the same batches. One averages its
gradients, one aggregates them with AdaCons, one with Curvature. Each has the learning rate that is
best for it; everything else is equal. The processes are started by `horovodrun --gloo`, so nothing
is needed that Horovod does not bring: no MPI, no ssh, no network. At the end there is a table, and
a picture of the three curves.

With --bad-worker the last worker's labels are random, as from a broken input pipeline. Its
gradients grow as the network learns, and so does their share of an average.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DATA = Path("/usr/share/datasets/fashion-mnist")
# Methods, and the rate at which each ends with the best accuracy on validation data, out of powers of two:
# `python -m benchmarks.evidence --only demo` finds them with simulated workers and other seeds.
RATES = {"average": 2**-3, "AdaCons": 2**-1, "Curvature": 2**-2}
# Tells a process that it is a worker, and where the first one writes its progress.
LOG = "ADACONS_DEMO_LOG"


def main() -> None:
    arguments = parse()
    if LOG in os.environ:
        work(arguments, Path(os.environ[LOG]))
    else:
        watch(arguments)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=128, help="of each worker")
    parser.add_argument("--bad-worker", action="store_true", help="give one worker random labels")
    parser.add_argument("--data", type=Path, default=DATA, help="Fashion-MNIST's four files")
    parser.add_argument("--picture", type=Path, default=Path("out/demo.png"))
    return parser.parse_args()


# --- what each worker does ----------------------------------------------------------------------


def work(arguments: argparse.Namespace, log_path: Path) -> None:
    import torch
    from torch.nn.functional import avg_pool2d, cross_entropy

    import adacons_hvd.torch as hvd
    from adacons_hvd import AdaCons, Curvature

    hvd.init()
    torch.set_num_threads(1)

    def load(images: str, labels: str) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = bytearray(gzip.decompress((arguments.data / images).read_bytes())[16:])
        classes = bytearray(gzip.decompress((arguments.data / labels).read_bytes())[8:])
        x = torch.frombuffer(pixels, dtype=torch.uint8).view(-1, 1, 28, 28).float() / 255
        return avg_pool2d((x - 0.286) / 0.353, 2).flatten(1), torch.frombuffer(classes, dtype=torch.uint8).long()

    x, y = load("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")
    x, y = x[hvd.rank() :: hvd.size()], y[hvd.rank() :: hvd.size()]
    test_x, test_y = load("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")
    if arguments.bad_worker and hvd.rank() == hvd.size() - 1:
        y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]

    def network() -> torch.nn.Module:
        torch.manual_seed(0)
        layers = [torch.nn.Linear(196, 64), torch.nn.Linear(64, 64), torch.nn.Linear(64, 10)]
        for layer in layers:
            torch.nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            torch.nn.init.zeros_(layer.bias)
        return torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])

    # None leaves averaging to Horovod.
    aggregators = {"average": None, "AdaCons": AdaCons(), "Curvature": Curvature()}
    models = {method: network() for method in RATES}
    optimizers = {}
    for method, model in models.items():
        named = [(f"{method}.{name}", p) for name, p in model.named_parameters()]
        sgd = torch.optim.SGD(model.parameters(), lr=RATES[method], momentum=0.9)
        optimizers[method] = hvd.DistributedOptimizer(sgd, named, aggregator=aggregators[method])

    seconds = dict.fromkeys(RATES, 0.0)
    draw = torch.Generator().manual_seed(hvd.rank())
    first = hvd.rank() == 0
    with (log_path if first else Path(os.devnull)).open("w", encoding="utf-8") as log:
        for step in range(arguments.steps):
            batch = torch.randint(len(x), (arguments.batch_size,), generator=draw)
            test_now = step % 10 == 9 or step == arguments.steps - 1
            line: dict[str, Any] = {"step": step + 1}
            for method, rate in RATES.items():
                start = time.perf_counter()
                optimizers[method].param_groups[0]["lr"] = rate * (1 - step / arguments.steps)
                optimizers[method].zero_grad()
                loss = cross_entropy(models[method](x[batch]), y[batch])
                loss.backward()
                optimizers[method].step()
                seconds[method] += time.perf_counter() - start
                if test_now and first:
                    with torch.no_grad():
                        output = models[method](test_x)
                    line[method] = {
                        "loss": cross_entropy(output, test_y).item(),
                        "accuracy": (output.argmax(1) == test_y).float().mean().item(),
                        "milliseconds": 1e3 * seconds[method] / (step + 1),
                    }
            if test_now and first:
                # The share of each worker in the step: its weight times the length of its gradient.
                reports = {method: optimizers[method].report for method in ("AdaCons", "Curvature")}
                norms = reports["AdaCons"].norms[0]
                line["shares"] = {"average": norms}
                for method, report in reports.items():
                    line["shares"][method] = [w * n for w, n in zip(report.weights[0], report.norms[0], strict=True)]
                line["schedule"] = reports["AdaCons"].schedule
            print(json.dumps(line), file=log, flush=True)


# --- what the terminal shows --------------------------------------------------------------------


def watch(arguments: argparse.Namespace) -> None:
    for name in ("train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz"):
        if not (arguments.data / name).exists():
            sys.exit(
                f"{arguments.data / name} is missing: install Debian's package "
                "dataset-fashion-mnist, or point --data at a folder with Fashion-MNIST's files."
            )
    launcher = shutil.which("horovodrun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if launcher is None:
        sys.exit("horovodrun is not installed in this environment; `make setup` installs Horovod.")
    with tempfile.TemporaryDirectory() as folder:
        log, output = Path(folder, "log"), Path(folder, "output")
        command = [launcher, "--gloo", "-np", str(arguments.workers), sys.executable, __file__]
        command += sys.argv[1:]
        quiet = {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
        environment = {**quiet, **os.environ, LOG: str(log)}
        with output.open("wb") as sink:
            # Its own session, so that all of it can be ended together.
            job = subprocess.Popen(command, stdout=sink, stderr=sink, env=environment, start_new_session=True)
            try:
                lines = display(arguments, follow(log, job))
            finally:
                if job.poll() is None:
                    os.killpg(job.pid, signal.SIGTERM)
                job.wait()
        if job.returncode != 0 or len(lines) < arguments.steps:
            sys.exit(f"the job failed:\n{output.read_text(errors='replace')[-3000:]}")
    summarize(arguments, lines)


def follow(log: Path, job: subprocess.Popen[bytes]) -> Iterator[dict[str, Any]]:
    """The lines the first worker writes, as they come."""
    while not log.exists() and job.poll() is None:
        time.sleep(0.1)
    if not log.exists():
        return
    with log.open(encoding="utf-8") as file:
        text = ""
        while True:
            text += file.readline()
            if text.endswith("\n"):
                yield json.loads(text)
                text = ""
            elif job.poll() is not None:
                return
            else:
                time.sleep(0.05)


def display(arguments: argparse.Namespace, lines: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[right]}"),
    )
    seen = []
    with Progress(*columns) as progress:
        starting = f"starting {arguments.workers} Horovod processes"
        task = progress.add_task(starting, total=arguments.steps, right="")
        for line in lines:
            seen.append(line)
            progress.update(task, advance=1, description="training")
            if "average" in line:
                right = "  ".join(f"{m} {line[m]['accuracy']:.1%}" for m in RATES)
                progress.update(task, right=f"right: {right}")
    return seen


def summarize(arguments: argparse.Namespace, lines: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    tests = [line for line in lines if "average" in line]
    last = tests[-1]
    table = Table(title=f"after {arguments.steps} steps on {arguments.workers} workers")
    for heading in ("aggregation", "learning rate", "test loss", "test accuracy", "errors", "time per step"):
        table.add_column(heading, justify="left" if heading == "aggregation" else "right")
    fewest = 1 - last["average"]["accuracy"]
    for method, rate in RATES.items():
        now: dict[str, float] = last[method]
        table.add_row(
            method,
            f"{rate:g}",
            f"{now['loss']:.4f}",
            f"{now['accuracy']:.2%}",
            "" if method == "average" else f"{(1 - now['accuracy']) / fewest - 1:+.1%}",
            f"{now['milliseconds']:.1f} ms",
        )
    console.print(table)
    table = Table(title="how much each worker's gradient contributed to the last step")
    table.add_column("aggregation")
    for worker in range(arguments.workers):
        table.add_column(f"worker {worker}", justify="right")
    for method, shares in last["shares"].items():
        table.add_row(method, *(f"{share / sum(shares):.1%}" for share in shares))
    console.print(table)
    console.print(f"AdaCons moved its gradients by the schedule {last['schedule']}.")
    draw(arguments, tests)
    console.print(f"The curves: {arguments.picture}")


def draw(arguments: argparse.Namespace, tests: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for (method, rate), style in zip(RATES.items(), ("--", "-.", "-"), strict=True):
        right = [100 * line[method]["accuracy"] for line in tests]
        label = f"{method}, rate {rate:g}: {right[-1]:.1f}%"
        axes.plot([line["step"] for line in tests], right, style, label=label)
    axes.set(
        xlabel="step",
        ylabel="test accuracy, %",
        ylim=(min(70, right[-1] - 5), None),
        title=f"Fashion-MNIST, {arguments.workers} workers, each method at its own best rate"
        + (", one worker with random labels" if arguments.bad_worker else ""),
    )
    axes.legend()
    axes.grid(alpha=0.3)
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.picture, dpi=120)


if __name__ == "__main__":
    main()
