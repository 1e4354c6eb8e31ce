"""``DistributedOptimizer`` for Keras 2, which lives on as ``tf_keras``.

Its optimizers have a place for this: ``aggregate_gradients`` (``_aggregate_gradients`` in
``tf_keras.optimizers.legacy``), through which ``apply_gradients`` passes what it is given, and
``LossScaleOptimizer``, too, before it decides whether to leave a step out.

Loops written for Horovod aggregate elsewhere, in ``compute_gradients`` (or ``_compute_gradients``,
``get_gradients``), and give what it returns to ``apply_gradients``. That works as well: what was
aggregated there is not aggregated again.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tensorflow as tf
import tf_keras

from .backends import backend_of
from .binding import Binding, Distributed, DistributedWithin, StateHolder, become, check_step, distributed_part
from .models import keep_distributed, keep_distributed_within, save_state_in_h5, watch_steps

__all__ = ["wrap_legacy"]

_backend = backend_of("tensorflow")

Pairs = list[tuple[Any, Any]]


class _Aggregated:
    """The gradients that were aggregated outside of ``apply_gradients``, by ``compute_gradients`` or on its own."""

    def __init__(self) -> None:
        #: Whether some were that no step has used yet; and whether ``compute_gradients`` did it.
        self.waiting = False
        self.computed = False
        #: Whether that is done in a graph, in every step, without Python being told.
        self.in_graph = False
        self._gradients: list[weakref.ref[Any]] = []
        self._graph: weakref.ref[Any] | None = None

    @property
    def any(self) -> bool:
        """Whether gradients for the step at hand may have been aggregated."""
        return self.waiting or self.in_graph

    def note(self, gradients: Iterable[Any], computed: bool) -> None:
        """Gradients were just aggregated."""
        self.waiting, self.computed = True, computed
        self._gradients = [weakref.ref(gradient) for gradient in gradients if gradient is not None]
        self._graph = None if tf.executing_eagerly() else weakref.ref(tf.compat.v1.get_default_graph())
        self.in_graph = self.in_graph or self._graph is not None

    def forget(self) -> None:
        """A step has used them, or is about to use others."""
        self.waiting = False
        self._gradients = []

    def were_computed(self, gradients: Iterable[Any]) -> bool:
        """Whether ``compute_gradients`` returned these, or, inside of one graph, what these are made of."""
        if not (self.waiting and self.computed):
            return False
        if tf.executing_eagerly():
            known = {id(gradient) for reference in self._gradients if (gradient := reference()) is not None}
            return all(id(gradient) in known for gradient in gradients if gradient is not None)
        graph = tf.compat.v1.get_default_graph()
        while graph is not None and self._graph is not None:
            if graph is self._graph():
                return True
            graph = getattr(graph, "outer_graph", None)
        return False


class AggregationHelper:
    """The part of Horovod's object of this name that scripts look at, where ``backward_passes_per_step > 1``."""

    def __init__(self, binding: Binding) -> None:
        self._binding = binding
        self.backward_passes_per_step = binding.passes
        self.average_aggregated_gradients = binding.average_passes

    @property
    def counter(self) -> tf.Variable:
        """How many steps' gradients have been added up."""
        return self._binding.exchange.count  # type: ignore[attr-defined]


class _Computing:
    """Horovod's entrances, for the distributed optimizer and for a ``LossScaleOptimizer`` around it."""

    @property
    def _part(self) -> _Distributed:
        part: _Distributed = distributed_part(self)
        return part

    def minimize(self, *args: Any, **kwargs: Any) -> Any:
        with self._part._computing_alone():
            return super().minimize(*args, **kwargs)  # type: ignore[misc]

    def compute_gradients(self, loss: Any, var_list: Any, tape: Any = None) -> Pairs:
        """The aggregated gradients and their variables, for ``apply_gradients``, as in Horovod."""
        return self._compute_gradients(loss, var_list, tape=tape)

    def _compute_gradients(self, loss: Any, var_list: Any, grad_loss: Any = None, tape: Any = None) -> Pairs:
        base: Any = super()
        if hasattr(base, "_compute_gradients"):
            pairs = base._compute_gradients(loss, var_list, grad_loss, tape=tape)
        else:
            pairs = base.compute_gradients(loss, var_list, tape=tape)
        if self._part._adacons_computes_alone:
            return list(pairs)
        gradients, variables = _unzipped(pairs)
        return list(zip(self._allreduce(gradients, variables), variables, strict=True))

    def _allreduce(self, grads: Sequence[Any], vars: Sequence[Any]) -> list[Any]:
        """The aggregated gradients, for ``apply_gradients``; before ``backward_passes_per_step`` the sums so far."""
        binding = self._part._adacons
        gradients = binding.reduce(grads, vars) if binding.passes == 1 else binding.accumulated(grads, vars)
        self._part._adacons_aggregated.note(gradients, computed=True)
        return gradients

    @property
    def _agg_helper(self) -> AggregationHelper | None:
        binding = self._part._adacons
        return None if binding.passes == 1 else AggregationHelper(binding)


