"""The weightings of TorchJD, which is for one process, as aggregators for a cluster."""

from __future__ import annotations

from typing import Any

from ..ops import ops_for
from .base import NONFINITE_POLICIES, Aggregator, Decision, Statistics, one_of
from .checkpoint import Memory

__all__ = ["from_torchjd"]


def from_torchjd(weighting: Any, *, nonfinite: str = "propagate") -> Aggregator:
    """Make an aggregator of one of TorchJD's weightings, for example ``UPGradWeighting()``.

    TorchJD maps the Gramian of one process' gradients to weights; here it is given the Gramian of the workers'
    gradients, one group of parameters at a time. Weightings that draw random numbers draw the same on every rank and in
    every run. Workers that take no part are left out of the Gramian.

    Args:
        weighting: a ``torchjd.aggregation.Weighting`` without a state of its own, for PyTorch only. Its weights are
            used as they are: where they add up to N and not to 1, the step is N times as long.
        nonfinite: see :attr:`Aggregator.nonfinite`.

    >>> import torch
    >>> from torchjd.aggregation import MGDAWeighting
    >>> aggregator = from_torchjd(MGDAWeighting())
    >>> aggregator(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    tensor([0.4000, 0.8000])
    """
    from torchjd.aggregation import Weighting

    if not isinstance(weighting, Weighting):
        raise TypeError(f"weighting must be a Weighting of TorchJD's such as UPGradWeighting(), got {weighting!r}")
    for part in weighting.modules():
        if hasattr(part, "reset"):
            raise ValueError(
                f"{type(part).__name__} keeps a state of its own, which no checkpoint would hold and which all groups "
                "of parameters would share; only weightings without one can become aggregators"
            )
    return _FromTorchJD(weighting, one_of("nonfinite", nonfinite, NONFINITE_POLICIES))


class _FromTorchJD(Aggregator):
    needs_gramian = True

    def __init__(self, weighting: Any, nonfinite: str) -> None:
        self._weighting = weighting
        self.nonfinite = nonfinite

    def start(self, statistics: Statistics) -> Memory:
        ops = ops_for(statistics.squares)
        return {"draws": ops.zeros((*ops.shape(statistics.squares)[:-1], 1), statistics.squares)}

    def weigh(self, statistics: Statistics, memory: Memory) -> Decision:
        import torch

        gramian = statistics.gramian
        if not isinstance(gramian, torch.Tensor):
            raise TypeError(f"{self!r} computes with PyTorch, and this gradient is a {type(gramian).__module__} tensor")
        workers = gramian.shape[-1]
        weights = torch.zeros_like(statistics.squares)
        tables, rows, places = gramian.view(-1, workers, workers), weights.view(-1, workers), statistics.present
        devices = [gramian.device] if gramian.is_cuda else []
        for table, row, here, draws in zip(
            tables, rows, places.reshape(-1, workers), memory["draws"].reshape(-1).tolist(), strict=True
        ):
            (taking,) = torch.nonzero(here, as_tuple=True)
            if not len(taking):
                continue
            # The caller's random numbers differ between ranks, and must not be used up.
            with torch.no_grad(), torch.random.fork_rng(devices):
                torch.manual_seed(int(draws))
                found = self._weighting(table[taking][:, taking])
            row[taking] = found.to(row.dtype)
        no = torch.zeros_like(weights[..., :1], dtype=torch.bool)
        return Decision(weights, {"draws": memory["draws"] + 1}, fallback=no)

    def resize(self, memory: Memory, workers: int) -> Memory:
        return memory

    def __repr__(self) -> str:
        return f"from_torchjd({_described(self._weighting)}, nonfinite={self.nonfinite!r})"


def _described(module: Any) -> str:
    """A module with its settings; TorchJD's own text leaves some out, and ranks compare this one."""
    import torch

    usual = vars(torch.nn.Module())
    settings = {name.lstrip("_"): value for name, value in vars(module).items() if name not in usual}
    # The default text of an object is its address, which differs between ranks.
    texts = [f"{k}={type(v).__name__ if ' at 0x' in repr(v) else repr(v)}" for k, v in settings.items()]
    parts = [f"{name}={_described(part)}" for name, part in module.named_children()]
    return f"{type(module).__name__}({', '.join(texts + parts)})"
