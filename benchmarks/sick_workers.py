"""How often ``insight.SickWorkers`` is right, and how often it cries wolf: ``python -m benchmarks.sick_workers``.

Simulated workers train on images (Fashion-MNIST, 17,418 parameters, 32 images a worker and step, SGD with momentum).
A healthy run gives the false alarms, and so does one whose workers have data of their own: each draws classes with
probabilities of its own. Early in the first and late, it is gone on with from the same point once for each fault, which
the last worker has from then on. Parameters move by the mean of the healthy workers, as they do where the sick
one is excluded, so what is counted is detection alone. Gradients are seen as inner products only, as every schedule
sees them.

Finished runs are kept in a file, so what was interrupted goes on where it was. ``--page`` writes the table of
``docs/sick-workers.md`` from it.
"""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.func import grad, vmap

from adacons_hvd import Mean, Statistics
from adacons_hvd.insight import SickWorker, SickWorkers
from adacons_hvd.ops import as_plain

from .evidence.search import Record
from .evidence.tasks import Task, task

RESULTS = Path(__file__).parent / "results" / "sick_workers.json"
PAGE = Path(__file__).parent.parent / "docs" / "sick-workers.md"

WORKERS = (4, 8, 32)
#: The default threshold was chosen with seed 100.
REPORTED = tuple(range(10))
#: Steps of a healthy run, when faults begin in it, and how long they are watched.
STEPS, BEGIN, WATCHED = 1000, {"early": 20, "late": 999}, 100
BATCH, RATE = 32, 0.05

FAULTS = {
    "labels": "wrong labels",
    "classes": "two of ten classes only",
    "negative": "images in negative",
    "stuck": "the same batch in every step",
    "bits 0.001": "a flipped bit in 0.1% of the elements",
    "bits 0.01": "a flipped bit in 1% of the elements",
    "noise 1": "noise as long as the gradient",
    "noise 3": "noise 3 times as long",
    "noise 10": "noise 10 times as long",
}


class Training:
    """A model in training by simulated workers."""

    def __init__(self, workers: int, seed: int, skewed: bool = False) -> None:
        self.workers = workers
        self.generator = torch.Generator().manual_seed(seed)
        self.task: Task = task("images")
        self.classes: torch.Tensor | None = None
        if skewed:
            # Half of a worker's data is as everyone's, and half as classes happen to be drawn for it.
            own = torch.empty(workers, 10).exponential_(generator=self.generator)
            self.classes = 0.5 * own / own.sum(1, keepdim=True) + 0.05
            self.by_class = self.task.train[1].argsort(stable=True)
            self.counts = torch.bincount(self.task.train[1])
        self.vector = self.task.start(self.generator)
        self.speed = torch.zeros_like(self.vector)
        loss, model = self.task.loss, self.task.model
        self.slopes = vmap(grad(lambda p, x, y: loss(model(p, x), y)), (None, 0, 0))
        self.fault = ""
        self.stuck: tuple[torch.Tensor, torch.Tensor] | None = None

    def state(self) -> Any:
        return self.vector.clone(), self.speed.clone(), self.generator.get_state()

    def resume(self, state: Any, fault: str) -> None:
        self.vector, self.speed = state[0].clone(), state[1].clone()
        self.generator.set_state(state[2])
        self.fault, self.stuck = fault, None

    def step(self) -> Statistics:
        """Take a step; returns what every schedule knows of its gradients."""
        rows = self._gradients()
        statistics = Statistics.of(rows)
        direction = (rows[:-1] if self.fault else rows).mean(0)
        self.speed = 0.9 * self.speed + direction
        self.vector = self.vector - RATE * self.speed
        return statistics

    def _gradients(self) -> torch.Tensor:
        images, labels = self.task.train
        at = torch.randint(len(labels), (self.workers, BATCH), generator=self.generator)
        if self.classes is not None:
            wanted = torch.multinomial(self.classes, BATCH, replacement=True, generator=self.generator)
            at = self.by_class[(self.counts.cumsum(0) - self.counts)[wanted] + at % self.counts[wanted]]
        x, y = images[at], labels[at]
        if self.fault == "labels":
            y[-1] = (y[-1] + 1) % 10
        elif self.fault == "classes":
            some = torch.nonzero(labels < 2).flatten()
            at = some[torch.randint(len(some), (BATCH,), generator=self.generator)]
            x[-1], y[-1] = images[at], labels[at]
        elif self.fault == "negative":
            x[-1] = -x[-1]
        elif self.fault == "stuck":
            self.stuck = self.stuck or (x[-1].clone(), y[-1].clone())
            x[-1], y[-1] = self.stuck
        parameters = self.task.named(self.vector)
        rows = torch.cat([piece.flatten(1) for piece in self.slopes(parameters, x, y).values()], 1)
        if self.fault.startswith("bits"):
            rows[-1] = self._flipped(rows[-1], float(self.fault.split()[1]))
        elif self.fault.startswith("noise"):
            noise = torch.randn(rows.shape[1], generator=self.generator)
            rows[-1] += float(self.fault.split()[1]) * rows[-1].norm() * noise / noise.norm()
        return rows

    def _flipped(self, row: torch.Tensor, share: float) -> torch.Tensor:
        """With one bit flipped, any but the highest of the exponent, in a share of the elements."""
        flipped = row.clone()
        at = torch.randint(len(row), (int(share * len(row)),), generator=self.generator)
        bits = torch.randint(30, (len(at),), generator=self.generator)
        flipped.view(torch.int32)[at] ^= (1 << bits).to(torch.int32)
        return flipped


