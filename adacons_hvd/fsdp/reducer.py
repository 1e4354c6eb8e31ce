"""From FSDP's gradients to shards of the aggregate.

FSDP reduces the gradients of a *unit*, a module given to ``fully_shard``, as soon as backward has computed them all.
Its reduce-scatter takes the unit's whole gradient, cut in as many shards as there are ranks, and leaves every rank the
mean of one. :meth:`Reducer.reduce` stands in its place: an alltoall gives every rank all workers' gradients for its
shard, one small sum completes their inner products, and the shard of the aggregate is a weighted sum of what has
arrived. A unit is a group: it has weights of its own, exact and at once, so nothing has to be kept until backward ends.

With replicas of shards (HSDP) the workers are the replicas, see :mod:`adacons_hvd.fsdp.replicated`.

All ranks reduce the same units in the same order, because FSDP itself would hang otherwise. So settings are compared
once, in :meth:`Reducer.agree`. What the aggregator remembers is compared in the first step and in steps 1, 100, 200,
... (see :func:`adacons_hvd.engine.replicas.is_due`): it is not the same on all ranks where a state was loaded on some
of them only. Parameters need no comparison, because no rank has a copy of another's.
"""

from __future__ import annotations

import json
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from .. import agreement
from ..aggregators import Decision, Statistics, pack_memory
from ..collectives import host_name
from ..collectives.distributed import TorchDistributed
from ..costs import Choice
from ..ddp.hooks import raise_after_backward
from ..ddp.notes import Notes
from ..ddp.replicas import Replicas
from ..engine.memory import State, share_memory
from ..engine.replicas import CHECK_REPLICAS, is_due, stray_step
from ..engine.session import Arrival, Parameter, agree, describe, describe_average
from ..engine.settings import Settings
from ..ops import ops_for
from ..ops.torch import arithmetic, beside
from ..report import Report
from ..schedules import DenseBucket, Scatter, Segment, Step
from ..torch_amp import WITHOUT_SCALER, other_scaler, unscale
from .replicated import Replicated
from .units import Unit

__all__ = ["Reducer"]

CHOICE = Choice("one-pass", "FSDP's gradients come in shards")


