"""The methods written out plainly in float64, for one group: what the package is judged by.

They follow the equations one worker at a time, with lists and loops where that is clearest, and
import nothing of the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

# numpy's own types tell sums of vectors from vectors.
Vector = Any


class Oracle:
    """AdaCons over gradients given as one flat float64 vector per worker."""

    def __init__(self, momentum: float = 0.99, normalize: bool = True, scale: str = "unit") -> None:
        self.beta = momentum
        self.normalize = normalize
        self.scale = scale
        self.m: list[float] | None = None

    def __call__(self, gradients: Sequence[Vector]) -> Vector:
        gradients = [np.asarray(g, dtype=np.float64) for g in gradients]
        workers = len(gradients)
        mean = sum(gradients) / workers
        norms = [float(np.sqrt(g @ g)) for g in gradients]
        if all(n == 0 for n in norms):
            return mean

        alpha = [g @ mean / n if n > 0 else 0.0 for g, n in zip(gradients, norms, strict=True)]
        if self.beta > 0:
            p = sorted(range(workers), key=lambda i: alpha[i])
            a = [alpha[p[k]] for k in range(workers)]
            if self.m is None:
                self.m = a
            else:
                self.m = [self.beta * m + (1 - self.beta) * x for m, x in zip(self.m, a, strict=True)]
            for k in range(workers):
                alpha[p[k]] = self.m[k]
        if self.normalize:
            whole = sum(alpha)
            if whole <= 1e-2 * sum(abs(x) for x in alpha):
                return mean
            alpha = [x / whole for x in alpha]
        gamma = [x / n if n > 0 else 0.0 for x, n in zip(alpha, norms, strict=True)]
        result = sum(w * g for w, g in zip(gamma, gradients, strict=True))
        if self.scale == "average":
            # So that equal gradients give exactly their average.
            result = result * (sum(norms) / workers if self.normalize else 1 / workers)
        return result


class Judge:
    """The method where only some of N workers take part, and how far roundings may take a result from it."""

    def __init__(self, workers: int, momentum: float, normalize: bool, scale: str) -> None:
        self.workers, self.beta, self.normalize, self.scale = workers, momentum, normalize, scale
        self.m: Vector | None = None
        #: How far a single-precision result may be off, in units of one rounding.
        self.slack = 0.0
        #: Whether a rounding may decide between the method and the average.
        self.close = False

    def __call__(self, gradients: dict[int, Vector]) -> Vector:
        with np.errstate(all="ignore"):
            return self._aggregate(list(gradients.values()))

    def _aggregate(self, g: list[Vector]) -> Vector:
        mean = sum(g) / len(g)
        n = np.array([np.sqrt(x @ x) for x in g])
        self.slack = sum(float(np.linalg.norm(x[np.isfinite(x)])) for x in g) / len(g)
        self.close = False
        if not np.isfinite(n).all() or not n.any():
            return mean
        alpha = np.array([x @ mean / k if k else 0.0 for x, k in zip(g, n, strict=True)])
        if self.beta:
            alpha = self._smooth(alpha)
        # A mean in which much cancels has the roundings of what there was, and so has every coefficient.
        slack = n.sum()
        if self.normalize:
            whole, size = alpha.sum(), np.abs(alpha).sum()
            self.close = abs(whole - 1e-2 * size) < 1e-3 * size
            if whole <= 1e-2 * size:
                return mean
            alpha = alpha / whole
            slack = slack / whole * (1 + np.abs(alpha).sum())
        gamma = np.array([a / k if k else 0.0 for a, k in zip(alpha, n, strict=True)])
        factor = 1.0 if self.scale == "unit" else n.sum() / len(g) if self.normalize else 1 / len(g)
        self.slack = float(factor * (slack + np.abs(alpha).sum()))
        return factor * sum(w * x for w, x in zip(gamma, g, strict=True))

    def _smooth(self, alpha: Vector) -> Vector:
        order = np.argsort(alpha, kind="stable")
        # The sorted values as a curve over [0, 1], whoever is there.
        all_points, points = np.linspace(0, 1, self.workers), np.linspace(0, 1, len(alpha))
        curve = np.interp(all_points, points, alpha[order])
        if self.m is None:
            self.m = curve
            return alpha
        old = np.empty_like(alpha)
        old[order] = np.interp(points, all_points, self.m)
        self.m = self.beta * self.m + (1 - self.beta) * curve
        return self.beta * old + (1 - self.beta) * alpha


class CurvatureOracle:
    """The curvature rule, from the gradients of all workers and of all steps so far: a d x d matrix and its solve."""

    def __init__(self, memory: int = 8, damping: float = 1.0, workers: bool = True, length: str = "unit") -> None:
        self.memory = memory
        self.damping = damping
        self.workers = workers
        self.length = length
        self.means: list[Vector] = []

    def __call__(self, gradients: Sequence[Vector]) -> Vector:
        rows = np.stack([np.asarray(g, dtype=np.float64) for g in gradients])
        count, size = rows.shape
        mean = rows.mean(0)
        if not rows.any():
            return mean
        spread = float(np.mean(np.sum(rows * rows, axis=1)))
        matrix = self.damping * spread / count * np.eye(size)
        if self.workers:
            matrix += rows.T @ rows / count
        kept = self.means[-self.memory :] if self.memory else []
        for past in kept:
            matrix += np.outer(past, past) / len(kept)
        self.means.append(mean)
        step = np.linalg.solve(matrix, mean)
        step /= np.linalg.norm(step)
        if self.length != "unit":
            step *= np.linalg.norm(mean)
        return step / np.sqrt(spread) if self.length == "agreement" else step


class NormalizedMeanOracle:
    """The mean at length one, or at its length relative to the workers' root mean square."""

    def __init__(self, length: str = "unit") -> None:
        self.length = length

    def __call__(self, gradients: Sequence[Vector]) -> Vector:
        rows = np.stack([np.asarray(g, dtype=np.float64) for g in gradients])
        mean = rows.mean(0)
        spread = np.sqrt(np.mean(np.sum(rows * rows, axis=1)))
        return mean / (np.linalg.norm(mean) if self.length == "unit" else spread)


