"""Whether all ranks hold the same parameters, and the aggregator remembers the same on all of them.

:meth:`Replicas.begin` starts an exchange of digests at the end of a step, and :meth:`Replicas.end` reads it at the
beginning of the next one, when it has long arrived: an accelerator is never waited for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from ..collectives.distributed import TorchDistributed
from ..engine.replicas import compare_replicas
from ..ops.torch import digest
from ..torch_host import OnItsWay

__all__ = ["Found", "Replicas"]


class Found(NamedTuple):
    """The result of an exchange, the same on every rank."""

    parameters_differ: bool
    memories_differ: bool


class Replicas:
    """The parameters that must be equal on all ranks, by name."""

    def __init__(
        self, collectives: TorchDistributed, ranks: Sequence[int], parameters: Mapping[torch.Tensor, str]
    ) -> None:
        self._collectives = collectives
        #: How errors name the group's ranks.
        self._ranks = ranks
        self._parameters = list(parameters)
        self.names = list(parameters.values())
        self._under_way: OnItsWay | None = None

    def begin(self, memory: Iterable[torch.Tensor], here: bool) -> None:
        """Send digests to all ranks. A rank that is not ``here`` any more has no parameters to compare."""
        row = self._row(here, [digest(self._parameters), digest(memory)])
        self._under_way = OnItsWay(self._collectives.allgather(row, "adacons.replicas").wait())

    def end(self) -> Found:
        """Read what :meth:`begin` has begun, if anything."""
        under_way, self._under_way = self._under_way, None
        if under_way is None:
            return Found(False, False)
        rows = under_way.read().view(self._collectives.size, -1).tolist()
        return Found(
            parameters_differ=len({parameters for here, parameters, _ in rows if here}) > 1,
            memories_differ=len({memory for _, _, memory in rows}) > 1,
        )

    def compare(self, here: bool, step: int) -> None:
        """Raise the error that says which parameters differ; all ranks call this together."""
        row = self._row(here, [digest([p]) for p in self._parameters])
        rows = self._collectives.allgather(row, "adacons.differences").wait().view(self._collectives.size, -1)
        digests = {rank: rest for rank, (present, *rest) in zip(self._ranks, rows.tolist(), strict=True) if present}
        compare_replicas(digests, self.names, step)

    def _row(self, here: bool, numbers: Sequence[torch.Tensor]) -> torch.Tensor:
        device = self._collectives.device
        return torch.stack([torch.tensor(int(here)).to(device), *(number.to(device) for number in numbers)])
