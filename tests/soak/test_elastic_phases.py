"""A worker is killed in each phase of a step, one after the other, and the rest goes on from the last commit."""

from __future__ import annotations

import pytest
from elastic_jobs import check, run
from phases import PHASES


@pytest.mark.ranks(launcher="gloo")
def test_one_worker_less_for_every_phase(cluster, tmp_path):
    # So many names has this machine.
    hosts = dict.fromkeys(["localhost", "127.0.0.1", "127.1", "127.0.1", "0x7f.1", "2130706433"], 1)
    sizes = list(range(len(hosts), 0, -1))
    deaths = [[stage, 5, sizes[stage] - 1, sizes[stage], phase] for stage, phase in enumerate(PHASES)]
    told = run(cluster, "elastic_torch", tmp_path, hosts, sizes, deaths=deaths, schedule="one-pass", seconds=400)
    again = check(told, sizes, ["momentum", "history", "no momentum"])
    print(f"{len(deaths)} workers killed; {again} steps done again, none of them committed")
    assert again <= 2 * len(deaths)
