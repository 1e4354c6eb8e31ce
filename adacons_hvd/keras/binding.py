"""The parts of a distributed optimizer that do not depend on which Keras it is of. No Keras is imported here."""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from ..aggregators import Aggregator
from ..engine.replicas import stray_step
from ..engine.settings import Settings, check_count, groups_or_number, parameter_lists
from .backends import Backend, backend_of

__all__ = [
    "Binding",
    "Distributed",
    "DistributedWithin",
    "StateHolder",
    "become",
    "binding_of",
    "check_step",
    "distributed_part",
    "make_binding",
    "mark_saved",
]


class Binding:
    """An optimizer's part in the aggregation. A plain object, so that Keras tracks none of it."""

    def __init__(
        self,
        backend: Backend,
        settings: Settings,
        passes: int,
        average_passes: bool,
        scale_local: bool,
        local: Iterable[Any] = (),
        different: Iterable[Any] = (),
    ) -> None:
        self.backend = backend
        self.settings = settings
        self.passes = passes
        self.average_passes = average_passes
        self.scale_local = scale_local
        #: The keys of variables whose gradients are each rank's own, and of others that are meant to differ.
        self.local = set(local)
        self.different = set(different)
        self.exchange = backend.make_exchange(settings)
        #: The variables Keras is about to update; set while it does.
        self.variables: Sequence[Any] = ()
        #: Whether the distributed optimizer is taking a step, so that gradients are about to be aggregated or were.
        self.stepping = False

    @property
    def trains_alone(self) -> bool:
        """Whether this rank is not meant to agree with any other."""
        process_set = self.settings.process_set
        return not process_set.included() or process_set.size() == 1

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step of the distributed optimizer, within which the plain ones that it is made of may take theirs."""
        before, self.stepping = self.stepping, True
        try:
            yield
        finally:
            self.stepping = before

    def stray(self, how: str, variables: Sequence[Any]) -> NoReturn:
        """Raise the error for a step along gradients that were never aggregated, on this rank and on all others."""
        self.exchange.stray(how, [v for v in variables if not self._is_local(v)])
        raise AssertionError("stray() raises an error")

    def again(self) -> Binding:
        """The same settings for another optimizer."""
        return Binding(
            self.backend,
            self.settings,
            self.passes,
            self.average_passes,
            self.scale_local,
            self.local,
            self.different,
        )

    def reduce(self, gradients: Sequence[Any], variables: Sequence[Any], unscale: Any = 1.0) -> list[Any]:
        """Everyone's gradients, except for local variables."""
        gradients = list(gradients)
        _claim(self, variables)
        shared = [i for i, v in enumerate(variables) if not self._is_local(v)]
        for i in set(range(len(gradients))) - set(shared):
            gradients[i] = self.backend.local_gradient(gradients[i], self.settings.process_set, self.scale_local)
        if shared:
            mine = [gradients[i] for i in shared]
            theirs = self.exchange.reduce(mine, [variables[i] for i in shared], unscale)
            for i, gradient in zip(shared, theirs, strict=True):
                gradients[i] = gradient
        return gradients

    def _is_local(self, variable: Any) -> bool:
        return self.backend.key_of(variable) in self.local

    def accumulate(
        self,
        gradients: Sequence[Any],
        variables: Sequence[Any],
        apply: Callable[[list[Any]], Any],
        skip: Callable[[], Any],
    ) -> None:
        """Call ``apply`` with the gradients of ``backward_passes_per_step`` steps, or else ``skip``."""

        self.exchange.accumulate(gradients, variables, self.passes, lambda sums: apply(self._of_passes(sums)), skip)

    def accumulated(self, gradients: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
        """Every ``backward_passes_per_step`` steps everyone's gradients of all these steps, else their sums so far."""

        def finish(sums: list[Any]) -> list[Any]:
            return self.reduce(self._of_passes(sums), variables)

        exchange: Any = self.exchange  # of TensorFlow, since this is for Keras 2
        found: list[Any] = exchange.accumulated(gradients, variables, self.passes, finish)
        return found

    def _of_passes(self, sums: list[Any]) -> list[Any]:
        return [g if g is None else g / self.passes for g in sums] if self.average_passes else sums

    # Copied with the optimizer it is of, it is for another optimizer.

    def __copy__(self) -> Binding:
        return self.again()

    def __deepcopy__(self, memo: Any) -> Binding:
        return self.again()

    def __reduce__(self) -> Any:
        settings = {field.name: getattr(self.settings, field.name) for field in dataclasses.fields(self.settings)}
        named = [name for name in ("granularity", "groups") if not isinstance(settings[name], (str, int, type(None)))]
        named += ["may_differ"] if self.different else []
        named += ["register_local_var()"] if self.local else []
        if named:
            raise TypeError(
                f"this distributed optimizer cannot be pickled, because {named[0]} names variables of this process. "
                "Pickle its get_config(), or save its model, and distribute it anew"
            )
        process_set = settings.pop("process_set")
        if process_set.process_set_id != 0:
            settings["process_set"] = process_set
        return _binding_unpickled, (self.backend.NAME, settings, self.passes, self.average_passes, self.scale_local)


def _binding_unpickled(backend: str, settings: dict[str, Any], *arguments: Any) -> Binding:
    module = backend_of(backend)
    settings.setdefault("process_set", module.hvd.global_process_set)
    return Binding(module, Settings(**settings), *arguments)


def make_binding(
    *,
    num_groups: int,
    groups: Any,
    backward_passes_per_step: int,
    average_aggregated_gradients: bool,
    scale_local_gradients: bool,
    may_differ: Any,
    backend: str,
    **settings: Any,
) -> Binding:
    """A binding from the arguments of ``DistributedOptimizer``."""
    module = backend_of(backend)
    check_count("backward_passes_per_step", backward_passes_per_step)
    groups = groups_or_number(groups, num_groups)
    (different,) = parameter_lists("may_differ", [may_differ], module.VARIABLES)
    return Binding(
        module,
        module.checked_settings(groups=groups, may_differ=different, **settings),
        backward_passes_per_step,
        average_aggregated_gradients,
        scale_local_gradients,
        different=map(module.key_of, different),
    )


class _Returned:
    """The attributes of what ``DistributedOptimizer`` returns, and its copies, which are distributed, too."""

    _adacons: Binding
    _adacons_wrap: Callable[[Any, Binding], Any]

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

    def gather_history(self) -> None:
        """Bring the mean gradients of earlier steps, which are spread over the ranks, to every rank.

        For an aggregator with a history, as ``Curvature``. All ranks call this before one of them saves the model, and
        the file then holds all of them. Without it a file holds this rank's part, and training goes on where it was
        only if every rank saves and loads its own.
        """
        self._adacons.exchange.gather_history()

    def register_local_var(self, variable: Any) -> None:
        """Keep the gradient of this variable each rank's own."""
        self._adacons.local.add(self._adacons.backend.key_of(variable))

    # As Keras 3 copies optimizers: the configuration, and not the state.

    def __copy__(self) -> Any:
        return self.from_config(self.get_config())

    def __deepcopy__(self, memo: Any) -> Any:
        return self.from_config(self.get_config())

    def __reduce__(self) -> Any:
        return _optimizer_unpickled, (self._adacons_wrap, self.__class__, self.get_config(), self._adacons)

    # Keras's own, as far as they are used here.
    from_config: Any
    get_config: Any


def _optimizer_unpickled(
    wrap: Callable[[Any, Binding], Any], base: Any, config: dict[str, Any], binding: Binding
) -> Any:
    return _wrapped_once(base.from_config(config), binding, wrap)


def _wrapped_once(optimizer: Any, binding: Binding, wrap: Callable[[Any, Binding], Any]) -> Any:
    return optimizer if distributed_part(optimizer) is not None else wrap(optimizer, binding)


class Distributed(_Returned):
    """The base of all that is added to an optimizer's class. Never instantiated itself."""


class DistributedWithin(_Returned):
    """The base of all that is added to the class of an optimizer around a distributed one. Never instantiated."""

    inner_optimizer: Any

    @property
    def _adacons(self) -> Binding:  # type: ignore[override]
        binding = binding_of(self.inner_optimizer)
        assert binding is not None
        return binding


def become(optimizer: Any, mixin: type, binding: Binding, wrap: Callable[[Any, Binding], Any]) -> None:
    """Put ``mixin`` before the optimizer's class; ``wrap`` does so to another.

    The optimizer stays the same object, so whatever else knows it, a model or a callback, cannot step around the
    aggregation; and variables it has built and state it has gathered all stay.
    """
    base = type(optimizer)

    def from_config(cls: type, config: dict[str, Any], custom_objects: Any = None) -> Any:
        plain = base.from_config(config) if custom_objects is None else base.from_config(config, custom_objects)
        return _wrapped_once(plain, binding.again(), wrap)

    _forget_saved(optimizer)
    cls = type(
        base.__name__,
        (mixin, base),
        {
            "__module__": base.__module__,
            "from_config": classmethod(from_config),
            "_adacons_wrap": staticmethod(wrap),
            # Keras writes an object's __class__ into files. Were it not the class that was wrapped,
            # what is saved could not be loaded without this package. type() still tells.
            "__class__": property(lambda self: base),
        },
    )
    object.__setattr__(optimizer, "__class__", cls)


def distributed_part(optimizer: Any) -> Any:
    """The distributed optimizer that this is, or that is within it; None if there is none."""
    while optimizer is not None and not issubclass(type(optimizer), Distributed):
        optimizer = getattr(optimizer, "inner_optimizer", None)
    return optimizer


def binding_of(optimizer: Any) -> Binding | None:
    """The binding of the distributed optimizer that this is, or that is within it; None if there is none."""
    part = distributed_part(optimizer)
    return None if part is None else part._adacons


class StateHolder:
    """The aggregator's memory, in the form in which both Kerases save attributes of optimizers.

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


# --- steps along gradients that were never aggregated ---------------------------------------------
#
# Every step of an optimizer of Keras comes past check_step(), whichever way it was reached. A step is fine if a
# distributed optimizer is taking it, with what it has just aggregated. It is an error, on all ranks, if it goes around
# the distributed optimizer it is of, or if a plain optimizer takes it for variables that a distributed one trains.
#
# Of other variables a plain optimizer may take steps, since a rank may well train a model of its own. But it is warned
# of once, because it may as well have been forgotten.

#: The mark of a plain optimizer that was saved as a distributed one, among its attributes.
_SAVED = "_adacons_saved"
#: The mark of a plain optimizer that was warned of.
_WARNED = "_adacons_warned"

# Which distributed optimizer trains a variable; None if variables of this kind are each rank's own.
_owners: dict[Hashable, weakref.ref[Binding] | None] = {}


def _claim(binding: Binding, variables: Sequence[Any]) -> None:
    """Note that a distributed optimizer trains these variables, and which of them are each rank's own all the same."""
    key_of, reference = binding.backend.key_of, weakref.ref(binding)
    own = binding.local | binding.different
    for variable in variables:
        key = key_of(variable)
        if key not in _owners:
            weakref.finalize(binding.backend.native(variable), _owners.pop, key, None)
        _owners[key] = None if key in own else reference


def check_step(backend: Backend, optimizer: Any, binding: Binding | None, variables: Sequence[Any]) -> None:
    """Raise an error if this step's gradients were never aggregated, and had to be.

    ``binding`` is that of the optimizer, if it is a distributed one.
    """
    hvd = backend.hvd
    if not hvd.is_initialized() or hvd.size() == 1:
        return
    if binding is not None:
        if not binding.stepping and not binding.trains_alone:
            binding.stray(
                f"something called the step of {type(optimizer).__name__} instead of the distributed optimizer's own",
                variables,
            )
        return
    found = [_owners[key] for key in map(backend.key_of, variables) if key in _owners]
    owners = [owner() for owner in found if owner is not None]
    if any(owner is not None and (owner.stepping or owner.trains_alone) for owner in owners):
        return
    if backend.is_aggregated_elsewhere(variables):
        return
    name = type(optimizer).__name__
    if owners:
        how = f"{name}, an optimizer that is not distributed, was used for variables of the distributed one"
        for owner in owners:
            if owner is not None:
                owner.stray(how, variables)
        raise stray_step([hvd.rank()], how)
    if _SAVED in vars(optimizer):
        raise stray_step(
            [hvd.rank()],
            f"{name} was a distributed optimizer when its model was saved, and is none since Keras has loaded it. "
            "Load the model with load_model of adacons_hvd, or pass its optimizer to DistributedOptimizer; where this "
            "rank is meant to train alone, compile the model with a new optimizer",
        )
    if not found and _WARNED not in vars(optimizer):
        vars(optimizer)[_WARNED] = True
        warnings.warn(
            f"{name} is not distributed, so its steps use gradients of rank {hvd.rank()} alone. If this model is meant "
            "to be trained by all ranks together, pass the optimizer to DistributedOptimizer",
            stacklevel=2,
        )


def mark_saved(optimizer: Any) -> None:
    """Note that this plain optimizer was a distributed one when it was saved."""
    vars(optimizer)[_SAVED] = True


def _forget_saved(optimizer: Any) -> None:
    """This optimizer is about to be distributed again."""
    vars(optimizer).pop(_SAVED, None)
