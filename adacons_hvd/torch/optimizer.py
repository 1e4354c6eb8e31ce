"""``DistributedOptimizer``: Horovod's, with an aggregator."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import horovod.torch as hvd
import torch
from horovod.torch.compression import Compression
from horovod.torch.mpi_ops import ProcessSet, global_process_set

from .. import __version__, agreement
from ..aggregators import Aggregator, unpack_memory
from ..binding import BUCKET_BYTES, STATE_KEY
from ..collectives.horovod_torch import HorovodTorch
from ..costs import Network
from ..engine.settings import check_aggregator, check_granularity, check_op, check_predivide, parameter_lists
from ..report import Report
from .numbering import generation, take_number
from .reducer import Flags, Reducer, Settings, exchange_flags

__all__ = ["DistributedOptimizer", "broadcast_optimizer_state"]


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
) -> Any:
    """Wrap an optimizer so that its steps use the gradients of all workers.

    Without an ``aggregator`` this is ``horovod.torch.DistributedOptimizer``. With one, gradients
    are combined by it instead of being averaged, and the arguments in common mean what they mean
    there. The wrapped optimizer must not be used any more; both share one state.

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
            parameters. By default parcels of ``bucket_bytes``. This says nothing about weights;
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
            to be known as such.

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
    if num_groups != 0:
        warnings.warn("num_groups has been replaced by groups", DeprecationWarning, stacklevel=2)
        groups = num_groups if groups is None else groups
    _check(aggregator, op, backward_passes_per_step, schedule, gradient_predivide_factor)
    names = _names(optimizer, named_parameters)
    settings = Settings(
        aggregator=aggregator,
        schedule=schedule,
        granularity=check_granularity(granularity, torch.is_tensor),
        compression=compression,
        gradient_predivide_factor=gradient_predivide_factor,
        groups=_checked_groups(groups),
        sparse_as_dense=sparse_as_dense,
        process_set=process_set,
        bucket_bytes=bucket_bytes,
        overlap=overlap,
        grad_scaler=grad_scaler,
    )
    # As in Horovod, the result is of a new class derived from the optimizer's own. Unlike there,
    # it takes over what the optimizer holds instead of being constructed anew, so attributes set
    # by its constructor, state it has gathered, and schedulers made for it all stay.
    base = type(optimizer)
    cls = type(base.__name__, (base,), {**_METHODS, "_base": base})
    wrapped: Any = object.__new__(cls)
    wrapped.__dict__.update(optimizer.__dict__)
    wrapped._start(names, backward_passes_per_step, settings)
    return wrapped


