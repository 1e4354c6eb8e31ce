"""The method written out plainly in float64, for one group: what the package is judged by.

It follows the equations one worker at a time, with lists and loops where that is clearest, and
imports nothing of the package.
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


class Grouped:
    """One oracle per group of parameters. ``groups`` lists the parameters' numbers."""

    def __init__(self, groups: Sequence[Sequence[int]], **settings: Any) -> None:
        self.groups = groups
        self.oracles = [Oracle(**settings) for _ in groups]

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
