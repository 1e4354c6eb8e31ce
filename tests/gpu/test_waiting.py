"""No step waits for the GPU, as far as a machine without one can tell: whole steps on tensors without content.

Tensors on PyTorch's device "meta" have shapes and no values. Whatever needs a value on the host, or takes one from
there to the device, shows. `test_gpu_*.py` ask a real GPU the same question.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from adacons_hvd import AdaCons
from adacons_hvd.collectives import Pending, ready
from adacons_hvd.schedules import SCHEDULES, DenseBucket, Segment, Step


class Numbers(TorchFunctionMode):
    """Refuses to bring Python's numbers to the device: a copy that the host waits for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and result.device.type != "cpu":
            raise AssertionError(f"{func.__name__}() on the device")
        return result


class Devices(TorchDispatchMode):
    """Refuses operations between host and device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in (*args, result) if isinstance(t, torch.Tensor)}
        if len(devices) > 1:
            raise AssertionError(f"{func} between {' and '.join(sorted(devices))}")
        return result


class Apart:
    """The messages of some workers that never arrive anywhere: each result has the shape it would have."""

    direct = None

    def __init__(self, size: int, may_begin_with_sums: bool) -> None:
        self.size, self.rank, self.may_begin_with_sums = size, size - 1, may_begin_with_sums

    def allreduce(
        self, tensor: Any, name: str, *, prescale: float = 1.0, postscale: float = 1.0, out: Any = None
    ) -> Pending:
        return ready(lambda: tensor if out is None else out)

    def allgather(self, tensor: Any, name: str, *, out: Any = None) -> Pending:
        return ready(lambda: tensor.new_empty(self.size * tensor.numel()) if out is None else out)

    def alltoall(self, tensor: Any, name: str, *, out: Any = None) -> Pending:
        return ready(lambda: torch.empty_like(tensor) if out is None else out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_step_brings_numbers_to_the_host_or_from_there(schedule, dtype):
    jobs = ((4, True, AdaCons()), (4, False, AdaCons()), (32, False, AdaCons(nonfinite="exclude")))
    for workers, may_begin_with_sums, aggregator in jobs:
        collectives: Any = Apart(workers, may_begin_with_sums)
        buffer = torch.zeros(1280, dtype=dtype, device="meta")
        segments = [Segment(0, 600, 0), Segment(600, 1280, 1)]
        bucket = DenseBucket("bucket", buffer, segments, SCHEDULES[schedule](collectives))
        step = Step(collectives, aggregator, 2, "step")
        scale = torch.ones((), dtype=torch.float64, device="meta")
        # The first step brings constants to the device once and for all.
        memory = step.run([bucket], {}, scale)[0].memory
        memory = step.run([bucket], memory, scale)[0].memory
        with Numbers(), Devices():
            step.run([bucket], memory, scale)


def test_the_watch_sees_what_waits():
    with Numbers(), Devices():
        x = torch.zeros(3, device="meta")
        with pytest.raises(AssertionError, match=r"tensor\(\) on the device"):
            torch.tensor([1.0], device="meta")
        with pytest.raises(AssertionError, match=r"_to_copy\.default between cpu and meta"):
            torch.zeros(3).to("meta")
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            x[0].item()
