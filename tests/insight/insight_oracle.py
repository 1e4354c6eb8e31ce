"""What ``adacons_hvd.insight`` and the report should say, in float64, from whole gradients."""

from __future__ import annotations

import numpy as np


def noise_and_signal(rows: np.ndarray) -> tuple[float, float]:
    """The sample variance of the rows, summed over elements, and what it leaves of the squared mean."""
    if len(rows) < 2:
        return 0.0, 0.0
    noise = float(rows.var(axis=0, ddof=1).sum())
    return noise, float(np.square(rows.mean(axis=0)).sum()) - noise / len(rows)


def agreement(rows: np.ndarray, present: list[int] | None = None) -> list[float]:
    """The cosine between each row and the sum of the other ones that are present."""
    present = list(range(len(rows))) if present is None else present
    found = []
    for i, row in enumerate(rows):
        others = sum((rows[j] for j in present if j != i), np.zeros_like(row))
        lengths = np.linalg.norm(row) * np.linalg.norm(others)
        found.append(float(row @ others / lengths) if lengths else 0.0)
    return found


def gain(noise: float, signal: float, workers: int) -> float:
    signal = max(signal, 0.0)
    return (noise + signal) / (noise / workers + signal)


class Averages:
    """Moving averages that start at zero."""

    def __init__(self, keep: float) -> None:
        self.keep, self.noise, self.signal = keep, 0.0, 0.0

    def add(self, rows: np.ndarray) -> None:
        noise, signal = noise_and_signal(rows)
        self.noise = self.keep * self.noise + (1 - self.keep) * noise
        self.signal = self.keep * self.signal + (1 - self.keep) * signal

    @property
    def noise_scale(self) -> float:
        return self.noise / self.signal if self.signal > 0 else float("inf")
