"""The parts of the Keras binding that need PyTorch, for Keras 3 with ``KERAS_BACKEND=torch``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import horovod.torch as hvd
import keras
import torch
from horovod.torch import ProcessSet

from ..aggregators import Mean
from ..engine.memory import State
from ..engine.replicas import raise_stray_step
from ..engine.session import canonical_names
from ..engine.settings import Parameters, Settings, check_members
from ..torch.numbering import numbering
from ..torch.reducer import Reducer

NAME = "torch"

#: Has ``torch.compile`` leave a function as it is: inside a compiled step, what ranks do is not what was written.
untraced = torch.compiler.disable


#: PyTorch has no checkpoints that find attributes by themselves.
StateBase: type = object

#: None that Horovod does not raise as its own.
COLLECTIVE_ERRORS: tuple[type[Exception], ...] = ()

#: Nothing remembers something beside an optimizer.
OTHER_MEMORIES: Sequence[Any] = ()


class _Parameters:
    """The parameters, in the form in which a reducer asks an optimizer for them."""

    def __init__(self) -> None:
        self.param_groups: list[dict[str, list[torch.Tensor]]] = [{"params": []}]


class _Exchange:
    """PyTorch's reducer, for an optimizer that is handed its gradients.

    It sends nothing during backward: Keras says only in ``apply`` which gradients it means.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._parameters = _Parameters()
        self._reducer: Reducer | None = None
        self._loaded: Mapping[str, Any] | None = None
        self._count = 0
        self._sums: dict[int, torch.Tensor] = {}
        self._number: int | None = None

    @property
    def report(self) -> Any:
        return None if self._reducer is None else self._reducer.report

    @torch.no_grad()
    def reduce(self, gradients: Sequence[Any], variables: Sequence[Any], unscale: Any = 1.0) -> list[Any]:
        if not self.settings.process_set.included():
            return list(gradients)
        parameters, reducer = [v.value for v in variables], self._reducer_for(variables)
        kept = [p.grad for p in parameters]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.detach().clone()
        reducer.synchronize(unscale)
        results = [p.grad for p in parameters]
        for parameter, gradient in zip(parameters, kept, strict=True):
            parameter.grad = gradient
        return results

    def _reducer_for(self, variables: Sequence[Any]) -> Reducer:
        parameters = [v.value for v in variables]
        self._parameters.param_groups[0]["params"] = parameters
        if self._reducer is None:
            if not isinstance(self.settings.granularity, str):
                # Later some may be frozen. What is frozen now may be trained later.
                named = [each for group in self.settings.granularity for each in group]
                trained = [each for each in named if each.parameter is not None and each.parameter.value.requires_grad]
                check_members("granularity", trained, set(map(id, parameters)))
            names = dict(zip(parameters, canonical_names([v.path for v in variables]), strict=True))
            self._reducer = Reducer(self._parameters, names, 1, self.settings)  # type: ignore[arg-type]
            if self._loaded is not None:
                self._reducer.state.load_state_dict(self._loaded)
        return self._reducer

    def stray(self, how: str, variables: Sequence[Any]) -> None:
        """Tell the other ranks of a step along gradients that were never aggregated, and raise the error on all."""
        reducer = self._reducer_for(variables)
        raise_stray_step(lambda: reducer.stray(how), self.settings.process_set.rank(), how)

    def everywhere(self, condition: Any) -> Any:
        """Whether a condition holds on every worker."""
        if not self.settings.process_set.included():
            return condition
        if self._number is None:
            self._number = numbering.take(self.settings.process_set.process_set_id)
        against = torch.as_tensor(condition).logical_not().to(torch.int32).reshape(1)
        total = hvd.allreduce(
            against, op=hvd.Sum, name=f"adacons.{self._number}.everywhere", process_set=self.settings.process_set
        )
        return (total == 0)[0]

    def accumulate(
        self,
        gradients: Sequence[Any],
        variables: Sequence[Any],
        passes: int,
        apply: Callable[[list[Any]], Any],
        skip: Callable[[], Any],
    ) -> None:
        """Add gradients up; call ``apply`` with their sums every ``passes`` times, else ``skip``."""
        for gradient, variable in zip(gradients, variables, strict=True):
            if gradient is not None:
                key, gradient = id(variable), gradient.detach()
                self._sums[key] = self._sums[key] + gradient if key in self._sums else gradient.clone()
        self._count += 1
        if self._count < passes:
            skip()
            return
        sums, self._sums, self._count = self._sums, {}, 0
        apply([sums.get(id(variable)) for variable in variables])

    def state_dict(self) -> dict[str, Any]:
        if self._reducer is not None:
            state = self._reducer.state.state_dict()
        else:
            state = State().state_dict() if self._loaded is None else dict(self._loaded)
        return {name: value.cpu().numpy() if torch.is_tensor(value) else value for name, value in state.items()}

    def gather_history(self) -> None:
        """Hold the mean gradients of earlier steps of all ranks, until the next step. All ranks call this together."""
        if self._reducer is not None:
            self._reducer.gather_history()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        numbers = ("version", "workers")
        self._loaded = {
            name: int(value) if name in numbers else torch.as_tensor(value, dtype=torch.float64)
            for name, value in state.items()
        }
        if self._reducer is not None:
            self._reducer.state.load_state_dict(self._loaded)
            self._reducer.renew()

    def reset(self) -> None:
        """Workers have come or gone: number afresh, and begin a sum that all begin."""
        self._number = None
        self._count, self._sums = 0, {}
        if self._reducer is not None:
            self._reducer.reset()


