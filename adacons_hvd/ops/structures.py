"""What holds tensors: dictionaries, tuples and dataclasses. Taken apart and put together, for any framework.

``kind`` is the class of the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from .protocol import Tensor

__all__ = ["described", "rebuilt", "tensors_in"]


def tensors_in(value: Any, kind: type) -> Iterator[Tensor]:
    """The tensors in a value, in order."""
    if isinstance(value, kind):
        yield value
    for part in _parts(value) or ():
        yield from tensors_in(part, kind)


def rebuilt(value: Any, kind: type, tensors: Iterator[Tensor]) -> Any:
    """The value with these tensors in the place of its own."""
    if isinstance(value, kind):
        return next(tensors)
    parts = _parts(value)
    if parts is None:
        return value
    parts = [rebuilt(part, kind, tensors) for part in parts]
    if isinstance(value, dict):
        return dict(zip(value, parts, strict=True))
    return tuple(parts) if isinstance(value, tuple) else type(value)(*parts)


def described(value: Any, kind: type, describe: Callable[[Tensor], Hashable]) -> Any:
    """All of a value, with descriptions in the place of its tensors."""
    if isinstance(value, kind):
        return describe(value)
    parts = _parts(value)
    if parts is None:
        return value
    names = tuple(value) if isinstance(value, dict) else ()
    return type(value), names, tuple(described(part, kind, describe) for part in parts)


def _parts(value: Any) -> list[Any] | None:
    """What is in a dictionary, a tuple or a dataclass; None of anything else."""
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, tuple):
        return list(value)
    if is_dataclass(value):
        return [getattr(value, field.name) for field in fields(value)]
    return None
