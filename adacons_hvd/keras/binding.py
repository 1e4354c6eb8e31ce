"""What makes an optimizer a distributed one, whichever Keras it is of. No Keras is imported here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..aggregators import Aggregator
from .backends import backend_of

__all__ = ["Binding", "Distributed", "StateHolder", "distributed_class", "distributed_part", "make_binding"]


class Binding:
    """What an optimizer needs to aggregate. A plain object, so that Keras tracks none of it."""

    def __init__(
        self,
        backend: Any,
        settings: Any,
        passes: int,
        average_passes: bool,
        scale_local: bool,
        local: Iterable[Any] = (),
    ) -> None:
        if passes <= 0:
            raise ValueError(f"backward_passes_per_step must be positive, got {passes!r}")
        self.backend = backend
        self.settings = settings
        self.passes = passes
        self.average_passes = average_passes
        self.scale_local = scale_local
        self.local = set(local)
        self.exchange = backend.make_exchange(settings)
        #: The variables Keras is about to update; set while it does.
        self.variables: Sequence[Any] = ()

    def again(self) -> Binding:
        """The same settings for another optimizer."""
        return Binding(self.backend, self.settings, self.passes, self.average_passes, self.scale_local, self.local)

    def reduce(self, gradients: Sequence[Any], variables: Sequence[Any], unscale: Any = 1.0) -> list[Any]:
        """Everyone's gradients, except for local variables."""
        gradients = list(gradients)
        shared = [i for i, v in enumerate(variables) if self.backend.key_of(v) not in self.local]
        for i in set(range(len(gradients))) - set(shared):
            gradients[i] = self.backend.local_gradient(gradients[i], self.settings.process_set, self.scale_local)
        if shared:
            mine = [gradients[i] for i in shared]
            theirs = self.exchange.reduce(mine, [variables[i] for i in shared], unscale)
            for i, gradient in zip(shared, theirs, strict=True):
                gradients[i] = gradient
        return gradients

    def accumulate(
        self,
        gradients: Sequence[Any],
        variables: Sequence[Any],
        apply: Callable[[list[Any]], Any],
        skip: Callable[[], Any],
    ) -> None:
        """Call ``apply`` with the gradients of ``backward_passes_per_step`` steps, or else ``skip``."""

        def finish(sums: list[Any]) -> None:
            if self.average_passes:
                sums = [g if g is None else g / self.passes for g in sums]
            apply(sums)

        self.exchange.accumulate(gradients, variables, self.passes, finish, skip)


def make_binding(
    *,
    num_groups: int,
    groups: Any,
    backward_passes_per_step: int,
    average_aggregated_gradients: bool,
    scale_local_gradients: bool,
    backend: str,
    **settings: Any,
) -> Binding:
    """A binding from the arguments of ``DistributedOptimizer``."""
    module = backend_of(backend)
    return Binding(
        module,
        module.checked_settings(groups=module.checked_groups(groups, num_groups), **settings),
        backward_passes_per_step,
        average_aggregated_gradients,
        scale_local_gradients,
    )


class Distributed:
    """What is added to an optimizer's class. Never instantiated itself."""

    _adacons: Binding

    @property
    def aggregator(self) -> Aggregator | None:
        found: Aggregator | None = self._adacons.settings.aggregator
        return found

    @property
    def process_set(self) -> Any:
        return self._adacons.settings.process_set

    @property
    def report(self) -> Any:
        """A :class:`adacons_hvd.report.Report` on the last step, or None."""
        return self._adacons.exchange.report

    def register_local_var(self, variable: Any) -> None:
        """Keep the gradient of this variable each rank's own."""
        self._adacons.local.add(self._adacons.backend.key_of(variable))


def distributed_class(mixin: type, base: type, from_config: Callable[..., Any]) -> type:
    """The class of a distributed optimizer: ``base`` with ``mixin`` before it."""
    return type(
        base.__name__,
        (mixin, base),
        {
            "__module__": base.__module__,
            "from_config": classmethod(from_config),
            # Keras writes an object's __class__ into files. Were it not the class that was wrapped,
            # what is saved could not be loaded without this package. type() still tells.
            "__class__": property(lambda self: base),
        },
    )


def distributed_part(optimizer: Any) -> Any:
    """The distributed optimizer that this is, or that is within it; None if there is none."""
    while optimizer is not None and not issubclass(type(optimizer), Distributed):
        optimizer = getattr(optimizer, "inner_optimizer", None)
    return optimizer


class StateHolder:
    """What the aggregator remembers, in the form in which both Kerases save attributes of optimizers.

    It has its own place in a file, beside the optimizer's variables. An optimizer without it looks
    for no such place, so the file loads without this package, too.
    """

    def __init__(self, exchange: Any) -> None:
        super().__init__()
        self._exchange = exchange

    def save_own_variables(self, store: Any) -> None:
        import numpy as np

        for name, value in self._exchange.state_dict().items():
            store[name] = np.asarray(value)

    def load_own_variables(self, store: Any) -> None:
        state: Mapping[str, Any] = {name: store[name][()] for name in list(store.keys())}
        if "version" in state:
            self._exchange.load_state_dict(state)