class _Aggregating(torch.optim.Optimizer):
    """What is added to the optimizer's class. Never instantiated itself."""

    _base: type[torch.optim.Optimizer]
    _reducer: Reducer | None

    def _start(self, names: Mapping[torch.Tensor, str], passes: int, settings: Settings) -> None:
        self.aggregator = settings.aggregator
        self.process_set = settings.process_set
        self.backward_passes_per_step = passes
        self._synchronized = False
        self._should_synchronize = True
        # A process outside the process set takes its steps alone.
        included = settings.process_set.included()
        self._reducer = Reducer(self, names, passes, settings) if included else None

    @property
    def report(self) -> Report | None:
        """What the last step did; None before the first."""
        return None if self._reducer is None else self._reducer.report

    def set_backward_passes_per_step(self, passes: int) -> None:
        self.backward_passes_per_step = passes
        if self._reducer is not None:
            self._reducer.set_passes(passes)

    def synchronize(self) -> None:
        """Replace the gradients by the aggregated ones; ``step()`` does it unless told not to."""
        if self._reducer is not None:
            self._reducer.synchronize()
        self._synchronized = True

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
            return self._base.step(self, closure) if closure else self._base.step(self)
        if closure is not None:
            # The optimizer may evaluate the closure any number of times, and each time it leaves
            # gradients of this worker alone.
            def synchronized_closure() -> Any:
                with torch.enable_grad():
                    loss = closure()
                self.synchronize()
                return loss

            result = self._base.step(self, synchronized_closure)
            self._synchronized = False
            return result
        if self._synchronized:
            warnings.warn(
                "step() after synchronize() aggregates the gradients a second time; "
                "call it inside `with optimizer.skip_synchronize():`",
                stacklevel=2,
            )
        self.synchronize()
        self._synchronized = False
        return self._base.step(self)

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        if self._reducer is not None and self._reducer.pending:
            raise AssertionError(
                "zero_grad() was called after backward() and before step() or synchronize(), so "
                "gradients that are already on their way to other ranks would be lost here only. "
                "Call it before backward(), or after step()."
            )
        self._base.zero_grad(self, *args, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        state = self._base.state_dict(self)
        if self._reducer is not None:
            state[STATE_KEY] = self._reducer.state.state_dict()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state saved with or without an aggregator, by any number of workers."""
        state = dict(state_dict)
        ours = state.pop(STATE_KEY, None)
        if ours is not None:
            unpack_memory(ours)  # refuses what is no such state, before anything has changed
        self._base.load_state_dict(self, state)
        self._synchronized = False
        self._should_synchronize = True
        if self._reducer is not None:
            self._reducer.renew()
            if ours is not None:
                self._reducer.state.load_state_dict(ours)


_METHODS = {
    name: value
    for name, value in vars(_Aggregating).items()
    if name not in ("__dict__", "__weakref__", "__doc__", "__annotations__")
} | {
    # Horovod's broadcast_optimizer_state and elastic state recognise a distributed optimizer by
    # this, and then know not to call the distributed step() while initialising its state.
    "__module__": hvd.DistributedOptimizer.__module__,
}


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
        if told != generation():
            told = generation()
            _tell_plain(process_set)
        return step(*args, **kwargs)

    # A bound method, because learning-rate schedulers look inside.
    optimizer.step = types.MethodType(telling_step, optimizer)  # type: ignore[method-assign]
    return optimizer


def _tell_plain(process_set: ProcessSet) -> None:
    collectives = HorovodTorch(process_set)
    name = f"adacons.{take_number(process_set)}"
    description = {"adacons_hvd": __version__, "aggregator": "None (Horovod's own reduction)"}
    mine = Flags(digest=agreement.digest(description))
    others = [flags for flags in exchange_flags(collectives, mine, name) if flags is not None]
    if any(flags.digest != mine.digest for flags in others):
        agreement.confirm(collectives, description, name)


def broadcast_optimizer_state(
    optimizer: torch.optim.Optimizer, root_rank: int, model: torch.nn.Module | None = None
) -> None:
    """Horovod's function, which also makes the aggregator's state that of ``root_rank``.

    On a process set without that rank it becomes that of the set's first.
    """
    with _parameters_stay(optimizer):
        hvd.broadcast_optimizer_state(optimizer, root_rank, model)
    process_set = getattr(optimizer, "process_set", global_process_set)
    if not process_set.included():
        return
    # A rank without an aggregator takes part too. It must not be here that others wait for it, but
    # in the first step, where it is found out.
    reducer: Reducer | None = getattr(optimizer, "_reducer", None)
    state = None if reducer is None else reducer.state_on_host()
    root = root_rank if root_rank in process_set.ranks else process_set.ranks[0]
    state = hvd.broadcast_object(state, root, name="adacons.state", process_set=process_set)
    if reducer is not None and state is not None:
        reducer.state.load_state_dict(state)
        reducer.renew()


@contextmanager
def _parameters_stay(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Undo what happens to parameters in here.

    Horovod gives an optimizer without a state one by a step along zero gradients. Where there is
    weight decay that moves the parameters; and in an elastic job, those of newcomers alone.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [] if optimizer.state_dict()["state"] else [p.detach().clone() for p in parameters]
    yield
    if kept:
        with torch.no_grad():
            torch._foreach_copy_(parameters, kept)


# --- arguments ----------------------------------------------------------------------------------


def _check(aggregator: Aggregator, op: Any, passes: int, schedule: str | Network, predivide: float) -> None:
    check_aggregator(aggregator, schedule)
    check_op(op, hvd)
    if passes <= 0:
        raise ValueError(f"backward_passes_per_step must be positive, got {passes!r}")
    check_predivide(predivide)


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


def _checked_groups(groups: Any) -> int | list[list[torch.Tensor]] | None:
    if groups is None:
        return None
    if isinstance(groups, int):
        if groups < 0:
            raise ValueError(f"groups must not be negative, got {groups}")
        return groups
    return parameter_lists("groups", groups, torch.is_tensor)
