"""PyTorch's fully_shard() is held against what every binding must do, but for cases, of which it takes none."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import of_torch
import torch.distributed as dist
from cases import Options, no_options
from of_torch import Given
from torch.distributed.fsdp import fully_shard

import adacons_hvd.fsdp
from adacons_hvd import AdaCons

ARGUMENTS = {"aggregator", "grad_scaler"}
OPTIMIZERS = ("MomentumSGD", "Adam")
ROUNDING = 0.0
SAYS_WHO_LEADS = of_torch.SAYS_WHO_LEADS


class Training(of_torch.ModelTraining):
    """A training of one unit with these options. Ranks meet when it is made."""

    def __init__(self, options: Options = no_options, optimizer: str = "Adam") -> None:
        super().__init__(optimizer)
        mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
        self.model = fully_shard(Given(self.parameters), mesh=mesh)
        self.parameters = list(self.model.parameters())
        self.optimizer = self.plain(self.parameters)
        given = {"aggregator": AdaCons(momentum=0.9), **options(self.parameters)}
        adacons_hvd.fsdp.attach(self.model, self.optimizer, **given)

    def values(self) -> list[np.ndarray]:
        return [p.detach().full_tensor().numpy() for p in self.parameters]

    def save(self) -> dict[str, Any]:
        """A copy, with the memory of the only unit out of its text."""
        optimizer = copy.deepcopy(self.optimizer.state_dict())
        text = json.loads(optimizer["param_groups"][0].pop("adacons"))
        (memory,) = text.pop("units").values()
        memory = {name: np.array(value) for name, value in memory.items()}
        return {
            "values": [p.detach().clone() for p in self.parameters],
            "optimizer": optimizer,
            "memory": text | memory,
        }

    def with_memory(self, saved: dict[str, Any]) -> dict[str, Any]:
        state: dict[str, Any] = copy.deepcopy(saved["optimizer"])
        state["param_groups"][0].pop("adacons", None)  # which a plain optimizer keeps
        if saved["memory"]:
            memory = dict(saved["memory"])
            text = {name: memory.pop(name) for name in ("version", "workers") if name in memory}
            unit = {name: value.tolist() for name, value in memory.items()}
            state["param_groups"][0]["adacons"] = json.dumps({**text, "units": {"(root)": unit}})
        return state


STRAYS = {"along refused gradients": of_torch.REFUSED}
TELLS_HOW = True
#: No rank can stray alone.
OUTLIVES_A_RANK = False
#: Each rank holds a shard, and there are no replicas to compare.
FOUND = None
