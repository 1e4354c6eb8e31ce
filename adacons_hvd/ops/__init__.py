"""The tensor operations the mathematics needs, for whichever framework the tensor belongs to.

One small module per framework offers the same functions; :func:`ops_for` picks the module by the
tensor's type. A module is imported only once its framework has been, by the user: a tensor cannot
exist before. So this package never pulls in a framework, and supporting another one means adding
a file here, not touching the mathematics. There is no numpy in between, because a round trip
through the host would stall an accelerator on every step and cannot be traced into a graph.

Two kinds of functions live there, listed in :class:`Ops`:

* *small* operations on the statistics of N workers (``[..., N]``, always float64), which read
  like the array functions they are: ``sqrt``, ``where``, ``argsort``, ``take``, ... These exist for
  Python's own numbers, too (:mod:`.plain`), which are faster where there are few.
* *large* operations on gradients, the only ones whose speed matters: ``consensus``, ``gramian``,
  ``moments``, ``combine``, ... Each accumulates in float32 or wider and reads its operands from
  memory as few times as it can.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, cast

from . import plain as _plain
from .plain import Plain
from .protocol import Ops, SmallOps, Tensor

if TYPE_CHECKING:
    # So that mypy holds each module against the protocol.
    from . import tensorflow as _tensorflow
    from . import torch as _torch

    _implementations: tuple[Ops, ...] = (_torch, _tensorflow)
    _small: SmallOps = _plain

__all__ = ["Ops", "Plain", "Tensor", "as_plain", "ops_for"]

#: An angle whose multiples are spread over the circle: the source of signs that change every step.
TURN = 2.399963229728653

# Framework -> the name its tensors' classes carry in ``type(x).__module__``.
_FRAMEWORKS = ("torch", "tensorflow")

# Looked up for every operation, so what was found is kept. For plain numbers nobody asks for a large operation.
_known: dict[type, Ops] = {Plain: cast(Ops, _plain)}


def as_plain(tensor: Tensor) -> Plain:
    """The values of a tensor as Python's numbers. Waits for the device.

    >>> import torch
    >>> as_plain(torch.tensor([1.0, 2.0])).rows
    [[1.0, 2.0]]
    """
    if isinstance(tensor, Plain):
        return tensor
    ops = ops_for(tensor)
    return Plain.of(ops.to_list(tensor), ops.shape(tensor))


def ops_for(tensor: Tensor) -> Ops:
    """Return the operations module for ``tensor``'s framework.

    >>> import torch
    >>> ops_for(torch.ones(3)).shape(torch.ones(3))
    (3,)
    """
    known = _known.get(type(tensor))
    if known is not None:
        return known
    for name in _FRAMEWORKS:
        framework = sys.modules.get(name)
        if framework is None:
            continue
        ops = cast(Ops, importlib.import_module(f"{__name__}.{name}"))
        if ops.owns(tensor):
            return _known.setdefault(type(tensor), ops)
    raise TypeError(
        f"expected a PyTorch or TensorFlow tensor, got {type(tensor).__module__}."
        f"{type(tensor).__qualname__}; convert it first, for example with torch.as_tensor(...)"
    )
