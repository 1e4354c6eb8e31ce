"""What the paper's experiments share: arguments, data for a first try, the log, progress, curves, a check at the end.

It works with Horovod for any framework: `hvd` is the Horovod module that the script has imported.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from adacons_hvd import AdaCons


def make_parser(description: str | None, out: str, scale: str = "unit") -> argparse.ArgumentParser:
    """The arguments that all experiments have; `scale` is the default that suits the script's optimizer."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--aggregator", choices=("mean", "adacons"), default="adacons")
    parser.add_argument("--momentum", type=float, default=0.99, help="of AdaCons (Eq. 11); 0 leaves it out")
    parser.add_argument("--no-normalize", action="store_true", help="leave out Eq. 13 of AdaCons")
    parser.add_argument("--scale", choices=("unit", "average"), default=scale, help="length of AdaCons' result")
    parser.add_argument("--batch-size", type=int, default=32, help="of each worker")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out") / out, help="folder of logs and curves")
    parser.add_argument("--log-every", type=int, default=10, help="steps from one line of the log to the next")
    parser.add_argument("--full", action="store_true", help="the paper's size; other flags still count")
    return parser


def add_data_argument(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("--data", type=Path, help=f"{help}; small data is made where this is left out")


def parse(parser: argparse.ArgumentParser, **full: Any) -> argparse.Namespace:
    """Read the command line; `full` is what --full changes about the defaults."""
    if parser.parse_known_args()[0].full:
        parser.set_defaults(**full)
    args = parser.parse_args()
    if args.full and "data" in args and args.data is None:
        parser.error("--full needs --data: what is made without it is too small for such a model")
    return args


def make_aggregator(args: argparse.Namespace, mean: Any = None) -> Any:
    """What the command line asks for. PyTorch's mean is None, Horovod's own way; Keras 3 needs `Mean()`."""
    if args.aggregator == "mean":
        return mean
    return AdaCons(momentum=args.momentum, normalize=not args.no_normalize, scale=args.scale)


def label(args: argparse.Namespace, variant: str = "") -> str:
    """The name of a run among those of its experiment: what sets it apart."""
    parts = [args.aggregator]
    if args.aggregator == "adacons":
        parts += [args.scale]
        parts += [f"momentum{args.momentum:g}"] * (args.momentum != 0.99)
        parts += ["unnormalized"] * args.no_normalize
    return "-".join([*parts, *filter(None, [variant])])


# --- data -----------------------------------------------------------------------------------------


def find_data(args: argparse.Namespace, hvd: Any, make: Callable[[Path], None]) -> Path:
    """The folder or file that --data names; without it, a folder that `make` fills, once on each host."""
    if args.data is not None:
        if not args.data.exists():
            raise SystemExit(f"--data: there is no {args.data}")
        return Path(args.data)
    folder: Path = args.out / "data"
    if hvd.local_rank() == 0 and not folder.exists():
        args.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=args.out) as unfinished:
            make(Path(unfinished, "data"))
            # Another host that shares this folder may have been faster.
            with suppress(OSError):
                Path(unfinished, "data").rename(folder)
    hvd.allgather_object("data")  # The others wait here.
    return folder


def batches(count: int, batch_size: int, rank: int, ranks: int, seed: int, epoch: int) -> list[list[int]]:
    """This rank's batches of an epoch over `count` samples, as lists of their numbers.

    All ranks get equally many, all of them full, since a rank with one more would wait for the
    others' gradients for ever. No sample is in two; a remainder too small to share sits out,
    another one in every epoch.
    """
    steps = count // (batch_size * ranks)
    if steps == 0:
        raise SystemExit(f"{count} samples are too few for one batch of {batch_size} on each of {ranks} ranks")
    order = np.random.default_rng((seed, epoch)).permutation(count)
    shared = order[: steps * ranks * batch_size].reshape(steps, ranks, batch_size)
    mine: list[list[int]] = shared[:, rank].tolist()
    return mine


def total(hvd: Any, *values: float) -> list[float]:
    """The sums of these numbers over all ranks."""
    return [math.fsum(column) for column in zip(*hvd.allgather_object([float(v) for v in values]), strict=True)]


def warmup_then_cosine(step: int, steps: int, warmup: int) -> float:
    """The part of the learning rate to use: rising linearly for `warmup` steps, then falling to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))) / 2


# --- PyTorch --------------------------------------------------------------------------------------


def pick_device(hvd: Any) -> Any:
    """This process's own GPU, or the processor."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(hvd.local_rank())
    return torch.device("cuda", hvd.local_rank())


def loader(dataset: Any, order: list[list[int]], workers: int, collate: Callable[[Any], Any] | None = None) -> Any:
    """The batches of a PyTorch dataset that `order` tells, read by so many processes, or by this one if by none."""
    import torch

    return torch.utils.data.DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        # Horovod has threads, which a forked process would not survive.
        multiprocessing_context="forkserver" if workers else None,
    )


