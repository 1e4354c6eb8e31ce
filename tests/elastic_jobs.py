"""Elastic jobs that tell all they do, and what all they did is held against the oracle.

`run` starts one of the jobs in `tests/conformance`, whose workers tell their gradients, what became of them, and their
parameters, step by step (`Course` in `harness/elastic.py`). `check` and `check_commits` go through what was told.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import oracle

JOBS = Path(__file__).with_name("conformance")


def run(cluster, job, folder, hosts, sizes, *, deaths=(), changes=(), seconds=180, **more):
    """A job whose number of workers goes through `sizes`; see `Course` for `deaths`, and `more` is the job's own.

    `changes` are the hosts after 3 steps of each stage, None for no change.
    """
    plan = {"sizes": sizes, "deaths": list(deaths), **more}
    with cluster.elastic(JOBS / f"{job}.py", folder, hosts=hosts, args=[json.dumps(plan)]) as running:
        for stage, new_hosts in enumerate(changes):
            if new_hosts is None:
                continue
            running.wait_until(lambda told: done_in(told, stage) >= 3 * sizes[stage], seconds)  # noqa: B023
            running.hosts = new_hosts
        result = running.result(seconds)
    assert result.exit_code == 0, result
    assert sum("end" in fact for fact in result.told) == sizes[-1], result
    check_commits(result.told)
    return result.told


def done_in(told, stage):
    """How many steps the workers have done in this stage, all together."""
    return sum("done" in fact and fact["stage"] == stage for fact in told)


def a_worker_comes_the_leader_dies_and_another_leaves(cluster, job, folder, **more):
    """Two workers, a third, SIGKILL for rank 0 between commits in the middle of a step, and a host less."""
    hosts = {"localhost": 1, "127.0.0.1": 1}
    changes = [{**hosts, "127.1": 1}, None, {"127.1": 1}]
    return run(cluster, job, folder, hosts, SIZES, deaths=[[1, 5, 0, 3, "backward"]], changes=changes, **more)


#: The numbers of workers in that job.
SIZES = [2, 3, 2, 1]


def check(told, sizes, parts, tolerance=1e-9):
    """Hold each part of the model against its oracle; returns how many steps were begun and had to be done again.

    `parts` say how each is aggregated: "average", "momentum" or "no momentum" of AdaCons, or by a "history".
    """
    begun, done = {}, {}
    for fact in told:
        for kind, steps in (("begun", begun), ("done", done)):
            if kind in fact:
                steps.setdefault((fact["stage"], fact[kind]), {})[fact["rank"]] = fact
    sizes_told = {stage: set() for stage, _ in begun}
    for (stage, _), facts in done.items():
        sizes_told[stage] |= {fact["size"] for fact in facts.values()}
    assert sizes_told == {stage: {size} for stage, size in enumerate(sizes)}
    memories = {0: [None] * len(parts)}  # by step: what the oracles remember after it
    redone = 0
    for (stage, step), facts in sorted(begun.items()):
        redone += (stage + 1, step) in begun
        finished = done.get((stage, step), {})
        if not finished:
            assert (stage + 1, step) in begun, f"step {step} was lost"
            continue
        assert len(finished) == sizes[stage] or (stage + 1, step) in begun, f"step {step} was not done by all"
        assert len({fact["bits"] for fact in finished.values()}) == 1, f"parameters differ after step {step}"
        counted = None if "average" in parts else step
        assert {fact["steps"] for fact in finished.values()} == {counted}, f"the report on step {step} counts others"
        memories[step] = []
        for number, (part, memory) in enumerate(zip(parts, memories[step - 1], strict=True)):
            raw = [np.array(facts[rank]["raw"][number]) for rank in range(sizes[stage])]
            expected, remembered = judged(part, memory, raw)
            memories[step].append(remembered)
            for fact in finished.values():
                off = oracle.error([fact["found"][number]], [expected])
                assert off < tolerance, f"stage {stage}, step {step}, part {number}: off by {off:.1e}"
    return redone


def judged(part, memory, raw):
    """The oracle's result, given what it remembers of the step before, and what it remembers then."""
    if part == "average":
        return sum(raw) / len(raw), None
    if part == "history":
        curvature = oracle.CurvatureOracle(memory=4)
        curvature.means = list(memory or [])
        return curvature(raw), curvature.means
    adacons = oracle.Oracle(0.9 if part == "momentum" else 0.0)
    adacons.m = None if memory is None else resampled(memory, len(raw))
    return adacons(raw), adacons.m


def resampled(curve, workers):
    """The momentum's curve, for another number of workers."""
    return list(np.interp(np.linspace(0, len(curve) - 1, workers), range(len(curve)), curve))


def check_commits(told):
    """Whoever begins a stage begins it with what was committed last."""
    committed = {}
    for fact in told:
        if "committing" in fact:
            committed[fact["committing"]] = fact["bits"]
        elif fact.get("enter"):
            assert fact["enter"] == max(committed)
            assert fact["bits"] == committed[fact["enter"]]
    stages = [fact["enter"] for fact in told if "enter" in fact]
    assert stages == sorted(stages)
