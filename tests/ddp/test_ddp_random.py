"""Random jobs of DDP agree with the oracle; see `tests/pytorch/test_torch_random.py`."""

from __future__ import annotations

import pytest
import random_cases


@pytest.mark.ranks(3, launcher="torchrun")
@pytest.mark.time_limit(180)
def test_random_jobs(cluster):
    random_cases.agree_with_the_oracle(cluster, 30.0, "random_ddp")
