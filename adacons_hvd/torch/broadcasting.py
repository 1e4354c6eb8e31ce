"""Horovod's functions that make parameters and optimizers equal on all ranks, for whatever PyTorch trains.

Horovod's own refuse bfloat16, complex and channels-last tensors and the state of LBFGS, and give an optimizer without a
state one by a step along zero gradients, which moves parameters where there is weight decay. These move the tensors as
they are.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import horovod.torch as hvd
import torch
from horovod.torch.mpi_ops import ProcessSet, global_process_set

from .reducer import Reducer

__all__ = ["broadcast_optimizer_state", "broadcast_parameters"]


def broadcast_parameters(
    params: Mapping[str, Any] | Iterable[tuple[str, Any]], root_rank: int, process_set: ProcessSet = global_process_set
) -> None:
    """Give every rank the values of ``root_rank``, in place.

    Args:
        params: ``model.state_dict()`` or ``model.named_parameters()``; what is no tensor is left alone.
        root_rank: the rank whose values all get.
        process_set: as in Horovod.
    """
    if isinstance(params, Mapping):
        pairs = sorted(params.items())
    elif isinstance(params, (list, tuple)) or hasattr(params, "__next__"):
        pairs = [pair if isinstance(pair, tuple) else (str(i), pair) for i, pair in enumerate(params)]
    else:
        raise ValueError(
            f"broadcast_parameters() takes a state_dict() or named_parameters(), got {type(params).__name__}"
        )
    _broadcast([(name, value) for name, value in pairs if torch.is_tensor(value)], root_rank, process_set)


@torch.no_grad()
def _broadcast(pairs: Iterable[tuple[str, torch.Tensor]], root_rank: int, process_set: ProcessSet) -> None:
    sent = []
    for name, tensor in pairs:
        if not tensor.numel():
            continue
        # Bytes travel whatever the type, from memory that lies in order.
        packed = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
        ordered = packed.contiguous()
        data = ordered.view(-1).view(torch.uint8)
        handle = hvd.broadcast_async_(data, root_rank, name=f"adacons.broadcast.{name}", process_set=process_set)
        sent.append((handle, packed, ordered))
    for handle, packed, ordered in sent:
        hvd.synchronize(handle)
        if ordered is not packed:
            packed.copy_(ordered)


def broadcast_optimizer_state(
    optimizer: torch.optim.Optimizer, root_rank: int, model: torch.nn.Module | None = None
) -> None:
    """Give every rank the optimizer's state of ``root_rank``, the aggregator's memory included.

    On a process set without that rank, the aggregator's memory becomes that of the set's first. ``model`` is Horovod's
    argument and not needed.
    """
    reducer: Reducer | None = getattr(optimizer, "_reducer", None)
    # A distributed optimizer's own methods are those of the optimizer that it was.
    own = getattr(optimizer, "_own", functools.partial(getattr, optimizer))
    tensors: list[torch.Tensor] = []
    state = _taken_apart(own("state_dict")(), tensors)
    kinds = [(tensor.shape, tensor.dtype, tensor.device.type) for tensor in tensors]
    state, kinds = hvd.broadcast_object((state, kinds), root_rank, name="adacons.optimizer")
    if hvd.rank() != root_rank:
        devices = {p.device.type: p.device for group in optimizer.param_groups for p in group["params"]}
        tensors = [torch.empty(shape, dtype=dtype, device=devices.get(kind, kind)) for shape, dtype, kind in kinds]
    _broadcast([(f"optimizer.{i}", tensor) for i, tensor in enumerate(tensors)], root_rank, global_process_set)
    if hvd.rank() != root_rank:
        own("load_state_dict")(_put_together(state, tensors))
    process_set = getattr(optimizer, "process_set", global_process_set)
    if not process_set.included():
        return
    # A rank without an aggregator takes part too. It must not be here that others wait for it, but
    # in the first step, where it is found out.
    memory = None
    if reducer is not None:
        state = reducer.state.state_dict()
        memory = {name: value.cpu() if torch.is_tensor(value) else value for name, value in state.items()}
    root = root_rank if root_rank in process_set.ranks else process_set.ranks[0]
    memory = hvd.broadcast_object(memory, root, name="adacons.state", process_set=process_set)
    if reducer is not None and memory is not None:
        reducer.state.load_state_dict(memory)
        reducer.renew()


class _Place(NamedTuple):
    """Where in a state a tensor was."""

    number: int


def _taken_apart(value: Any, tensors: list[torch.Tensor]) -> Any:
    """A nested state with its tensors moved to a list."""
    if torch.is_tensor(value):
        tensors.append(value)
        return _Place(len(tensors) - 1)
    if isinstance(value, dict):
        return {key: _taken_apart(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_taken_apart(item, tensors) for item in value])
    return value


def _put_together(value: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """Undo :func:`_taken_apart`."""
    if isinstance(value, _Place):
        return tensors[value.number]
    if isinstance(value, dict):
        return {key: _put_together(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_put_together(item, tensors) for item in value])
    return value