def average_buffers(hvd: Any, model: Any) -> None:
    """Give all ranks one model to test: each has normalized its own batches, and remembers its own statistics."""
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            hvd.allreduce_(buffer, name=name)


def arrays_of(model: Any) -> Iterator[np.ndarray]:
    """A PyTorch model's parameters, for `Run.finish`."""
    for parameter in model.parameters():
        yield parameter.detach().cpu().numpy()


def decayed_apart(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Groups of parameters: weight decay for matrices and kernels only, not for biases and normalizations."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    """Set it for all groups of a PyTorch optimizer."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


# --- the record of a run --------------------------------------------------------------------------


class Run:
    """Metrics to a JSONL file, progress to the terminal and, at the end, curves to a picture. The first rank writes.

    Args:
        args: the command line.
        hvd: the Horovod module in use.
        steps: how many there will be.
        variant: what else sets this run apart from the experiment's others.
    """

    def __init__(self, args: argparse.Namespace, hvd: Any, steps: int, variant: str = "") -> None:
        self.hvd = hvd
        self.steps = steps
        self.every = args.log_every
        self.folder: Path = args.out
        self.name = label(args, variant)
        self.first = hvd.rank() == 0
        self.metrics = self.folder / f"{self.name}.jsonl"
        #: For adacons_hvd.logging; `adacons plot` draws it.
        self.reports = self.folder / "reports" / f"{self.name}.jsonl"
        self.taken = 0
        self.losses: list[Any] = []
        self.started = time.perf_counter()
        if self.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.metrics.unlink(missing_ok=True)
            self.reports.unlink(missing_ok=True)
            print(f"{self.name}: {steps} steps on {hvd.size()} ranks", flush=True)

    def step(self, loss: Any) -> None:
        """Take note of a step. Losses are only read, and averaged over the ranks, once in `every` steps."""
        self.taken += 1
        self.losses.append(loss)
        if self.taken % self.every == 0 or self.taken == self.steps:
            mean = math.fsum(float(loss) for loss in self.losses) / len(self.losses)
            self.losses.clear()
            (mean,) = total(self.hvd, mean)
            self.record(loss=mean / self.hvd.size())

    def record(self, **values: float) -> None:
        """Write and show measurements that are the same on every rank."""
        if not self.first:
            return
        seconds = time.perf_counter() - self.started
        # JSON has no word for NaN and infinity but null.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self.metrics.open("a", encoding="utf-8") as file:
            print(json.dumps({"step": self.taken, "seconds": round(seconds, 3), **finite}), file=file)
        left = seconds / max(self.taken, 1) * (self.steps - self.taken)
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        print(f"step {self.taken}/{self.steps}  {numbers}  {seconds:.0f} s, {left:.0f} s to go", flush=True)

    def finish(self, arrays: Iterable[np.ndarray]) -> None:
        """Check that all ranks have ended with the same parameters, bit by bit, and draw the curves."""
        digest = hashlib.sha256()
        for array in arrays:
            digest.update(np.ascontiguousarray(array).tobytes())
        digests = self.hvd.allgather_object(digest.hexdigest())
        if len(set(digests)) > 1:
            raise SystemExit("the ranks have ended with different parameters")
        if self.first:
            picture = draw(self.folder)
            print(f"all {len(digests)} ranks have the same parameters: {digests[0][:16]}")
            print(f"metrics: {self.metrics}; curves: {picture}", flush=True)


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Each metric of a run as (step, value) pairs."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for name in record.keys() - {"step", "seconds"}:
            curves.setdefault(name, []).append((record["step"], math.nan if record[name] is None else record[name]))
    return curves


def draw(folder: Path) -> Path:
    """Draw the metrics of all runs of an experiment so far, each metric in a picture of its own."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = {path.stem: read_metrics(path) for path in sorted(folder.glob("*.jsonl"))}
    names = sorted({name for curves in runs.values() for name in curves}, key=lambda name: (name != "loss", name))
    figure, axes = plt.subplots(1, len(names), figsize=(6 * len(names), 4), layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for run, curves in runs.items():
            if name in curves:
                steps, values = zip(*curves[name], strict=True)
                axis.plot(steps, values, marker="." if len(steps) < 10 else "", label=run)
                # The regression's loss falls by many powers of ten.
                if min(values) > 0 and max(values) > 100 * min(values):
                    axis.set_yscale("log")
        axis.set(xlabel="step", ylabel=name)
        axis.grid(alpha=0.3)
        axis.legend()
    picture = folder / "curves.png"
    figure.savefig(picture, dpi=120)
    plt.close(figure)
    return picture
