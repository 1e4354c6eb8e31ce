"""``attach``: a DDP model and its optimizer get an aggregator."""

# The annotations of the hook must be what they say, not strings: DDP compares them. So there is no
# `from __future__ import annotations` here.

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ..aggregators import Aggregator
from ..binding import STATE_KEY
from ..costs import Network
from ..engine.settings import check_aggregator, check_granularity
from .reducer import Reducer, Settings

__all__ = ["attach"]


def attach(
    model: DistributedDataParallel,
    optimizer: torch.optim.Optimizer,
    aggregator: Aggregator | None,
    *,
    schedule: str | Network = "auto",
    granularity: str | Sequence[Sequence[torch.Tensor]] = "model",
    grad_scaler: Any = None,
) -> None:
    """Let an aggregator combine the gradients of a DDP model's replicas, instead of averaging.

    Every rank calls this once, after making the model and the optimizer and before the first
    backward pass. From then on ``backward()`` leaves aggregated gradients, and all that DDP offers
    (``no_sync()``, ``join()``, ``static_graph``, ...) works as before.

    Args:
        model: the wrapped model.
        optimizer: an optimizer of its parameters. Whatever its kind, it is only told what happens.
        aggregator: for example ``AdaCons()``. With None, DDP averages as ever; a rank that has
            None while others have an aggregator is told so, and they are too.
        schedule: how gradients move. ``"auto"`` takes the cheapest of ``"two-pass"``,
            ``"one-pass"`` and ``"gather"``, whose result is the same; ``"fast"`` may also take
            ``"half"`` or ``"sketch"``, whose weights are nearly so. Both measure what the cluster
            can do; a :class:`adacons_hvd.costs.Network` in their place gives figures to go by.
        granularity: which parameters share one weight per worker: ``"model"`` (all, as in the
            paper), ``"layer"`` (every tensor has its own), or lists of parameters (those in no
            list form one more group).
        grad_scaler: the ``torch.amp.GradScaler`` in use, if any. The length of AdaCons' result
            under ``scale="unit"`` does not follow that of the gradients, so scaled gradients have
            to be known as such.

    Afterwards ``optimizer.aggregator`` is the aggregator, and ``optimizer.report`` a
    :class:`adacons_hvd.report.Report` on the last step, or None before the first. What the
    aggregator remembers is part of ``optimizer.state_dict()``, in the form that
    ``adacons_hvd.torch`` uses too, and ``load_state_dict()`` takes it up, saved by any number of
    workers.

    Load a checkpoint on every rank. DDP makes parameters equal when it wraps a model, but nobody
    does so for optimizers: ranks that go on from different states, the optimizer's or the
    aggregator's, end with different parameters.

    With ``nonfinite="raise"`` the error comes out of ``backward()``, on every rank. Gradients are
    then of no use, but training can go on. A rank that waits in ``model.join()`` goes on waiting.

    Under ``model.join()`` a rank that has run out of data takes no part: the aggregate is that of
    the others alone, whatever ``divide_by_initial_world_size`` says.

    Start this with ``torchrun --nproc-per-node 2 script.py``:

    >>> import torch
    >>> import adacons_hvd.ddp
    >>> from adacons_hvd import AdaCons
    >>> torch.distributed.init_process_group("gloo")
    >>> model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 1))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> adacons_hvd.ddp.attach(model, optimizer, AdaCons())
    >>> model(torch.ones(2, 3)).sum().backward()
    >>> optimizer.step()
    >>> optimizer.report.fallbacks
    0
    """
    _check(model, optimizer)
    if aggregator is not None:
        check_aggregator(aggregator, schedule)
    settings = Settings(aggregator, schedule, check_granularity(granularity, torch.is_tensor), grad_scaler)
    reducer = Reducer(model, optimizer, settings)
    if aggregator is None:
        return
    try:
        model.register_comm_hook(reducer, adacons_hook)
    except RuntimeError as error:
        raise RuntimeError(
            "this model has a communication hook already, perhaps from an earlier attach(), and "
            "DistributedDataParallel takes only one. Wrap the module anew to attach another"
        ) from error
    told: Any = optimizer
    told.aggregator = aggregator
    told.report = None
    optimizer.register_state_dict_post_hook(_Save(reducer))
    optimizer.register_load_state_dict_pre_hook(_Load(reducer))


def adacons_hook(state: Reducer, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """What DDP calls as soon as backward has filled a bucket."""
    return state.take(bucket)


class _Save:
    def __init__(self, reducer: Reducer) -> None:
        self.reducer = reducer

    def __call__(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        state[STATE_KEY] = self.reducer.state.state_dict()


class _Load:
    def __init__(self, reducer: Reducer) -> None:
        self.reducer = reducer

    def __call__(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        # This is a copy of what the user gave. A state without ours changes nothing of ours.
        ours = state.pop(STATE_KEY, None)
        if ours is not None:
            self.reducer.state.load_state_dict(ours)


def _check(model: Any, optimizer: torch.optim.Optimizer) -> None:
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(
            f"model must be a DistributedDataParallel, got {type(model).__name__}; wrap the module "
            "first, and attach before torch.compile()"
        )
    if model.mixed_precision is not None:
        raise ValueError(
            "DistributedDataParallel's own mixed_precision comes with a communication hook, and a "
            "model takes only one. Use torch.autocast instead"
        )
    # Gradients that DDP does not hand to a hook in buckets.
    if getattr(model, "_delay_all_reduce_params", None):
        raise ValueError("delay_all_reduce_named_params makes DDP average these parameters' gradients itself")
    if getattr(model, "_use_python_reducer", False):
        raise ValueError('torch._dynamo.config.optimize_ddp = "python_reducer" has no buckets; use another setting')
    if hasattr(optimizer, "report"):
        raise ValueError(
            "this optimizer has an aggregator already. For several models under one optimizer, "
            "wrap them together: DistributedDataParallel(torch.nn.ModuleList(...))"
        )
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in owned for p in model.parameters()):
        raise ValueError("the optimizer has none of the model's parameters; was it made for another model?")
