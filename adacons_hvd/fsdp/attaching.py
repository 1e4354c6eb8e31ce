"""``attach``: a sharded model and its optimizer get an aggregator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from ..aggregators import Aggregator
from ..ddp.attaching import TIMEOUT, check_timeout, end_after_messages
from ..ddp.hooks import check_steps, introduce, unwrapped
from ..ddp.notes import Notes
from ..engine.memory import STATE_KEY
from ..engine.settings import Parameters, Settings
from ..insight import SickWorkers
from ..torch_amp import aggregate_before_unscaling
from .reducer import Reducer
from .units import Unit, units_of

__all__ = ["attach"]


def attach(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    aggregator: Aggregator | None,
    *,
    granularity: str = "unit",
    grad_scaler: Any = None,
    workers: str = "rank",
    timeout: float = TIMEOUT,
) -> None:
    """Let an aggregator combine the gradients of a sharded model's workers, instead of averaging.

    Every rank calls this once, after ``fully_shard()`` and after making the optimizer, and before the first forward
    pass. From then on FSDP's own reduction, during ``backward()``, leaves every rank its shard of the aggregated
    gradient. All that FSDP offers (mixed precision, ``reshard_after_forward``, offloading, prefetching,
    ``set_requires_gradient_sync(False)`` to accumulate) works as before, and ``torch.nn.utils.clip_grad_norm_`` clips
    by the norm of the aggregated gradient.

    Args:
        model: a module with every trainable parameter in some unit of ``fully_shard()``, all on one mesh. On a mesh of
            two dimensions (HSDP: replicas, each sharded) every replica is one worker, whose gradient is the mean of its
            ranks'.
        optimizer: an optimizer of its parameters. Whatever its kind, it is only told what happens.
        aggregator: for example ``AdaCons()``. With None, FSDP averages as ever; a rank that has None while others have
            an aggregator is told so, and they are too.
        granularity: which parameters share one weight per worker. ``"unit"``, those of one ``fully_shard()``, is the
            only choice: weights for the whole model are known when backward ends, and until then every rank would have
            to keep a gradient as large as the unsharded model.
        grad_scaler: the ``torch.amp.GradScaler`` in use, if any. Scaled gradients have to be known as such, because the
            length of AdaCons' result under ``scale="unit"`` does not follow that of the gradients.
        workers: must stay ``"rank"``. With replicas of shards on hosts, HSDP, hosts are the workers already.
        timeout: for how many seconds this call waits for the other ranks to make it. Then all that did raise an error
            that names those that did not.

    Afterwards ``optimizer.aggregator`` is the aggregator, and ``optimizer.report`` a
    :class:`adacons_hvd.report.Report` on the last step, with one row a unit, in the order of the model's modules; it is
    None before the first.

    What the aggregator remembers is part of the optimizer's state, in its first parameter group, because that is where
    ``torch.distributed.checkpoint`` lets it through. Saved by any number of workers, it is taken up by any other.

    A reduction that takes place more than once before the optimizer's step, as when gradients are accumulated *with*
    synchronisation, is aggregated each time, and FSDP adds the results up.

    With ``nonfinite="raise"`` the error comes out of ``backward()``, on every rank, and a step along these gradients is
    a :class:`adacons_hvd.engine.replicas.StrayStepError`.

    Start this with ``torchrun --nproc-per-node 2 script.py``:

    >>> import torch
    >>> import adacons_hvd.fsdp
    >>> from adacons_hvd import AdaCons
    >>> from torch.distributed.fsdp import fully_shard
    >>> torch.distributed.init_process_group("gloo")
    >>> mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    >>> model = fully_shard(torch.nn.Linear(3, 2), mesh=mesh)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> adacons_hvd.fsdp.attach(model, optimizer, AdaCons())
    >>> model(torch.ones(2, 3)).sum().backward()
    >>> optimizer.step()
    >>> optimizer.report.fallbacks
    0
    """
    if granularity != "unit":
        raise ValueError(
            f'granularity must be "unit", got {granularity!r}: under FSDP each fully_shard()ed module has its own '
            "weights; others would take a gradient as large as the unsharded model on every rank"
        )
    units = _units(model)
    _check_mesh(units)
    group = _everyone(units[0])
    notes = Notes(group, "adacons_hvd.fsdp.attach()")
    try:
        check_timeout(timeout)
        optimizers = unwrapped(optimizer)
        settings = Settings.checked(
            Parameters(torch.is_tensor, id),
            aggregator=aggregator,
            granularity=[unit.parameters for unit in units],
            grad_scaler=grad_scaler,
            workers=workers,
        )
        _check(model, units, optimizers)
        if aggregator is not None:
            _check_free(units, aggregator)
        reducer = Reducer(model, units, group, optimizers, settings, notes)
    except Exception as error:
        notes.fail(error)
        raise
    notes.meet(timeout)
    reducer.agree()
    notes.clear()
    if aggregator is None:
        return
    end_after_messages()
    reducer.take_over()
    aggregate_before_unscaling()
    check_steps(optimizers[-1], reducer)
    optimizers[-1].register_step_post_hook(_AfterStep(reducer))
    for each in optimizers:
        if introduce(each, aggregator, reducer, _Save(reducer), _Load(reducer)):
            _make_place(each)
            each.register_load_state_dict_post_hook(_make_place)


class _Save:
    def __init__(self, reducer: Reducer) -> None:
        self.reducer = reducer

    def __call__(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        state["param_groups"][0][STATE_KEY] = self.reducer.save()


class _Load:
    def __init__(self, reducer: Reducer) -> None:
        self.reducer = reducer

    def __call__(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        # A state without ours changes nothing of ours.
        for group in state["param_groups"]:
            if group.get(STATE_KEY):
                self.reducer.load(group[STATE_KEY])


def _make_place(optimizer: torch.optim.Optimizer) -> None:
    """Make the place in the optimizer's own groups, too, which torch.distributed.checkpoint may take for a pattern."""
    optimizer.param_groups[0][STATE_KEY] = ""


