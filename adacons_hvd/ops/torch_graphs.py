"""Many small operations on an NVIDIA GPU, recorded once and repeated by one launch; see :mod:`.torch`.

From statistics to weights there are a hundred operations on a few numbers each, and to launch one takes the host longer
than the GPU takes to do it. A CUDA graph of them is launched as a whole. What it reads and writes lies in the same
memory every time, so arguments are copied there, and results from there: two copies for each element type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any

import torch

from .structures import described, rebuilt, tensors_in

__all__ = ["Recorded"]


class Recorded:
    """A function of tensors, which is recorded when it is called for the second time in a row with arguments alike.

    Arguments and results may be tensors and what holds them: dictionaries, tuples and dataclasses. Arguments are alike
    if all but the tensors' values is equal. The function must depend on nothing else than them and the key, change
    nothing, and read no value of a tensor. Where tensors are on the host, it is called as it is.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._last: Hashable = None
        self._graph: _Graph | None = None

    def __call__(self, key: Hashable, *arguments: Any) -> Any:
        tensors = list(tensors_in(arguments, torch.Tensor))
        if not _can_record(tensors):
            return self._function(*arguments)
        alike = key, described(arguments, torch.Tensor, _description)
        if alike != self._last:
            self._last, self._graph = alike, None
            return self._function(*arguments)
        if self._graph is None:
            self._graph = _Graph(self._function, arguments, tensors)
        return self._graph.replay(tensors)


def _can_record(tensors: list[torch.Tensor]) -> bool:
    device = tensors[0].device
    if device.type != "cuda" or torch.version.hip or torch.cuda.is_current_stream_capturing():
        return False
    return all(tensor.device == device for tensor in tensors)


class _Graph:
    """The graph of a function, and the memory that it reads and writes."""

    def __init__(self, function: Callable[..., Any], arguments: Any, tensors: list[torch.Tensor]) -> None:
        self._arguments = [tensor.clone() for tensor in tensors]
        inside = rebuilt(arguments, torch.Tensor, iter(self._arguments))
        here = torch.cuda.current_stream(tensors[0].device)
        aside = torch.cuda.Stream(tensors[0].device)
        aside.wait_stream(here)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(aside):
            # What libraries set up when they are first used on a stream cannot be recorded.
            function(*inside)
            # Other threads, a communication library's among them, may do meanwhile what would end a recording here.
            self._graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._shape = function(*inside)
                self._results = list(tensors_in(self._shape, torch.Tensor))
                self._flat = {kind: torch.cat(some) for kind, some in _by_type(self._results).items()}
            finally:
                self._graph.capture_end()
        here.wait_stream(aside)

    def replay(self, tensors: list[torch.Tensor]) -> Any:
        """Return the function's result for arguments that hold these tensors."""
        known, new = _by_type(self._arguments, flat=False), _by_type(tensors, flat=False)
        for kind, targets in known.items():
            torch._foreach_copy_(targets, new[kind])
        self._graph.replay()
        found = {kind: iter(_split(flat.clone(), self._results)) for kind, flat in self._flat.items()}
        return rebuilt(self._shape, torch.Tensor, (next(found[tensor.dtype]) for tensor in self._results))


def _by_type(tensors: list[torch.Tensor], flat: bool = True) -> dict[torch.dtype, list[torch.Tensor]]:
    found: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.dtype, []).append(tensor.reshape(-1) if flat else tensor)
    return found


def _split(flat: torch.Tensor, like: list[torch.Tensor]) -> list[torch.Tensor]:
    """The pieces of a flat tensor in the shapes of those that are of its type."""
    shapes = [tensor.shape for tensor in like if tensor.dtype == flat.dtype]
    pieces = flat.split([math.prod(shape) for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def _description(tensor: torch.Tensor) -> Hashable:
    return tensor.shape, tensor.dtype, tensor.device
