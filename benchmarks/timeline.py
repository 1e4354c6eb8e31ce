"""Shows what overlap does in Horovod's own timeline: ``python -m benchmarks.timeline``.

Two ranks train the transformer, with ``overlap=False`` and then with it. From each run's timeline one
step is drawn, ``docs/overlap.png``: when Horovod worked on which bucket, from backward's beginning
on. The exchange of flags marks where backward has ended and ``step()`` begun.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

STEPS = 6
# One step is enough; the last but one has everything warm and its successor's beginning as its end.
SHOWN = STEPS - 2

Span = tuple[str, float, float]


def work(overlap: bool) -> None:
    """One rank."""
    import horovod.torch as hvd
    import torch

    import adacons_hvd.torch as adacons
    from benchmarks.models import make

    hvd.init()
    torch.set_num_threads(1)
    model, loss = make("transformer", hvd.rank())
    optimizer = adacons.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=1e-4),
        model.named_parameters(),
        aggregator=adacons.AdaCons(),
        schedule="one-pass",
        bucket_bytes=4 << 20,
        overlap=overlap,
    )
    for _ in range(STEPS):
        optimizer.zero_grad()
        value = loss(model)
        # A collective that stands for the moment when backward begins.
        hvd.allreduce(torch.zeros(1), name="backward")
        value.backward()
        optimizer.step()


def spans(path: Path) -> dict[str, list[Span]]:
    """Read Horovod's activities for every tensor, with their start and end in seconds."""
    text = path.read_text(encoding="utf-8").rstrip().rstrip(",")
    events = json.loads(text if text.endswith("]") else text + "]")
    titles = {e["pid"]: e["args"].get("name", "") for e in events if e.get("name") == "process_name"}
    # Horovod puts the kind of collective before the name.
    names = {pid: title.partition(".")[2] for pid, title in titles.items()}
    found: dict[str, list[Span]] = {}
    begun: dict[Any, list[tuple[str, float]]] = {}
    for event in events:
        stack = begun.setdefault(event.get("pid"), [])
        if event.get("ph") == "B":
            stack.append((event["name"], event["ts"] / 1e6))
        elif event.get("ph") == "E" and stack:
            name, start = stack.pop()
            found.setdefault(names[event["pid"]], []).append((name, start, event["ts"] / 1e6))
    return found


def draw(runs: dict[str, dict[str, list[Span]]], picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, all_axes = pyplot.subplots(len(runs), sharex=True, figsize=(8, 6), layout="constrained")
    for axes, (title, found) in zip(all_axes, runs.items(), strict=True):

        def whole(name: str, number: int, found: dict[str, list[Span]] = found) -> tuple[float, float]:
            tops = [span for span in found[name] if span[0].startswith(("ALL", "NEGOTIATE"))]
            return tops[2 * number][1], tops[2 * number + 1][2]

        begin, end = whole("backward", SHOWN)[1], whole("backward", SHOWN + 1)[0]
        flags = next(name for name in found if name.endswith(".flags"))
        half = next(s for s in sorted(found[flags], key=lambda span: span[1]) if s[1] > begin)[1]
        rows = sorted(
            n for n in found if n.startswith("adacons") and n.endswith(("shards", "result", "flags", "table"))
        )
        for row, name in enumerate(rows):
            for activity, start, stop in found[name]:
                if begin <= start <= end and activity.startswith("ALL"):
                    color = {"ALLTOALL": "C0", "ALLGATHER": "C1"}.get(activity, "C2")
                    axes.barh(row, 1e3 * (stop - start), left=1e3 * (start - begin), color=color, height=0.8)
        axes.axvline(1e3 * (half - begin), color="black", linestyle=":")
        axes.set_yticks(range(len(rows)), [name.removeprefix("adacons.0.") for name in rows], fontsize=6)
        axes.set_title(
            f"{title}: {1e3 * (end - begin):.0f} ms from backward's beginning to the next step's", fontsize=10
        )
    all_axes[-1].set_xlabel("ms; the dotted line is where step() begins")
    all_axes[-1].set_xlim(left=0)
    figure.savefig(picture, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", choices=["with", "without"], help=argparse.SUPPRESS)
    parser.add_argument("--picture", type=Path, default=Path("docs/overlap.png"))
    args = parser.parse_args()
    if args.work:
        work(args.work == "with")
        return
    import subprocess

    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for how in ("without", "with"):
            path = Path(folder) / f"{how}.json"
            command = ["horovodrun", "--gloo", "-np", "2", sys.executable, "-m", "benchmarks.timeline", "--work", how]
            env = {**os.environ, "HOROVOD_TIMELINE": str(path), "OMP_NUM_THREADS": "1"}
            subprocess.run(command, env=env, check=True, timeout=300)
            runs[f"{how} overlap"] = spans(path)
    draw(runs, args.picture)


if __name__ == "__main__":
    main()
