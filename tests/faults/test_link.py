"""The network between two hosts fails, for a while or for good."""

from __future__ import annotations

import json
import time
from pathlib import Path

import network
import pytest

JOB = Path(__file__).with_name("job.py")

pytestmark = pytest.mark.skipif(network.unavailable() is not None, reason=str(network.unavailable()))


@pytest.mark.parametrize("launcher", ["gloo", "mpi"])
def test_a_link_that_comes_back_costs_time_and_nothing_else(tmp_path, launcher):
    with network.Network(2, tmp_path) as hosts:
        plan = json.dumps({"steps": 40, "pause": 0.03})
        hosts.start(launcher, JOB, [plan], {"HOROVOD_GLOO_TIMEOUT_SECONDS": "60"})
        hosts.wait_for(0, "step 5 ", 60)
        hosts.link(1, "down")
        done = hosts.printed(0).count("step ")
        time.sleep(2)
        assert hosts.printed(0).count("step ") <= done + 1, "the link was not cut"
        hosts.link(1, "up")
        assert not any(hosts.wait(60))
        ends = {hosts.printed(rank).partition("finished ")[2] for rank in (0, 1)}
        assert len(ends) == 1
        assert ends.pop().strip()


def test_a_link_that_stays_cut_ends_the_job_on_both_sides(tmp_path):
    with network.Network(2, tmp_path) as hosts:
        hosts.start("gloo", JOB, [json.dumps({"steps": 2000, "pause": 0.03})], {"HOROVOD_GLOO_TIMEOUT_SECONDS": "5"})
        hosts.wait_for(0, "step 5 ", 60)
        hosts.link(1, "down")
        cut = time.monotonic()
        assert all(hosts.wait(30))
        assert time.monotonic() - cut < 20
        for rank in (0, 1):
            error = hosts.printed(rank, "err")
            assert "HorovodInternalError" in error
            assert "Timed out waiting 5000ms" in error