class Grouped:
    """One oracle per group of parameters. ``groups`` lists the parameters' numbers."""

    def __init__(self, groups: Sequence[Sequence[int]], oracle: Any = Oracle, **settings: Any) -> None:
        self.groups = groups
        self.oracles = [oracle(**settings) for _ in groups]

    def __call__(self, gradients: Sequence[Sequence[Vector]]) -> list[Vector]:
        """``gradients[worker][parameter]`` in, one aggregated array per parameter out."""
        results: list[Vector] = [np.zeros(0)] * len(gradients[0])
        for members, oracle in zip(self.groups, self.oracles, strict=True):
            flat = [np.concatenate([_real(worker[p]) for p in members] or [np.zeros(0)]) for worker in gradients]
            whole = oracle(flat)
            start = 0
            for p in members:
                like = gradients[0][p]
                length = _real(like).size
                part = whole[start : start + length]
                start += length
                if np.iscomplexobj(like):
                    part = part.view(np.complex128)
                results[p] = part.reshape(like.shape)
        return results


def _real(x: Vector) -> Vector:
    """Flat float64; a complex number counts as its two parts."""
    x = np.ascontiguousarray(x).reshape(-1)
    return x.astype(np.complex128).view(np.float64) if np.iscomplexobj(x) else x.astype(np.float64)


def error(found: Sequence[Vector], expected: Sequence[Vector]) -> float:
    """How far apart two lists of arrays are, relative to the length of the second."""
    far = sum(float(np.sum(np.abs(np.asarray(f) - e) ** 2)) for f, e in zip(found, expected, strict=True))
    long = sum(float(np.sum(np.abs(np.asarray(e)) ** 2)) for e in expected)
    return float(np.sqrt(far / long)) if long else float(np.sqrt(far))


def trimmed_mean(values: Sequence[Vector]) -> Vector:
    """The mean without the least and the greatest of each element's values."""
    return np.sort(np.stack(values), axis=0)[1:-1].mean(0)
