"""All of ``horovod.torch.elastic``, for optimizers with an aggregator and without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
from horovod.common.elastic import run_fn
from horovod.torch.elastic import ElasticSampler, sampler, state
from horovod.torch.elastic.state import ModelStateHandler, OptimizerStateHandler

from .broadcasting import broadcast_optimizer_state, broadcast_parameters
from .numbering import init

__all__ = ["ElasticSampler", "TorchState", "run", "sampler", "state"]


class TorchState(hvd.elastic.TorchState):  # type: ignore[misc]
    """Horovod's. What an aggregator remembers is committed, restored and shared like the rest.

    What ``sync()`` gives a worker also counts as committed there. Otherwise a worker that has just
    joined, and leads the job because others have failed before its first commit, would go back to
    the state it was started with, and take everybody there.
    """

    def __init__(self, model: Any = None, optimizer: Any = None, **kwargs: Any) -> None:
        super().__init__(model, optimizer, **kwargs)
        for name, handler in self._handlers.items():
            ours = {OptimizerStateHandler: _OptimizerHandler, ModelStateHandler: _ModelHandler}.get(type(handler))
            if ours is not None:
                self._handlers[name] = ours(handler.value)

    def sync(self) -> None:
        super().sync()
        self.save()


class _OptimizerHandler(OptimizerStateHandler):  # type: ignore[misc]
    def save(self) -> None:
        # All ranks commit together. What only one of them held would be lost with it.
        getattr(self.value, "gather_history", lambda: None)()
        super().save()

    def sync(self) -> None:
        broadcast_optimizer_state(self.value, root_rank=0)


class _ModelHandler(ModelStateHandler):  # type: ignore[misc]
    def sync(self) -> None:
        broadcast_parameters(self.value.state_dict(), root_rank=0)


def run(func: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate an elastic training function; its first argument is the state, as in Horovod."""
    wrapped: Callable[..., Any] = run_fn(func, _reset)
    return wrapped


def _reset() -> None:
    hvd.shutdown()
    init()
