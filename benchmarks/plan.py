"""Prints the cost model's answers for clusters that cannot be measured here: ``python -m benchmarks.plan``.

Hosts of eight accelerators with 400 Gbit/s cards: one card that eight share, or one each. Time is
relative to averaging in float32, by the same model. The best of what is chosen among is bold; ``hosts`` is another
method.
"""

from __future__ import annotations

from adacons_hvd.costs import Network, Rates, predict
from adacons_hvd.schedules import SCHEDULES, HostPass

CARD = 50e9  # 400 Gbit/s
PER_HOST = 8
MEMORY = 3e12  # bytes a second of one accelerator
LATENCY = 5e-5
WORKERS = (64, 512, 4096)
PARAMETERS = {"25M": 25e6, "350M": 350e6, "7B": 7e9, "70B": 70e9}


def rates(workers: int, cards: int) -> Rates:
    # A worker with a card of its own is, to the network, a host of its own.
    sharing = PER_HOST // cards
    return Rates.of(Network(bandwidth=CARD, latency=LATENCY, memory_bandwidth=MEMORY), workers, sharing)


def main() -> None:
    names = [*SCHEDULES, HostPass.name]
    print(f"| cards a host | workers | parameters | average | {' | '.join(names)} |")
    print("|---" * (4 + len(names)) + "|")
    for cards in (1, PER_HOST):
        for workers in WORKERS:
            for label, count in PARAMETERS.items():
                figures = rates(workers, cards)
                average = figures.allreduce(4 * count)
                ratios = {name: predict(name, figures, 4 * count) / average for name in names}
                best = min(SCHEDULES, key=lambda name: ratios[name])
                cells = [f"**{ratios[n]:.2f}**" if n == best else f"{ratios[n]:.2f}" for n in names]
                print(f"| {cards} | {workers} | {label} | {average * 1e3:.3g} ms | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