class _AfterStep:
    def __init__(self, reducer: Reducer) -> None:
        self.reducer = reducer

    def __call__(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.reducer.after_step()


def _units(model: Any) -> list[Unit]:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module after fully_shard(), got {type(model).__name__}")
    try:
        units = units_of(model)
    except ImportError:
        raise ImportError(f"fully_shard() came with PyTorch 2.6, and this is {torch.__version__}") from None
    if not units:
        raise TypeError(
            f"no module of {type(model).__name__} was given to fully_shard(); shard the model first, or use "
            "adacons_hvd.ddp.attach() for a DistributedDataParallel"
        )
    return units


def _check_mesh(units: Sequence[Unit]) -> None:
    """Refuse units whose gradients the reduction does not see as a whole, or that live on different ranks."""
    for unit in units:
        dimensions = 1 if unit.replicas is None else 2
        if unit.shards is None or unit.mesh is None or unit.mesh.ndim != dimensions:
            raise ValueError(
                f"unit {unit.name} lives on the mesh {unit.mesh}, but aggregation needs one dimension along which "
                "parameters are sharded, and perhaps one along which shards are replicated: with tensor parallelism a "
                "worker's gradient is spread over ranks that the reduction does not see"
            )
        if unit.mesh.mesh.tolist() != units[0].mesh.mesh.tolist():
            raise ValueError(f"units {units[0].name} and {unit.name} live on different ranks; use one mesh")


def _everyone(unit: Unit) -> dist.ProcessGroup:
    """The group of all ranks of a unit's mesh."""
    if unit.replicas is None:
        assert unit.shards is not None
        return unit.shards
    ranks = sorted(unit.mesh.mesh.flatten().tolist())
    if ranks == list(range(dist.get_world_size())):
        assert dist.group.WORLD is not None
        return dist.group.WORLD
    group: dist.ProcessGroup = dist.new_group(ranks, use_local_synchronization=True)
    return group


def _check(model: torch.nn.Module, units: Sequence[Unit], optimizers: Sequence[torch.optim.Optimizer]) -> None:
    names = {id(p): name for name, p in model.named_parameters()}
    sharded = {id(p) for unit in units for p in unit.parameters}
    if not sharded <= names.keys():
        raise RuntimeError("the model's parameters are not sharded now: call attach() before the first forward pass")
    alone = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in sharded]
    if alone:
        raise ValueError(
            f"{len(alone)} of the model's parameters, the first of them {alone[0]}, belong to no unit of "
            "fully_shard(): nothing reduces their gradients and every rank would train them alone; give the whole "
            "model to fully_shard() as well, or freeze them"
        )
    if any(hasattr(optimizer, "report") for optimizer in optimizers):
        raise ValueError("this optimizer has an aggregator already")
    owned = {id(p) for group in optimizers[-1].param_groups for p in group["params"]}
    if not owned & sharded:
        raise ValueError(
            "the optimizer has none of the model's parameters; fully_shard() makes them anew, so make the optimizer "
            "after it"
        )


def _check_free(units: Sequence[Unit], aggregator: Aggregator) -> None:
    if aggregator.history:
        raise ValueError(
            f"{aggregator!r} needs the mean gradients of earlier steps, of which every rank would keep its shards, and "
            "no checkpoint of a sharded model would hold them; use an aggregator without a history, or DDP"
        )
    if isinstance(aggregator, SickWorkers):
        raise ValueError(
            "SickWorkers judges workers by their whole gradients, and FSDP shows those of one unit at a time; use "
            "MovingAverages, and read report.agreement"
        )
    shards, replicas = units[0].shards, units[0].replicas
    if dist.get_world_size(shards) == 1:
        raise ValueError(
            "FSDP scatters nothing among a single rank, so an aggregator would never be asked; pass None, or use "
            "adacons_hvd.ddp.attach() for replicas that are not sharded"
        )
    if replicas is not None and dist.get_world_size(replicas) == 1:
        raise ValueError(
            "there is a single replica, and nobody to agree with: shard among all ranks, on a mesh of one dimension"
        )
    if replicas is not None and aggregator.nonfinite == "exclude":
        raise ValueError(
            'nonfinite="exclude" is for workers, and under HSDP no rank sees the whole gradient of a replica'
        )
    for unit in units:
        if unit.is_custom:
            raise ValueError(
                f"unit {unit.name} has another reduce-scatter than FSDP's own, perhaps from an earlier attach(), and "
                "an aggregator would take its place"
            )
        if unit.divides is not None:
            raise ValueError(
                f"unit {unit.name} has set_gradient_divide_factor({unit.divides}), which says what a sum is divided "
                "by; an aggregator makes no sum, so leave the factor out"
            )