class _Distributed(_Computing, Distributed):
    """The base that is added to the class of an optimizer of Keras 2."""

    _adacons_aggregated: _Aggregated
    #: Whether ``compute_gradients`` is to leave it to ``apply_gradients`` to aggregate.
    _adacons_computes_alone: bool

    def aggregate_gradients(self, grads_and_vars: Iterable[tuple[Any, Any]]) -> Pairs:
        pairs = list(grads_and_vars)
        gradients, variables = _unzipped(pairs)
        if not pairs or self._adacons_aggregated.were_computed(gradients):
            return pairs
        gradients = self._adacons.reduce(gradients, variables)
        if not self._adacons.stepping:
            self._adacons_aggregated.note(gradients, computed=False)
        return list(zip(gradients, variables, strict=True))

    _aggregate_gradients = aggregate_gradients

    @_backend.untraced
    def apply_gradients(self, grads_and_vars: Iterable[tuple[Any, Any]], *args: Any, **kwargs: Any) -> Any:
        binding, before, pairs = self._adacons, self._adacons_aggregated, list(grads_and_vars)
        gradients, variables = _unzipped(pairs)
        told = self._is_told_not_to_aggregate(args, kwargs)
        computed = before.were_computed(gradients)
        if before.computed and not computed and before.any:
            # Something has been done to them since, or TensorFlow has made other objects of them.
            computed = told or (before.waiting and binding.passes > 1 and tf.executing_eagerly())
            if before.waiting and not computed:
                warnings.warn(
                    "these are not the gradients that compute_gradients() returned, so they are aggregated. If they "
                    "are made of those, alike on all ranks, tell apply_gradients() not to aggregate",
                    stacklevel=2,
                )
        if computed:
            args, kwargs = self._told_not_to_aggregate(args, kwargs)
        elif told:
            self._check_told(variables)
        before.forget()

        def apply(pairs: Pairs) -> Any:
            with binding.step():
                return super(_Distributed, self).apply_gradients(pairs, *args, **kwargs)  # type: ignore[misc]

        def skip() -> Any:
            return self.iterations.assign_add(1)

        if binding.passes == 1 or not pairs:
            return apply(pairs)
        with tf.init_scope():
            self._build_for(variables)
        if computed:
            # The count has just begun anew where they were aggregated.
            _either(tf.equal(binding.exchange.count, 0), lambda: apply(pairs), skip)  # type: ignore[attr-defined]
        else:
            binding.accumulate(gradients, variables, lambda sums: apply(list(zip(sums, variables, strict=True))), skip)
        return self._applied()

    def _check_told(self, variables: Sequence[Any]) -> None:
        """Refuse to take it for granted that gradients are aggregated, if nothing has aggregated any."""
        binding = self._adacons
        if self._adacons_aggregated.any or binding.trains_alone or _backend.is_aggregated_elsewhere(variables):
            return
        binding.stray("apply_gradients() was told not to aggregate gradients, and nothing else had", variables)

    @contextmanager
    def _computing_alone(self) -> Iterator[None]:
        """Have ``compute_gradients`` leave it to ``apply_gradients`` to aggregate."""
        before, self.__dict__["_adacons_computes_alone"] = self._adacons_computes_alone, True
        self._adacons_aggregated.forget()
        try:
            yield
        finally:
            self.__dict__["_adacons_computes_alone"] = before

    def _is_told_not_to_aggregate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether these arguments of ``apply_gradients`` say that gradients are aggregated already."""
        if not kwargs.get("experimental_aggregate_gradients", True):
            return True
        return bool(args[1] if len(args) > 1 else kwargs.get("skip_gradients_aggregation", False))

    def _told_not_to_aggregate(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments that say so."""
        return args[:1], {**kwargs, "skip_gradients_aggregation": True}

    def _build_for(self, variables: Sequence[Any]) -> None:
        self.build(variables)

    def _applied(self) -> Any:
        """The value that ``apply_gradients`` returns."""
        return self.iterations

    # Keras's own, as far as they are used here.
    build: Any
    iterations: Any


