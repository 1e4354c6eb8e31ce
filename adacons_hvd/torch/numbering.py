"""The numbers of PyTorch's optimizers over Horovod, which are part of the names of their collectives."""

from __future__ import annotations

from typing import Any

import horovod.torch as hvd

from ..engine.session import Numbering

__all__ = ["init", "numbering"]

numbering = Numbering()


def init(*args: Any, **kwargs: Any) -> None:
    """Horovod's ``init``, after which optimizers are numbered afresh."""
    again = hvd.is_initialized()
    hvd.init(*args, **kwargs)
    if not again:
        numbering.restart()
