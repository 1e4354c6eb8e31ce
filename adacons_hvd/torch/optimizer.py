"""``DistributedOptimizer``: Horovod's, with an aggregator."""

from __future__ import annotations

import functools
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import horovod.torch as hvd
import torch
from horovod.torch.compression import Compression
from horovod.torch.mpi_ops import ProcessSet, global_process_set
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .. import agreement
from ..aggregators import Aggregator, unpack_memory
from ..collectives.horovod_torch import HorovodTorch
from ..costs import Network
from ..engine.memory import STATE_KEY
from ..engine.protocol import Message, Verdict, decide
from ..engine.replicas import CHECK_REPLICAS
from ..engine.session import describe_average
from ..engine.settings import BUCKET_BYTES, Parameters, Settings, check_count, groups_or_number
from ..report import Report
from ..torch_amp import aggregate_before_unscaling, unscale
from .numbering import numbering
from .reducer import Reducer, exchange, reducer_of

__all__ = ["DistributedOptimizer"]


def DistributedOptimizer(  # noqa: N802 - Horovod's name
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.Tensor]] | None = None,
    compression: Any = Compression.none,
    backward_passes_per_step: int = 1,
    op: Any = hvd.Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: int | Sequence[Sequence[torch.Tensor]] | None = None,
    sparse_as_dense: bool = False,
    process_set: ProcessSet = global_process_set,
    *,
    aggregator: Aggregator | None = None,
    schedule: str | Network = "auto",
    granularity: str | Sequence[Sequence[torch.Tensor]] = "model",
    bucket_bytes: int = BUCKET_BYTES,
    overlap: bool = True,
    grad_scaler: Any = None,
    check_replicas: int = CHECK_REPLICAS,
    may_differ: Iterable[torch.Tensor] = (),
    workers: str = "rank",
) -> Any:
    """Wrap an optimizer so that its steps use the gradients of all workers.

    Without an ``aggregator`` this is ``horovod.torch.DistributedOptimizer``. With one, gradients
    are combined by it instead of being averaged, and the arguments in common mean what they mean
    there. The optimizer itself becomes the distributed one and is returned, so schedulers, scalers
    and trainers that were made for it go on working, in whichever order.

    Args:
        optimizer: the optimizer to wrap.
        named_parameters: as in Horovod, typically ``model.named_parameters()``.
        compression: ``Compression.fp16`` sends half-precision gradients. A compressor of your own
            is applied to every gradient and undone before it is sent, so that what it loses
            counts as lost; it does not shorten the messages.
        backward_passes_per_step: how many backward passes to wait for before sending. More do no
            harm beyond sending again; with fewer, sending waits for ``step()``.
        op: must stay Horovod's ``Average``, whose place the aggregator takes.
        gradient_predivide_factor: as in Horovod, for the sums that ``two-pass`` makes. Other
            schedules add on arrival, in float32, where there is nothing to protect.
        num_groups: Horovod's older name for an integer ``groups``.
        groups: which parameters travel together, as in Horovod: a number of groups, or lists of
            parameters. By default buckets of ``bucket_bytes``. This says nothing about weights;
            see ``granularity``.
        sparse_as_dense: as in Horovod.
        process_set: as in Horovod: the workers that share gradients.
        aggregator: for example ``AdaCons()``.
        schedule: how gradients move. ``"auto"`` takes the cheapest of ``"two-pass"``,
            ``"one-pass"`` and ``"gather"``, whose result is the same; ``"fast"`` may also take
            ``"half"`` or ``"sketch"``, whose weights are nearly so. Both measure what the cluster
            can do; a :class:`adacons_hvd.costs.Network` in their place gives figures to go by.
        granularity: which parameters share one weight per worker: ``"model"`` (all, as in the
            paper), ``"layer"`` (every tensor has its own), or lists of parameters (those in no
            list form one more group).
        bucket_bytes: how much gradient to collect before it is sent.
        overlap: whether to send during backward, rather than only in ``step()``.
        grad_scaler: the ``torch.amp.GradScaler`` in use, if any. The length of AdaCons' result
            under ``scale="unit"`` does not follow that of the gradients, so scaled gradients have
            to be known as such. ``scaler.step(optimizer)`` and ``scaler.unscale_(optimizer)`` tell by
            themselves; ``optimizer.synchronize()`` before them does not.
        check_replicas: every how many steps ranks compare their parameters, to notice one that has
            trained alone. 0 never.
        may_differ: parameters that are meant to differ between ranks, left out of that comparison.
        workers: ``"rank"``, or ``"host"`` for another method: gradients are averaged inside of each host, and
            the aggregator combines the hosts' averages, at the price of an average however many ranks a host has.
            ``report.choice.hosts`` then has the ranks of each worker.

    With a closure, ``step()`` returns the mean of the ranks' losses, and the optimizer decides by it.

    The returned optimizer has two more attributes: ``aggregator``, and ``report``, a
    :class:`adacons_hvd.report.Report` on the last step, or None.

    Start this with ``horovodrun -np 2 python script.py``:

    >>> import torch
    >>> import adacons_hvd.torch as hvd
    >>> from adacons_hvd import AdaCons
    >>> hvd.init()
    >>> model = torch.nn.Linear(3, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> optimizer = hvd.DistributedOptimizer(
    ...     optimizer, named_parameters=model.named_parameters(), aggregator=AdaCons()
    ... )
    >>> model(torch.ones(2, 3)).sum().backward()
    >>> optimizer.step()
    >>> optimizer.report.fallbacks
    0
    """
    _check_optimizer(optimizer)
    settings = Settings.checked(
        Parameters(torch.is_tensor, id),
        hvd,
        hosts=True,
        aggregator=aggregator,
        schedule=schedule,
        granularity=granularity,
        compression=compression,
        gradient_predivide_factor=gradient_predivide_factor,
        groups=groups_or_number(groups, num_groups),
        sparse_as_dense=sparse_as_dense,
        process_set=process_set,
        bucket_bytes=bucket_bytes,
        overlap=overlap,
        grad_scaler=grad_scaler,
        op=op,
        check_replicas=check_replicas,
        may_differ=may_differ,
        workers=workers,
    )
    if aggregator is None:
        return _plain(
            hvd.DistributedOptimizer(
                optimizer,
                named_parameters=named_parameters,
                compression=compression,
                backward_passes_per_step=backward_passes_per_step,
                op=op,
                gradient_predivide_factor=gradient_predivide_factor,
                num_groups=num_groups,
                groups=groups,
                sparse_as_dense=sparse_as_dense,
                process_set=process_set,
            ),
            process_set,
        )
    check_count("backward_passes_per_step", backward_passes_per_step)
    names = _names(optimizer, named_parameters)
    _check_parameters(optimizer, settings)
    return _distributed(optimizer, names, backward_passes_per_step, settings)


