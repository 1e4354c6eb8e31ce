"""``attach``: a DDP model and its optimizer get an aggregator."""

# The annotations of the hook must be what they say, not strings: DDP compares them. So there is no
# `from __future__ import annotations` here.

import atexit
import functools
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ..aggregators import Aggregator
from ..costs import Network
from ..engine.memory import STATE_KEY
from ..engine.replicas import CHECK_REPLICAS
from ..engine.settings import Parameters, Settings
from ..torch_amp import aggregate_before_unscaling
from .hooks import check_steps, introduce, unwrapped
from .notes import Notes
from .reducer import Reducer, looked_after

__all__ = ["TIMEOUT", "attach", "check_timeout", "end_after_messages", "unwrapped_model"]

#: For how many seconds a rank waits in attach() for the others.
TIMEOUT = 300.0


def attach(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    aggregator: Aggregator | None,
    *,
    schedule: str | Network = "auto",
    granularity: str | Sequence[Sequence[torch.Tensor]] = "model",
    grad_scaler: Any = None,
    check_replicas: int = CHECK_REPLICAS,
    may_differ: Iterable[torch.Tensor] = (),
    workers: str = "rank",
    timeout: float = TIMEOUT,
) -> None:
    """Let an aggregator combine the gradients of a DDP model's replicas, instead of averaging.

    Every rank calls this once, after making the model and the optimizer and before the first
    backward pass. From then on ``backward()`` leaves aggregated gradients, and all that DDP offers
    (``no_sync()``, ``join()``, ``static_graph``, ...) works as before.

    Args:
        model: the ``DistributedDataParallel`` model, or what ``torch.compile()``, Accelerate's
            ``prepare()`` or Fabric's ``setup()`` made of it.
        optimizer: an optimizer of its parameters, or a list of all of them. Whatever its kind, it
            is only told what happens. One that wraps another and has it as its ``.optimizer``, as
            Accelerate's and Fabric's do, is fine.
        aggregator: for example ``AdaCons()``. With None, DDP averages as ever; a rank that has
            None while others have an aggregator is told so, and they are too.
        schedule: how gradients move. ``"auto"`` takes the cheapest of ``"two-pass"``,
            ``"one-pass"`` and ``"gather"``, whose result is the same; ``"fast"`` may also take
            ``"half"`` or ``"sketch"``, whose weights are nearly so. Both measure what the cluster
            can do; a :class:`adacons_hvd.costs.Network` in their place gives figures to go by.
        granularity: which parameters share one weight per worker: ``"model"`` (all, as in the
            paper), ``"layer"`` (every tensor has its own), or lists of parameters (those in no
            list form one more group).
        grad_scaler: the ``torch.amp.GradScaler`` in use, if any; one that is disabled is fine. DDP
            aggregates in backward, when gradients are scaled, and the length of AdaCons' result
            under ``scale="unit"`` does not follow that of the gradients, so scaled gradients have
            to be known as such. The rest of the loop is as without an aggregator: ``scale``,
            ``backward``, perhaps ``unscale_`` and clipping, ``scaler.step(optimizer)``, ``update``.
            A step under a scaler that was not given here is an error, and so is one without the
            scaler that was. Accelerate's optimizer brings its own, as ``.scaler``.
        check_replicas: every how many aggregations ranks compare their parameters, to notice one
            that has trained alone; 0 never. They are compared in the second aggregation, too.
        may_differ: parameters that are meant to differ between ranks, left out of the comparison.
            A step along gradients of theirs that are not aggregated is no error.
        workers: ``"rank"``, or ``"host"`` for another method: gradients are averaged inside of each host, and
            the aggregator combines the hosts' averages, at the price of an average however many ranks a host has.
            ``report.choice.hosts`` then has the ranks of each worker.
        timeout: for how many seconds this call waits for the other ranks to make it. Then all that
            did raise an error that names those that did not. (Over MPI, which has no store, the
            error cannot name them.)

    Afterwards ``optimizer.aggregator`` is the aggregator, and ``optimizer.report`` a
    :class:`adacons_hvd.report.Report` on the last step, or None before the first. What the
    aggregator remembers is part of ``optimizer.state_dict()``, in the form that
    ``adacons_hvd.torch`` uses too, and ``load_state_dict()`` takes it up, saved by any number of
    workers. With several optimizers, the state of each holds all of it.

    Load a checkpoint on every rank. DDP makes parameters equal when it wraps a model, but nobody
    does so for optimizers: ranks that go on from different states of the optimizer end with
    different parameters. What the aggregator remembers is compared at the first backward pass, and
    then whenever parameters are; where ranks differ, all go on from what the rank with the most
    steps remembers, and warn.

    Two errors, both a :class:`adacons_hvd.agreement.DisagreementError`, tell of a rank that trains
    alone. A :class:`adacons_hvd.engine.replicas.ReplicaError` comes out of ``backward()`` on all
    ranks, one backward pass after a comparison that found parameters to differ. A
    :class:`adacons_hvd.engine.replicas.StrayStepError` comes out of ``optimizer.step()`` on a rank
    whose last backward pass was not aggregated (under ``no_sync()``, or through ``model.module``),
    before anything has changed (where a closure makes the gradients, after the step); the other ranks
    raise it, too, from the backward pass in which they wait for that rank, within a few seconds. That
    is so on CPUs. Ranks that wait in an accelerator's queue, or for a message of DDP's own (buffers
    before a forward pass, the order of buckets in the second), cannot be told: they end when the
    launcher ends them, or by the communication library's own time limit.

    An optimizer that decides by its closure's loss, as ``LBFGS(line_search_fn="strong_wolfe")``
    does, must see the same loss on every rank, so let the closure return the mean of them; the
    gradients are aggregated without further ado::

        def closure():
            optimizer.zero_grad()
            loss = loss_function(model(inputs), targets)
            loss.backward()
            mean = loss.detach().clone()
            torch.distributed.all_reduce(mean)
            return mean / torch.distributed.get_world_size()

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
    model = _ddp_inside(model)
    notes = Notes(model.process_group, "adacons_hvd.ddp.attach()")
    try:
        check_timeout(timeout)
        chains = _chains(optimizer)
        optimizers = [each for chain in chains for each in chain]
        if grad_scaler is None:
            grad_scaler = next(filter(None, (getattr(each, "scaler", None) for each in optimizers)), None)
        settings = Settings.checked(
            Parameters(torch.is_tensor, id),
            hosts=True,
            aggregator=aggregator,
            schedule=schedule,
            granularity=granularity,
            grad_scaler=grad_scaler,
            check_replicas=check_replicas,
            may_differ=may_differ,
            workers=workers,
        )
        settings.check_members({id(p) for p in model.parameters()})
        _check(model, chains)
        if aggregator is not None:
            _check_hook(model)
        reducer = Reducer(model, optimizers, settings, notes)
    except Exception as error:
        notes.fail(error)
        raise
    notes.meet(timeout)
    reducer.agree()
    notes.clear()
    if aggregator is None:
        return
    end_after_messages()
    model.register_comm_hook(reducer, adacons_hook)
    reducer.watch()
    aggregate_before_unscaling()
    for *_, stepping in chains:
        check_steps(stepping, reducer)
    for each in optimizers:
        introduce(each, aggregator, reducer, _Save(reducer), _Load(reducer))


def gather_history(model: DistributedDataParallel) -> None:
    """Bring the mean gradients of earlier steps, which are spread over the ranks, to every rank.

    For an aggregator with a history, as ``Curvature``. All ranks call this before one of them saves the optimizer's
    ``state_dict()``, which then holds all of them until the next step. Without it a state holds this rank's part, and
    goes on where it was only if every rank saves and loads its own.
    """
    reducer = _reducer_of(model)
    if reducer is not None:
        reducer.gather_history()


def _reducer_of(model: DistributedDataParallel) -> Reducer | None:
    return next((state for _, state in model._comm_hooks if isinstance(state, Reducer)), None)


@functools.cache
def end_after_messages() -> None:
    """Let go of the interpreter for a moment before it ends.

    gloo's threads hold the tensors of the last messages until they get hold of the interpreter. Otherwise a script that
    ends right after its last backward is aborted about every third time, with DDP's own average as well as with ours
    (PyTorch 2.13, see pytorch/pytorch#179291).
    """
    atexit.register(time.sleep, 0.01)


def adacons_hook(state: Reducer, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Take a bucket from DDP, which calls this as soon as backward has filled it."""
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
            self.reducer.load_state_dict(ours)


def _chains(optimizer: Any) -> list[list[torch.optim.Optimizer]]:
    """For each optimizer, what :func:`unwrapped` finds in it."""
    if not isinstance(optimizer, (list, tuple)):
        return [unwrapped(optimizer)]
    if not optimizer:
        raise ValueError("optimizer is an empty list: give attach() the optimizers of the model's parameters")
    return [unwrapped(each) for each in optimizer]


def check_timeout(timeout: Any) -> None:
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout < float("inf"):
        raise ValueError(f"timeout must be a positive number of seconds, got {timeout!r}")


def unwrapped_model(model: Any) -> Any:
    """What ``torch.compile()`` and Lightning's Fabric were given: a DDP model, if there is one inside."""
    while not isinstance(model, DistributedDataParallel):
        around = (getattr(model, name, None) for name in ("_orig_mod", "_forward_module"))
        inner = next((each for each in around if isinstance(each, torch.nn.Module)), None)
        if inner is None:
            break
        model = inner
    return model


def _ddp_inside(model: Any) -> DistributedDataParallel:
    model = unwrapped_model(model)
    if isinstance(model, DistributedDataParallel):
        return model
    if isinstance(model, torch.nn.Module) and any(map(_is_sharded, model.parameters())):
        raise TypeError(
            f"{type(model).__name__} has DTensor parameters, as fully_shard() and tensor parallelism make them: every "
            "rank holds another part, so there are no gradients of the same thing to aggregate; attach() takes a "
            "DistributedDataParallel of whole parameters, and adacons_hvd.fsdp.attach() what fully_shard() made"
        )
    raise TypeError(
        f"model must be a DistributedDataParallel, got {type(model).__name__}: wrap the module first; trainers do so "
        "when several processes were started, for example by torchrun"
    )


def _is_sharded(parameter: torch.Tensor) -> bool:
    # Without importing DTensor, which takes long and which hardly anybody uses.
    return hasattr(parameter, "device_mesh")


def _check(model: DistributedDataParallel, chains: Sequence[Sequence[torch.optim.Optimizer]]) -> None:
    sharded = [name for p, name in looked_after(model).items() if _is_sharded(p)]
    if sharded:
        raise TypeError(
            f"parameter {sharded[0]} is a DTensor, as fully_shard() and tensor parallelism make them, and "
            "DistributedDataParallel has no whole gradient of it to aggregate"
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
    if any(hasattr(optimizer, "report") for chain in chains for optimizer in chain):
        raise ValueError(
            "this optimizer has an aggregator already. For several models under one optimizer, "
            "wrap them together: DistributedDataParallel(torch.nn.ModuleList(...))"
        )
    ours = {id(p) for p in model.parameters()}
    for *_, optimizer in chains:
        if not any(id(p) in ours for group in optimizer.param_groups for p in group["params"]):
            raise ValueError("the optimizer has none of the model's parameters; was it made for another model?")


def _check_hook(model: DistributedDataParallel) -> None:
    # A copied model has hooks in its list that are not in effect.
    if "comm_hook" in model._get_ddp_logging_data():
        raise RuntimeError(
            "this model has a communication hook already, perhaps from an earlier attach(), and "
            "DistributedDataParallel takes only one. Wrap the module anew to attach another"
        )