class Watch:
    """What one setting of :class:`SickWorkers` says of a run."""

    def __init__(self, **settings: Any) -> None:
        self.named: list[SickWorker] = []
        self.aggregator = SickWorkers(Mean(), callback=self.named.append, **settings)
        self.memory: Any = {}

    def see(self, s: Statistics) -> None:
        one = Statistics(as_plain(s.dots[None]), as_plain(s.squares[None]), as_plain(s.present[None]))
        decision = self.aggregator.decide(one, self.memory)
        self.memory = decision.memory
        assert decision.news is not None
        self.aggregator.tell(decision.news.rows[0], True)

    def take(self) -> list[int]:
        """The ranks named since this was last asked."""
        ranks = [worker.rank for worker in self.named if not worker.recovered]
        self.named.clear()
        return ranks


def run(workers: int, seed: int, settings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One healthy run and all faults in it; by name of a setting, what it found."""
    training = Training(workers, seed)
    watches = {name: Watch(**given) for name, given in settings.items()}
    found: dict[str, Any] = {name: {"alarms": 0, "faults": {}} for name in settings}
    points = {}
    for step in range(STEPS):
        for when, begin in BEGIN.items():
            if step == begin:
                points[when] = training.state(), {name: dict(watch.memory) for name, watch in watches.items()}
        statistics = training.step()
        for watch in watches.values():
            watch.see(statistics)
    for name, watch in watches.items():
        found[name]["alarms"] = len(watch.take())
    for when, (state, memories) in points.items():
        for fault in FAULTS:
            training.resume(state, fault)
            until: dict[str, int | None] = dict.fromkeys(watches)
            others = dict.fromkeys(watches, 0)
            for name, watch in watches.items():
                watch.memory = memories[name]
            for step in range(WATCHED):
                statistics = training.step()
                for name, watch in watches.items():
                    watch.see(statistics)
                    for rank in watch.take():
                        if rank == workers - 1:
                            until[name] = until[name] or step + 1
                        else:
                            others[name] += 1
            for name in watches:
                found[name]["faults"][f"{fault}, {when}"] = [until[name], others[name]]
    return found


def alarms(workers: int, seed: int) -> int:
    """How many healthy workers with classes of their own are named in one run."""
    training, watch = Training(workers, seed, skewed=True), Watch()
    for _ in range(STEPS):
        watch.see(training.step())
    return len(watch.take())


def measure(record: Record) -> None:
    for seed in REPORTED:
        for workers in WORKERS:
            key = f"{workers} workers, seed {seed}"
            record.get(key, lambda w=workers, s=seed: run(w, s, {"": {}})[""])  # type: ignore[misc]
            record.get(f"{key}, skewed", functools.partial(alarms, workers, seed))


def table(runs: dict[str, Any]) -> str:
    """The results as Markdown, of the seeds that all numbers of workers have."""
    seeds, skewed = (
        [seed for seed in REPORTED if all(f"{n} workers, seed {seed}{what}" in runs for n in WORKERS)]
        for what in ("", ", skewed")
    )
    by_size = {n: [runs[f"{n} workers, seed {seed}"] for seed in seeds] for n in WORKERS}
    heads = [f"{n} workers, {when}" for n in WORKERS for when in BEGIN]
    lines = [f"| the last worker has | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for fault, words in FAULTS.items():
        cells = [_cell([one["faults"][f"{fault}, {when}"] for one in by_size[n]]) for n in WORKERS for when in BEGIN]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    others = [
        sum(one["faults"][f"{fault}, {when}"][1] for one in by_size[n] for fault in FAULTS)
        for n in WORKERS
        for when in BEGIN
    ]
    lines.append(f"| healthy ones named beside it | {' | '.join(map(str, others))} |")
    heads = [f"{n} workers" for n in WORKERS]
    lines += ["", f"| false alarms of healthy workers | {' | '.join(heads)} |", f"|---|{'---|' * len(WORKERS)}"]
    same = [sum(one["alarms"] for one in by_size[n]) for n in WORKERS]
    other = [sum(runs[f"{n} workers, seed {seed}, skewed"] for seed in skewed) for n in WORKERS]
    for words, own, counts in (
        ("all draw from the same data", seeds, same),
        ("each draws classes with probabilities of its own", skewed, other),
    ):
        lines.append(f"| {words}, {STEPS * len(own):,} steps | {' | '.join(map(str, counts))} |")
    return "\n".join(lines)


def _cell(found: list[list[Any]]) -> str:
    steps = sorted(until for until, _ in found if until is not None)
    return f"{len(steps)} of {len(found)}" + (f", {steps[len(steps) // 2]}" if steps else "")


def write_page(runs: dict[str, Any]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    between: Callable[[Any], str] = lambda match: f"{match[1]}\n{table(runs)}\n{match[2]}"  # noqa: E731
    text = re.sub(r"(<!-- table -->)\n.*?(<!-- end of the table -->)", between, text, flags=re.DOTALL)
    PAGE.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, default=RESULTS, help="the file of finished runs")
    parser.add_argument("--page", action="store_true", help="write the table of what is finished into the page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = Record(options.record)
    if not options.page:
        measure(record)
    print(table(record.runs))
    if options.page:
        write_page(record.runs)


if __name__ == "__main__":
    main()
