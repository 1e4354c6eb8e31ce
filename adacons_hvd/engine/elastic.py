"""Horovod's elastic jobs: variables and what aggregators remember, committed, restored and shared.

Written once for all frameworks whose variables Horovod's own states cannot handle; a framework comes in as a
:class:`Library`. PyTorch's states are Horovod's own, see :mod:`adacons_hvd.torch.elastic`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from horovod.common.elastic import ObjectState, run_fn
from horovod.common.exceptions import HorovodInternalError

__all__ = ["Library", "make_run", "make_state", "share_memories", "share_variables"]


class Library(Protocol):
    """A module with what is needed of a framework, and of Horovod for it."""

    #: Horovod's module for the framework.
    hvd: Any
    #: The errors that the framework raises when a collective fails, beside Horovod's own. Not those for wrong
    #: arguments: those do not become right by doing the same once more.
    COLLECTIVE_ERRORS: tuple[type[Exception], ...]
    #: Whatever remembers something beside an optimizer, with ``gather_history``, ``state_dict`` and
    #: ``load_state_dict``.
    OTHER_MEMORIES: Sequence[Any]

    def broadcast_variables(self, variables: Sequence[Any], root_rank: int, process_set: Any = ...) -> None:
        """Give every worker the values of ``root_rank``."""
        ...

    def broadcast_object(self, value: Any, root_rank: int, name: str) -> Any: ...

    def copy_of(self, variable: Any) -> Any:
        """The value of a variable, which later assignments leave as it is."""
        ...

    def assign(self, variable: Any, value: Any) -> None: ...

    def start_over(self) -> None:
        """Agree anew and number from 0: after an elastic reset some ranks are new and know nothing yet."""
        ...


def make_state(library: Library) -> Any:
    """The base of elastic states for a framework."""
    hvd = library.hvd

    class State(ObjectState):  # type: ignore[misc]
        """Variables and what aggregators remember, to be committed, restored and shared."""

        def __init__(self, **kwargs: Any) -> None:
            self._restored = False
            self._save_values()
            super().__init__(bcast_object=hvd.broadcast_object, get_rank=hvd.rank, **kwargs)

        def save(self) -> None:
            for memory in self._memories():
                # All ranks commit together. What only one of them held would be lost with it.
                memory.gather_history()
            self._restored = False
            self._save_values()
            super().save()

        def restore(self) -> None:
            for variable, value in zip(self._kept_variables(), self._values, strict=False):
                library.assign(variable, value)
            self._load_states()
            self._restored = True
            super().restore()

        def sync(self) -> None:
            if self._restored:
                # Once more: a layout that was there keeps no more of a history than this rank's part.
                self._load_states()
            with _failures_known(library):
                share_variables(library, self._kept_variables(), 0)
                share_memories(library, self._memories(), 0)
                self._save_values()
                super().sync()

        def reset(self) -> None:
            """Workers have come or gone: agree anew. For Horovod's own ``run``; ours has done so."""
            library.start_over()
            super().reset()

        def _kept_variables(self) -> list[Any]:
            raise NotImplementedError

        def _memories(self) -> list[Any]:
            return list(library.OTHER_MEMORIES)

        def _load_states(self) -> None:
            for memory, state in zip(self._memories(), self._states, strict=True):
                memory.load_state_dict(state)

        def _save_values(self) -> None:
            self._values = [library.copy_of(variable) for variable in self._kept_variables()]
            self._states = [memory.state_dict() for memory in self._memories()]

    return State


def make_run(library: Library) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Horovod's ``elastic.run`` for a framework."""

    def reset() -> None:
        library.hvd.shutdown()
        library.hvd.init()
        library.start_over()

    def run(function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorate an elastic training function; its first argument is the state."""

        @functools.wraps(function)
        def attempt(state: Any, *args: Any, **kwargs: Any) -> Any:
            with _failures_known(library):
                return function(state, *args, **kwargs)

        wrapped: Callable[..., Any] = run_fn(attempt, reset)
        return wrapped

    return run


def share_variables(library: Library, variables: Sequence[Any], root_rank: int) -> None:
    """Give every rank the root's values; states of random number generators stay each rank's own."""
    library.broadcast_variables([variable for variable in variables if not _is_seed(variable)], root_rank)


def share_memories(library: Library, memories: Sequence[Any], root_rank: int) -> None:
    """Give every rank what the root's aggregators remember."""
    states = library.broadcast_object([memory.state_dict() for memory in memories], root_rank, "adacons.state")
    for memory, state in zip(memories, states, strict=True):
        memory.load_state_dict(state)


def _is_seed(variable: Any) -> bool:
    return "seed_generator" in str(getattr(variable, "path", getattr(variable, "name", "")))


@contextlib.contextmanager
def _failures_known(library: Library) -> Iterator[None]:
    """Raise what a failed collective raises as what Horovod takes for one, and nothing else.

    Horovod's own knows its collectives' failures by their names in TensorFlow's errors, and
    takes any other failure for a success.
    """
    try:
        yield
    except library.COLLECTIVE_ERRORS as error:
        if "Horovod" in str(error) or "adacons." in str(error):
            raise HorovodInternalError(error) from error
        raise