class _DistributedOlder(_Distributed):
    """The base for the class of one of ``tf_keras.optimizers.legacy``."""

    @_backend.untraced
    def get_gradients(self, loss: Any, params: Any) -> list[Any]:
        params = tf.nest.flatten(params)
        return self._allreduce(super().get_gradients(loss, params), params)  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # Keras copies all attributes. Ours are not to be copied, but made anew.
        for name in ("_adacons", "_adacons_aggregated", "adacons_state"):
            memo[id(self.__dict__[name])] = None
        plain = tf_keras.optimizers.legacy.Optimizer.__deepcopy__(self, memo)
        return wrap_legacy(plain, self._adacons.again())

    def _is_told_not_to_aggregate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return not (args[1] if len(args) > 1 else kwargs.get("experimental_aggregate_gradients", True))

    def _told_not_to_aggregate(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args[:1], {**kwargs, "experimental_aggregate_gradients": False}

    def _build_for(self, variables: Sequence[Any]) -> None:
        self._create_all_weights(variables)

    def _applied(self) -> Any:
        # In a graph an operation, which a LossScaleOptimizer has in the place of this if it leaves a step out.
        return self.iterations if tf.executing_eagerly() else tf.no_op()

    # Keras's own, as far as they are used here.
    _create_all_weights: Any


class _DistributedWithin(_Computing, DistributedWithin):
    """The base that is added to the class of a ``LossScaleOptimizer`` that was to be distributed."""


def _unzipped(pairs: Pairs) -> tuple[list[Any], list[Any]]:
    return [gradient for gradient, _ in pairs], [variable for _, variable in pairs]


def _either(condition: tf.Tensor, yes: Any, no: Any) -> None:
    def then(do: Any) -> Any:
        def branch() -> tf.Tensor:
            do()
            return tf.constant(0)

        return branch

    tf.cond(condition, then(yes), then(no))


def wrap_legacy(optimizer: Any, binding: Binding) -> Any:
    """Make an optimizer of ``tf_keras`` a distributed one."""
    if distributed_part(optimizer) is not None:
        raise ValueError("this optimizer is distributed already; its gradients would be aggregated twice")
    inner = getattr(optimizer, "inner_optimizer", None)
    if inner is not None:
        wrap_legacy(inner, binding)
        become(optimizer, _DistributedWithin, binding, wrap_legacy)
        return optimizer
    older = isinstance(optimizer, tf_keras.optimizers.legacy.Optimizer)
    become(optimizer, _DistributedOlder if older else _Distributed, binding, wrap_legacy)
    optimizer.__dict__.update(_adacons=binding, _adacons_aggregated=_Aggregated(), _adacons_computes_alone=False)
    state = _state_class()(binding.exchange)
    optimizer.adacons_state = state
    if older:
        # These do not track what is assigned to them.
        optimizer._track_trackable(state, "adacons_state", overwrite=True)
    return optimizer


@functools.cache
def _state_class() -> type:
    """The class of the aggregator's memory, as an attribute that Keras 2 and TensorFlow save.

    Keras 2 looks for such attributes among layers, metrics, optimizers and losses only; a loss is
    the one that needs nothing else.
    """

    def call(self: Any, y_true: Any, y_pred: Any) -> Any:
        raise NotImplementedError("this is no loss; it keeps an aggregator's state")

    return type("AggregatorState", (StateHolder, _backend.StateBase, tf_keras.losses.Loss), {"call": call})


# --- what Keras does with optimizers, distributed or not --------------------------------------------


def _check_steps(cls: Any, name: str, pairs_of: Any) -> None:
    original = getattr(cls, name)

    @functools.wraps(original)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        variables = [variable for _, variable in pairs_of(*args, **kwargs)]
        if issubclass(type(self), Distributed):
            # What goes around our apply_gradients comes through aggregate_gradients, unless it is told not to.
            if not self._adacons_aggregated.waiting:
                check_step(_backend, self, self._adacons, variables)
            self._adacons_aggregated.forget()
        else:
            check_step(_backend, self, None, variables)
        return original(self, *args, **kwargs)

    setattr(cls, name, step)


def _compute_alone_within(cls: Any, name: str) -> None:
    """Have a ``LossScaleOptimizer`` ask for unaggregated gradients: it aggregates when they are no longer scaled."""
    original = getattr(cls, name)

    @functools.wraps(original)
    def compute_gradients(self: Any, *args: Any, **kwargs: Any) -> Any:
        part = distributed_part(self)
        if part is None:
            return original(self, *args, **kwargs)
        with part._computing_alone():
            return original(self, *args, **kwargs)

    setattr(cls, name, compute_gradients)


_check_steps(tf_keras.optimizers.Optimizer, "_internal_apply_gradients", lambda pairs: pairs)
_check_steps(tf_keras.optimizers.legacy.Optimizer, "_distributed_apply", lambda strategy, pairs, **others: pairs)
# One for each kind of optimizers; each computes gradients under another name.
for _cls in tf_keras.mixed_precision.LossScaleOptimizer.__subclasses__():
    _compute_alone_within(_cls, "compute_gradients" if "compute_gradients" in vars(_cls) else "_compute_gradients")
    keep_distributed_within(_cls, wrap_legacy)
watch_steps(tf_keras)
keep_distributed(tf_keras, wrap_legacy)
save_state_in_h5(tf_keras)
