"""The units of a sharded model: the modules given to ``fully_shard``, as far as aggregation needs to know them.

PyTorch has no public way to ask a unit for its parameters or its process group, so what is read of its insides is
read here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["Unit", "units_of"]

#: Called with a unit's number, the shard to fill, the whole gradient of this rank, and the process group.
Reduce = Callable[[int, torch.Tensor, torch.Tensor, dist.ProcessGroup], None]


class _ReduceScatter:
    """What FSDP calls in place of its reduce-scatter, for one unit."""

    def __init__(self, number: int, reduce: Reduce) -> None:
        self._number = number
        self._reduce = reduce

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Make room for what is sent or received."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Fill this rank's shard of the aggregate. ``op`` is how FSDP would have combined gradients."""
        self._reduce(self._number, output_tensor, input_tensor, group)


class Unit:
    """One module given to ``fully_shard``, or several that were given together."""

    def __init__(self, name: str, module: Any, insides: Any) -> None:
        self.name = name
        self._module = module
        self._insides = insides
        self.device: torch.device = insides.device
        self._scatter: _ReduceScatter | None = None

    @property
    def parameters(self) -> list[torch.Tensor]:
        """Its sharded parameters, as the model has them."""
        places = [each._module_info for each in self._insides.fsdp_params]
        return [getattr(place.module, place.param_name) for place in places]

    @property
    def mesh(self) -> Any:
        """The ranks that its parameters live on; None where they are no DTensors."""
        return getattr(self.parameters[0], "device_mesh", None)

    @property
    def shards(self) -> dist.ProcessGroup | None:
        """The ranks among which its parameters are sharded; None if they are not."""
        group: dist.ProcessGroup | None = getattr(self._insides.mesh_info, "shard_process_group", None)
        return group

    @property
    def replicas(self) -> dist.ProcessGroup | None:
        """The ranks that hold the same shard (HSDP); None if no other rank does."""
        group: dist.ProcessGroup | None = getattr(self._insides.mesh_info, "replicate_process_group", None)
        return group

    @property
    def divides(self) -> float | None:
        """The factor of ``set_gradient_divide_factor()``."""
        factor: float | None = self._insides.gradient_divide_factor
        return factor

    @property
    def is_custom(self) -> bool:
        """Whether something has taken the place of FSDP's own reduce-scatter."""
        return type(self._insides._reduce_scatter_comm).__name__ != "DefaultReduceScatter"

    def take_over(self, number: int, reduce: Reduce) -> None:
        """Have ``reduce`` called in place of FSDP's reduce-scatter, with gradients as backward has left them."""
        self._scatter = _ReduceScatter(number, reduce)
        self._module.set_custom_reduce_scatter(self._scatter)
        # FSDP would divide before or after it, by the number of ranks or by roots of it.
        self._module.set_gradient_divide_factor(1.0)
        self._module.set_force_sum_reduction_for_comms(True)

    @property
    def is_taken_over(self) -> bool:
        """Whether that still holds."""
        return self._insides._reduce_scatter_comm is self._scatter and self.divides == 1.0


def units_of(model: torch.nn.Module) -> list[Unit]:
    """The model's units, in the order of its modules; those without parameters of their own are none."""
    from torch.distributed.fsdp import FSDPModule

    found: dict[int, Unit] = {}
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            insides = module._get_fsdp_state()._fsdp_param_group
            if insides is not None and id(insides) not in found:
                # As it is called without torch.compile(), so that either can go on from the other's checkpoint.
                plain = ".".join(part for part in name.split(".") if part != "_orig_mod")
                found[id(insides)] = Unit(plain or "(root)", module, insides)
    return list(found.values())