def _distributed(
    optimizer: torch.optim.Optimizer, names: Mapping[torch.Tensor, str], passes: int, settings: Settings
) -> Any:
    """Make the optimizer a distributed one.

    As in Horovod, its class becomes one derived from its own. Unlike there, it stays the same object: what else knows
    it, a scheduler or a trainer, then cannot step around the aggregation.
    """
    base = type(optimizer)
    distributed: Any = optimizer
    distributed.__class__ = type(base.__name__, (base,), {**_METHODS, "_base": base})
    # What others have put in place of the optimizer's own methods (schedulers and profilers do) stays in use, as what
    # is done once gradients are aggregated.
    distributed._replaced = {name: vars(optimizer).pop(name) for name in _CALLS_BASE if name in vars(optimizer)}
    if "step" in distributed._replaced:
        # Schedulers look for the mark that they have left on step().
        @functools.wraps(distributed._replaced["step"])
        def step(self: Any, closure: Callable[[], Any] | None = None) -> Any:
            return _Aggregating.step(self, closure)

        optimizer.step = types.MethodType(step, optimizer)  # type: ignore[method-assign]
    distributed._start(names, passes, settings)
    return distributed


class _Aggregating(torch.optim.Optimizer):
    """The base that is added to the optimizer's class. Never instantiated itself."""

    _base: type[torch.optim.Optimizer]
    _reducer: Reducer | None
    _replaced: dict[str, Callable[..., Any]]

    def _start(self, names: Mapping[torch.Tensor, str], passes: int, settings: Settings) -> None:
        self.aggregator = settings.aggregator
        self.process_set = settings.process_set
        self.backward_passes_per_step = passes
        self._synchronized = False
        self._should_synchronize = True
        #: Whether a loss scaler has had the gradients aggregated that step() is about to use.
        self._aggregated_for_scaler = False
        #: Whether the optimizer's own step may run now.
        self._may_step = False
        # A process outside the process set takes its steps alone.
        included = settings.process_set.included()
        self._reducer = Reducer(self, names, passes, settings) if included else None

    @property
    def report(self) -> Report | None:
        """A report on the last step; None before the first."""
        return None if self._reducer is None else self._reducer.report

    def set_backward_passes_per_step(self, passes: int) -> None:
        check_count("backward_passes_per_step", passes)
        self.backward_passes_per_step = passes
        if self._reducer is not None:
            self._reducer.set_passes(passes)

    def synchronize(self) -> None:
        """Replace the gradients by the aggregated ones; ``step()`` does it unless told not to."""
        if self._reducer is not None:
            self._reducer.synchronize()
        self._synchronized = True

    def gather_history(self) -> None:
        """Bring the mean gradients of earlier steps, which are spread over the ranks, to every rank.

        For an aggregator with a history, as ``Curvature``. All ranks call this before one of them saves
        ``state_dict()``, which then holds all of them until the next step. Without it a state holds this rank's part,
        and goes on where it was only if every rank saves and loads its own.
        """
        if self._reducer is not None:
            self._reducer.gather_history()

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Within this context ``step()`` uses the gradients as they are.

        To clip aggregated gradients, for example: ``synchronize()``, clip, then ``step()`` here.
        """
        self._should_synchronize = False
        try:
            yield
        finally:
            self._should_synchronize = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if not self._should_synchronize:
            self._synchronized = False
            return self._own_step(closure)
        if closure is not None:
            # The optimizer may evaluate the closure any number of times, and each time it leaves
            # gradients of this worker alone.
            result = self._own_step(lambda: self._synchronized_loss(closure))
            self._synchronized = False
            return result
        pending = self._reducer is not None and self._reducer.pending
        if self._aggregated_for_scaler and not pending:
            self._aggregated_for_scaler = False
            return self._own_step()
        if self._synchronized:
            warnings.warn(
                "step() after synchronize() aggregates the gradients a second time; "
                "call it inside `with optimizer.skip_synchronize():`",
                stacklevel=2,
            )
        self.synchronize()
        self._synchronized = False
        return self._own_step()

    def _own_step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The step that the optimizer would take without us."""
        step = self._replaced.get("step") or functools.partial(self._base.step, self)
        self._may_step = True
        try:
            return step(closure) if closure else step()
        finally:
            self._may_step = False

    def _synchronized_loss(self, closure: Callable[[], Any]) -> Any:
        """Evaluate a closure, aggregate its gradients, and return the mean of the ranks' losses.

        An optimizer that decides by the loss, as a line search does, must decide alike on all ranks.
        """
        with torch.enable_grad():
            loss = closure()
        if self._reducer is None:
            return loss
        tensor = torch.is_tensor(loss)
        number = loss.numel() == 1 and loss.is_floating_point() if tensor else isinstance(loss, (int, float))
        mean = self._reducer.synchronize(loss=float(loss.detach() if tensor else loss) if number else None)
        self._synchronized = True
        if mean is None or not number:
            return loss
        return torch.full_like(loss, mean, requires_grad=False) if tensor else mean

    def _adacons_unscaling(self, scaler: Any) -> None:
        """Aggregate the gradients that a loss scaler is about to unscale or to look at."""
        reducer = self._reducer
        if reducer is None or not self._should_synchronize:
            return
        given = reducer.settings.grad_scaler
        if given is not None and given is not scaler:
            raise ValueError(
                "this optimizer's gradients are unscaled by another GradScaler than the grad_scaler= it was given"
            )
        if self._synchronized:
            if given is None:
                raise RuntimeError(
                    "synchronize() has aggregated scaled gradients without knowing their scale. Give the "
                    "DistributedOptimizer grad_scaler=, or leave synchronize() out: the scaler calls it in time."
                )
            return
        reducer.synchronize(1.0 if given is not None else unscale(scaler, self.param_groups[0]["params"][0]))
        self._aggregated_for_scaler = True

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        if self._reducer is not None and self._reducer.pending:
            raise AssertionError(
                "zero_grad() was called after backward() and before step() or synchronize(), so "
                "gradients that are already on their way to other ranks would be lost here only. "
                "Call it before backward(), or after step(). If these gradients come from the loss of another "
                "model (a GAN's generator), freeze these parameters during that backward(): requires_grad_(False)."
            )
        self._aggregated_for_scaler = False
        self._own("zero_grad")(*args, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self._own("state_dict")()
        if self._reducer is not None:
            state[STATE_KEY] = self._reducer.state.state_dict()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state saved with or without an aggregator, by any number of workers."""
        state = dict(state_dict)
        ours = state.pop(STATE_KEY, None)
        if ours is not None:
            unpack_memory(ours)  # refuses what is no such state, before anything has changed
        self._own("load_state_dict")(state)
        self._synchronized = False
        self._should_synchronize = True
        self._aggregated_for_scaler = False
        if self._reducer is not None:
            self._reducer.renew()
            if ours is not None:
                self._reducer.state.load_state_dict(ours)

    def _own(self, name: str) -> Callable[..., Any]:
        """The optimizer's own method, or what was put in its place before it was distributed."""
        return self._replaced.get(name) or functools.partial(getattr(self._base, name), self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a distributed optimizer cannot be copied or pickled, since it is bound to its parameters and to the other "
            "ranks. Save its state_dict(), and load that into another optimizer that you have wrapped."
        )


#: The methods that call the optimizer's own of the same name.
_CALLS_BASE = ("step", "zero_grad", "state_dict", "load_state_dict")

# PyTorch wraps the step of every class once, for its hooks, and marks it so. The optimizer's own step is wrapped
# already; ours must not be, or hooks would run twice.
_Aggregating.step.hooked = True  # type: ignore[attr-defined]

_METHODS = {
    name: value
    for name, value in vars(_Aggregating).items()
    if name not in ("__dict__", "__weakref__", "__doc__", "__annotations__")
} | {
    # Horovod's broadcast_optimizer_state and elastic state recognise a distributed optimizer by
    # this, and then know not to call the distributed step() while initialising its state.
    "__module__": hvd.DistributedOptimizer.__module__,
}


# --- a step along gradients that were never aggregated ---------------------------------------------
#
# PyTorch calls these before and after the own step of every optimizer, whichever way it was reached.


@torch.compiler.disable
def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Refuse the own step of a distributed optimizer unless its gradients were aggregated."""
    reducer: Reducer | None = vars(optimizer).get("_reducer")
    if reducer is None:
        parameters = _parameters(optimizer)
        if "_reducer" not in vars(optimizer) and reducer_of(parameters) is not None:
            _versions[optimizer] = _version(parameters)
        return
    distributed: Any = optimizer
    if distributed._may_step or not distributed._should_synchronize:
        return
    if not reducer.pending and not any(p.grad is not None and p.grad.any() for p in _parameters(optimizer)):
        return  # as Horovod does to give an optimizer a state
    reducer.stray(
        f"something called {distributed._base.__name__}.step() instead of the distributed optimizer's step(), "
        "for example a step method that was kept from before the optimizer was wrapped"
    )


@torch.compiler.disable
def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Refuse the step of another optimizer for parameters whose gradients were not aggregated.

    After that step, not before: it may have been the step of an optimizer that calls the distributed one.
    """
    before = _versions.pop(optimizer, None)
    if before is None or before == _version(_parameters(optimizer)):
        return
    reducer = reducer_of(_parameters(optimizer))
    owner: Any = None if reducer is None else reducer.optimizer
    if reducer is not None and getattr(owner, "_should_synchronize", True):
        reducer.stray(
            f"{type(optimizer).__name__}, an optimizer that is not distributed, was used for parameters of the "
            "distributed one"
        )


# Of optimizers that are in the middle of a step: how often their parameters had been changed before it.
_versions: weakref.WeakKeyDictionary[torch.optim.Optimizer, int] = weakref.WeakKeyDictionary()


def _version(parameters: Iterable[torch.Tensor]) -> int:
    return sum(parameter._version for parameter in parameters)


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
aggregate_before_unscaling()


# --- Horovod's functions ----------------------------------------------------------------------------


def _plain(optimizer: torch.optim.Optimizer, process_set: ProcessSet) -> torch.optim.Optimizer:
    """Horovod's own optimizer, which at its first step tells other ranks that it is that.

    Otherwise a rank that was given no aggregator and one that was would wait for each other.
    """
    if not process_set.included():
        return optimizer
    step = optimizer.step
    told: int | None = None

    def telling_step(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        nonlocal told
        if told != numbering.generation:
            told = numbering.generation
            _tell_plain(process_set)
        return step(*args, **kwargs)

    # A bound method, because learning-rate schedulers look inside.
    optimizer.step = types.MethodType(telling_step, optimizer)  # type: ignore[method-assign]
    return optimizer


def _tell_plain(process_set: ProcessSet) -> None:
    collectives = HorovodTorch(process_set)
    name = f"adacons.{numbering.take(process_set.process_set_id)}"
    description = describe_average("Horovod's own reduction")
    mine = Message(digest=agreement.digest(description))
    if decide(mine, exchange(collectives, mine, name)).verdict is Verdict.DISAGREE:
        agreement.confirm(collectives, description, name)


# --- arguments ----------------------------------------------------------------------------------


def _names(
    optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, torch.Tensor]] | None
) -> dict[torch.Tensor, str]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if named is None:
        return {
            p: f"adacons.noname.{i}.{j}"
            for i, group in enumerate(optimizer.param_groups)
            for j, p in enumerate(group["params"])
        }
    named = list(named)
    if not all(isinstance(item, tuple) and len(item) == 2 for item in named):
        raise ValueError("named_parameters must be (name, parameter) pairs, as model.named_parameters() gives")
    seen: set[str] = set()
    for name, _ in named:
        if name in seen:
            raise ValueError(f"two of the named_parameters are called {name!r}")
        seen.add(name)
    names = {parameter: name for name, parameter in named}
    missing = sum(parameter not in names for parameter in parameters)
    if missing:
        raise ValueError(f"named_parameters lacks {missing} of the optimizer's {len(parameters)} parameters")
    return names


def _check_optimizer(optimizer: Any) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"DistributedOptimizer wraps a torch.optim.Optimizer, got {optimizer!r}")
    if hasattr(optimizer, "skip_synchronize"):
        raise ValueError("this optimizer is distributed already; its gradients would be aggregated twice")
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        inner = getattr(optimizer, "optimizer", None)
        if isinstance(inner, torch.optim.Optimizer):
            raise TypeError(
                f"{type(optimizer).__name__} only wraps another optimizer: wrap that one (its .optimizer) with "
                "DistributedOptimizer first, and then the result"
            )


def _check_parameters(optimizer: torch.optim.Optimizer, settings: Settings) -> None:
    """Refuse parameters that cannot be aggregated, and arguments that name others than there are."""
    parameters = _parameters(optimizer)
    sharded = next((p for p in parameters if type(p).__name__ == "DTensor" or hasattr(p, "device_mesh")), None)
    if sharded is not None:
        raise TypeError(
            f"a parameter of shape {tuple(sharded.shape)} is a DTensor, as fully_shard() and tensor parallelism make "
            "them: every rank holds another part of it, so there are no gradients of the same thing to aggregate. Wrap "
            "an optimizer of whole parameters."
        )
    known = set(map(id, parameters))
    settings.check_members(known)