class Reducer:
    """See the module docstring. One per model; :meth:`agree` comes before the first step."""

    def __init__(
        self,
        model: torch.nn.Module,
        units: Sequence[Unit],
        group: dist.ProcessGroup,
        optimizers: Sequence[torch.optim.Optimizer],
        settings: Settings,
        notes: Notes,
    ) -> None:
        self.settings = settings
        self._units = units
        self._optimizers = [weakref.ref(optimizer) for optimizer in optimizers]
        self._ranks = notes.ranks
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._parameters = [p for unit in units for p in unit.parameters]
        self._collectives = TorchDistributed(group, units[0].device)
        replicas = units[0].replicas
        self._replicas = None if replicas is None else Replicated(replicas, self._collectives)
        #: What the aggregator remembers of each unit.
        self._states = [State() for _ in units]
        self._memories = Replicas(self._collectives, self._ranks, {})
        #: What was decided for each unit since the last step of the optimizer.
        self._decided: dict[int, tuple[Decision, Statistics]] = {}
        #: How many times the first unit has begun a step: equal on all ranks.
        self._steps = 0
        #: Whether the aggregator has refused gradients since the last step.
        self._refused = False
        #: Whether the loss scaler has come to the gradients since they were aggregated.
        self._scaler_came = False

    # --- before the first step ------------------------------------------------------------------

    def agree(self) -> None:
        """Make sure that all ranks have the same settings and units."""
        description = self._description()
        agree(self._collectives, Arrival(agreement.digest(description), host_name()), description, "adacons")

    def _description(self) -> dict[str, Any]:
        if self.settings.aggregator is None:
            return describe_average("FSDP's own average")
        group_of, _ = self.settings.group_parameters(list(map(id, self._parameters)))
        parameters = [
            Parameter(id(p), self._names[id(p)], str(p.dtype), p.shape, group_of[id(p)]) for p in self._parameters
        ]
        units = [unit.name for unit in self._units]
        return describe(self.settings, parameters, arithmetic=arithmetic(self._collectives.device), units=units)

    def take_over(self) -> None:
        """Have every unit's gradients come here."""
        for number, unit in enumerate(self._units):
            unit.take_over(number, self.reduce)

    # --- during backward ------------------------------------------------------------------------

    @torch.no_grad()
    def reduce(self, number: int, shard: torch.Tensor, gradient: torch.Tensor, group: dist.ProcessGroup) -> None:
        """Fill this rank's shard of a unit's aggregate, given this rank's gradient of the whole unit."""
        aggregator = self.settings.aggregator
        assert aggregator is not None
        if not self._decided or number in self._decided:
            self._begin()
        # FSDP can be told to use another group of the same ranks, so that messages of two kinds overlap.
        workers = TorchDistributed(group, gradient.device) if self._replicas is None else self._replicas
        if self._replicas is not None:
            gradient = self._replicas.mean(gradient, shard, group)
        bucket = DenseBucket(f"adacons.{number}", gradient, [Segment(0, gradient.numel(), 0)], Scatter(workers))
        state = self._states[number]
        state.fit(aggregator, 1, workers.size, gradient)
        factor = unscale(self.settings.grad_scaler, gradient)
        try:
            # Where backward() is called inside of an autocast, so is this; but here precision is chosen with care.
            with torch.autocast(gradient.device.type, enabled=False):
                decision, statistics = Step(workers, aggregator, 1, "adacons").run([bucket], state.memory, factor)
        except FloatingPointError as error:
            self._refuse(error, shard)
            return
        state.memory = decision.memory
        self._decided[number] = decision, statistics
        if bucket.restore is not None:
            piece = (0, bucket.buffer.numel(), bucket.restore[0, 0])
            ops_for(bucket.buffer).scale_segments(bucket.buffer, [piece])
        if self._replicas is None:
            shard.copy_(bucket.buffer)
        else:
            self._replicas.place(bucket.buffer, shard)

    def _begin(self) -> None:
        """Before the first unit of a step: see to it that all ranks remember the same."""
        self._decided.clear()
        self._refused = self._scaler_came = False
        if self._memories.end().memories_differ or self._steps == 0:
            self._share_memories()
        elif is_due(self._steps, CHECK_REPLICAS):
            self._memories.begin([value for state in self._states for value in state.tensors().values()], True)
        self._steps += 1

    def _share_memories(self) -> None:
        """Let all ranks remember the same, which is what the rank with the most steps does."""
        mine = json.dumps([(state.digest(), state.steps) for state in self._states]).encode()
        everyone = [json.loads(row) for row in self._collectives.allgather_bytes(mine, "adacons.memories")]
        reference = torch.empty((), device=self._collectives.device)
        warned = False
        for state, *rows in zip(self._states, *everyone, strict=True):
            remembered = [(digest, steps) for digest, steps in rows]
            name, ranks = "adacons", self._ranks
            share_memory(state, remembered, self._collectives, name, reference=reference, ranks=ranks, expected=warned)
            warned = warned or len(set(remembered)) > 1

    def _refuse(self, error: FloatingPointError, shard: torch.Tensor) -> None:
        """Raise the aggregator's error from ``backward()``, on all ranks, but only when FSDP has finished."""
        shard.zero_()
        if not self._refused:
            self._refused = True
            raise_after_backward(error)

    # --- at the optimizer's step ----------------------------------------------------------------

    def check_step(self) -> None:
        """Refuse a step of the optimizer that must not be taken; write the report on one that may."""
        if all(p.grad is None for p in self._parameters):
            return
        for unit in self._units:
            if not unit.is_taken_over:
                raise stray_step(
                    [self._ranks[self._collectives.rank]],
                    f"since attach(), unit {unit.name} was given another reduce-scatter or another divide factor",
                )
        if self._refused:
            raise stray_step(self._ranks, "the last backward() failed, and none followed before the optimizer's step")
        scaler = self.settings.grad_scaler
        if self._decided and scaler is not None and scaler.is_enabled() and not self._scaler_came:
            raise agreement.DisagreementError(WITHOUT_SCALER)
        self._report()

    def after_step(self) -> None:
        """The next gradient belongs to another step."""
        self._decided.clear()

    def unscaling(self, scaler: Any) -> None:
        """Refuse a loss scaler, about to divide gradients, that was not known when they were aggregated."""
        given = self.settings.grad_scaler
        if scaler is not given:
            raise agreement.DisagreementError(other_scaler(given))
        self._scaler_came = True

    def _report(self) -> None:
        if not self._decided:
            return
        reference = torch.empty((), device=self._collectives.device)
        pairs = [self._decided[number] for number in sorted(self._decided)]

        def joined(parts: Sequence[Any]) -> torch.Tensor:
            return torch.cat([beside(part, reference) for part in parts])

        decisions, statistics = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        decision = Decision(
            weights=joined([each.weights for each in decisions]),
            memory={name: joined([each.memory[name] for each in decisions]) for name in decisions[0].memory},
            fallback=joined([each.fallback for each in decisions]),
            stages={name: joined([each.stages[name] for each in decisions]) for name in decisions[0].stages},
        )
        whole = Statistics(
            joined([each.dots for each in statistics]),
            joined([each.squares for each in statistics]),
            joined([each.present for each in statistics]),
        )
        for ref in self._optimizers:
            if (optimizer := ref()) is not None:
                optimizer.report = Report(decision, whole, CHOICE)  # type: ignore[attr-defined]

    # --- checkpoints ----------------------------------------------------------------------------

    def save(self) -> str:
        """What the aggregator remembers of every unit, as text.

        Text, because torch.distributed.checkpoint leaves out what is neither a parameter's nor a parameter group's, and
        takes up tensors of another shape, as those of another number of workers are, not at all. Python writes a float
        so that reading it gives the same bits.
        """
        units = {
            unit.name: {name: value.tolist() for name, value in state.tensors().items()}
            for unit, state in zip(self._units, self._states, strict=True)
        }
        workers = max(state.workers for state in self._states)
        return json.dumps(pack_memory({"units": units}, workers))

    def load(self, text: str) -> None:
        """Take up what :meth:`save` returned, of the units that there are."""
        saved: dict[str, Any] = json.loads(text)
        units = saved.pop("units")
        missing = [unit.name for unit in self._units if unit.name not in units]
        if missing:
            warnings.warn(
                f"the aggregator's state has nothing of {len(missing)} of {len(self._units)} units, the first of them "
                f"{missing[0]}, so these start afresh; was the model sharded in another way?",
                stacklevel=2,
            )
        for unit, state in zip(self._units, self._states, strict=True):
            memory = {
                name: torch.tensor(value, dtype=torch.float64) for name, value in units.get(unit.name, {}).items()
            }
            state.load_state_dict({**saved, **memory})
        self._decided.clear()
        # Loaded on some ranks only, it would not be the same on all of them.
        self._steps = 0