def make_exchange(settings: Settings) -> _Exchange:
    return _Exchange(settings)


# --- arguments ----------------------------------------------------------------------------------


def checked_settings(**given: Any) -> Settings:
    """The settings, or an error that names the argument and the value."""
    if given["op"] != hvd.Average:
        raise ValueError(f"with Keras on PyTorch, op must be Average, got {given['op']!r}")
    settings = Settings.checked(VARIABLES, hvd, **{**given, "device_dense": "", "device_sparse": "", "overlap": False})
    return replace(settings, aggregator=settings.aggregator or Mean())


#: By the tensors that they hold, which is what the reducer sees.
VARIABLES = Parameters(lambda thing: isinstance(thing, keras.Variable), lambda variable: id(variable.value))


start_over = numbering.restart


def native(variable: Any) -> Any:
    return variable


def key_of(variable: Any) -> int:
    return id(variable)


def decoded(error: Exception) -> Exception | None:
    """Errors are what they are on PyTorch."""
    return None


def is_aggregated_elsewhere(variables: Sequence[Any]) -> bool:
    """Never: PyTorch has no tapes."""
    return False


def local_gradient(gradient: Any, process_set: ProcessSet, scale: bool) -> Any:
    """A local variable's gradient, made as long as its share of an average would be."""
    if gradient is None or not scale or not process_set.included():
        return gradient
    return gradient / process_set.size()


# --- the callbacks' needs -------------------------------------------------------------------------


def broadcast_variables(variables: Sequence[Any], root_rank: int, process_set: Any = hvd.global_process_set) -> None:
    """Give every worker the values of ``root_rank``."""
    handles = [
        hvd.broadcast_async_(v.value.data, root_rank, name=f"adacons.broadcast.{i}", process_set=process_set)
        for i, v in enumerate(variables)
    ]
    for handle in handles:
        hvd.synchronize(handle)


def average(values: Sequence[float]) -> list[float]:
    """The mean over all workers."""
    mean = hvd.allreduce(torch.tensor(list(values), dtype=torch.float64), op=hvd.Average, name="adacons.metrics")
    result: list[float] = mean.tolist()
    return result


def broadcast_object(value: Any, root_rank: int, name: str) -> Any:
    return hvd.broadcast_object(value, root_rank, name=name)


def copy_of(variable: Any) -> Any:
    return variable.value.detach().clone()


def assign(variable: Any, value: Any) -> None:
    variable.assign(value)
