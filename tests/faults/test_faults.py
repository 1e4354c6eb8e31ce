"""Jobs without elasticity in which a rank is killed, stopped or slow: they end everywhere, in time, and say why."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
from harness.launchers import ON_TORCH
from phases import PHASES

JOB = Path(__file__).with_name("job.py")
#: What launchers say of a rank that was killed: which it was, and how it ended.
KILLED = {
    "mpi": r"process rank 1 .* exited on signal 9",
    "gloo": r"Process 1 exit with status code 137",
    "torchrun": r"local_rank: 1 .*|exitcode  : -9",
}

pytestmark = [pytest.mark.ranks(2, launcher=("mpi", "gloo")), pytest.mark.time_limit(90)]


def run(cluster, **plan):
    return cluster.script(JOB, [json.dumps(plan)], forked=True)


def changes_nothing_but_the_time(cluster, **plan):
    """All ranks end with the same parameters, and so they do when nothing happens; how the job ended."""
    result = run(cluster, again=True, **plan)
    assert result.exit_code == 0, result
    assert f"{plan['phase']}: {plan['what']}" in result.stdout[1]
    ends = [re.findall(r"^finished (\w+)$", out, re.MULTILINE) for out in result.stdout]
    assert [len(end) for end in ends] == [2, 2], result
    assert len({bits for end in ends for bits in end}) == 1, result
    return result


def ends_everywhere(cluster, **plan):
    """A rank that is killed ends the job, and the launcher says which it was."""
    result = run(cluster, **plan)
    assert f"{plan['phase']}: kill" in result.stdout[1]
    assert result.exit_code != 0
    assert not any("finished" in out for out in result.stdout), result
    assert re.search(KILLED[cluster.launcher], result.log), result
    assert result.seconds < 45


class EveryBinding:
    """Something happens to a rank while the other one has begun the step, or waits in it."""

    binding: str
    phase = "between steps"

    def test_a_rank_that_is_killed_ends_the_job_everywhere(self, cluster):
        ends_everywhere(cluster, binding=self.binding, phase=self.phase)

    def test_a_rank_that_is_stopped_for_a_while_changes_nothing_but_the_time(self, cluster):
        """By SIGSTOP, and two seconds later SIGCONT."""
        plan = {"binding": self.binding, "phase": self.phase, "what": "pause"}
        result = changes_nothing_but_the_time(cluster, **plan)
        times = [float(t) for t in re.findall(r"^step \d+ at ([\d.]+)$", result.stdout[0], re.MULTILINE)]
        assert max(after - before for before, after in itertools.pairwise(times[2:6])) > 1.5


class TestPyTorch(EveryBinding):
    binding = "with_torch"
    phase = "first collective"


@pytest.mark.ranks(2, launcher="torchrun")
class TestDDP(EveryBinding):
    binding = "with_ddp"
    phase = "optimizer step"


@pytest.mark.ranks(2, launcher="torchrun")
class TestFSDP(EveryBinding):
    binding = "with_fsdp"


@pytest.mark.ranks(2, launcher="gloo", pool="tensorflow")
class TestTapes(EveryBinding):
    binding = "with_tapes"


@pytest.mark.ranks(2, launcher="gloo", pool="tensorflow")
class TestKeras(EveryBinding):
    binding = "with_keras"


@pytest.mark.ranks(2, launcher="gloo", **ON_TORCH)
class TestKerasOnTorch(EveryBinding):
    binding = "with_keras"


@pytest.mark.ranks(2, launcher="gloo")
@pytest.mark.parametrize("phase", [phase for phase in PHASES if phase != TestPyTorch.phase])
def test_a_rank_killed_in_any_phase_ends_the_job_everywhere(cluster, phase):
    ends_everywhere(cluster, phase=phase)


@pytest.mark.ranks(2, launcher="mpi")
def test_a_rank_killed_in_the_optimizers_step_under_mpi(cluster):
    ends_everywhere(cluster, phase="optimizer step")


@pytest.mark.ranks(2, launcher="mpi")
def test_a_slow_rank_changes_nothing_but_the_time(cluster):
    """Slower than the stall check's patience, which names the rank that others wait for."""
    env = {"HOROVOD_STALL_CHECK_TIME_SECONDS": "1"}
    # In backward, and after it has told the others that it takes the step.
    for phase in ("backward", "scalars"):
        slow = changes_nothing_but_the_time(cluster, env=env, phase=phase, what=6.0)
        everything = slow.log + "".join(slow.stderr)
        assert "One or more tensors were submitted to be reduced" in everything, slow
        assert re.search(r"^1: \[allreduce\.adacons\.0\.", everything, re.MULTILINE), slow


@pytest.mark.ranks(2, launcher="gloo")
def test_a_rank_that_stays_stopped_ends_the_job_within_gloos_timeout(cluster):
    result = run(cluster, env={"HOROVOD_GLOO_TIMEOUT_SECONDS": "6"}, phase="scalars", what="stop")
    assert result.exit_code != 0
    assert "HorovodInternalError" in result.stderr[0], result
    # Gloo's words, where Horovod's thread waits for a message or for the next round.
    assert any(words in result.stderr[0] for words in ("Timed out waiting 6000ms", "Application timeout")), result
    assert result.seconds < 45


@pytest.mark.ranks(2, launcher=("mpi", "gloo"))
def test_a_rank_that_never_comes_ends_the_job_within_the_stall_limit(cluster):
    """It is alive, so no connection breaks; the others give it up by the time that was set for that."""
    env = {"HOROVOD_STALL_CHECK_TIME_SECONDS": "2", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "4"}
    result = run(cluster, env=env, phase="backward", what=60.0)
    assert result.exit_code != 0
    assert "HorovodInternalError" in result.stderr[0], result
    assert "stall" in (result.log + "".join(result.stderr)).lower(), result
    assert result.seconds < 45
