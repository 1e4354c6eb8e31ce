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
    "torchrun": r"failed \(exitcode: -9\) local_rank: 1 ",
}

pytestmark = [pytest.mark.ranks(2, launcher=("mpi", "gloo")), pytest.mark.time_limit(90)]


def run(cluster, **plan):
    return cluster.script(JOB, [json.dumps(plan)], forked=True)


def changes_nothing_but_the_time(cluster, *what, phase, **plan):
    """All trainings end with the same parameters on all ranks, as does one that nothing happens to; the job's end."""
    result = run(cluster, what=[*what, None], phase=phase, **plan)
    assert result.exit_code == 0, result
    assert re.findall(rf"^{phase}: (.+)$", result.stdout[1], re.MULTILINE) == [str(each) for each in what]
    ends = [re.findall(r"^finished (\w+)$", out, re.MULTILINE) for out in result.stdout]
    assert [len(end) for end in ends] == [len(what) + 1] * 2, result
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


def is_given_up(cluster, **plan):
    """A rank that stays stopped ends the job once Gloo has waited for it as long as it was told to."""
    result = run(cluster, what=["stop"], timeout=6, **plan)
    assert f"{plan['phase']}: stop" in result.stdout[1]
    assert result.exit_code != 0
    # Gloo's words, where Horovod's thread waits for a message or for the next round.
    assert any(words in result.stderr[0] for words in ("Timed out waiting 6000ms", "Application timeout")), result
    assert result.seconds < 45
    return result


class EveryBinding:
    """Something happens to a rank while the other one has begun the step, or waits in it."""

    binding: str
    phase = "between steps"

    def test_a_rank_that_is_killed_ends_the_job_everywhere(self, cluster):
        ends_everywhere(cluster, binding=self.binding, phase=self.phase)

    def test_a_rank_that_is_stopped_for_a_while_or_slow_changes_nothing_but_the_time(self, cluster):
        """By SIGSTOP, and two seconds later SIGCONT; in the next training it sleeps."""
        result = changes_nothing_but_the_time(cluster, "pause", 2.0, phase=self.phase, binding=self.binding)
        times = [float(t) for t in re.findall(r"^step \d+ at ([\d.]+)$", result.stdout[0], re.MULTILINE)]
        for training in (times[:6], times[6:12]):
            assert max(after - before for before, after in itertools.pairwise(training[2:])) > 1.5


class OverGloo(EveryBinding):
    """Ranks that wait for each other in Gloo alone."""

    #: What the other rank's training fails with.
    error: str

    def test_a_rank_that_stays_stopped_ends_the_job_within_gloos_timeout(self, cluster):
        result = is_given_up(cluster, binding=self.binding, phase=self.phase)
        assert self.error in result.stderr[0], result


class TestPyTorch(EveryBinding):
    binding = "with_torch"
    phase = "first collective"


@pytest.mark.ranks(2, launcher="torchrun")
class TestDDP(OverGloo):
    binding = "with_ddp"
    phase = "optimizer step"
    error = "RuntimeError"


@pytest.mark.ranks(2, launcher="torchrun")
class TestFSDP(OverGloo):
    binding = "with_fsdp"
    error = "RuntimeError"


@pytest.mark.ranks(2, launcher="gloo", pool="tensorflow")
class TestTapes(OverGloo):
    binding = "with_tapes"
    error = "UnknownError"


@pytest.mark.ranks(2, launcher="gloo", pool="tensorflow")
class TestKeras(OverGloo):
    binding = "with_keras"
    error = "UnknownError"


@pytest.mark.ranks(2, launcher="gloo", **ON_TORCH)
class TestKerasOnTorch(OverGloo):
    binding = "with_keras"
    error = "HorovodInternalError"


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
        slow = changes_nothing_but_the_time(cluster, 6.0, phase=phase, env=env)
        everything = slow.log + "".join(slow.stderr)
        assert "One or more tensors were submitted to be reduced" in everything, slow
        assert re.search(r"^1: \[allreduce\.adacons\.0\.", everything, re.MULTILINE), slow


@pytest.mark.ranks(2, launcher="gloo")
def test_a_rank_that_stays_stopped_ends_the_job_within_gloos_timeout(cluster):
    result = is_given_up(cluster, phase="scalars")
    assert "HorovodInternalError" in result.stderr[0], result


@pytest.mark.ranks(2, launcher=("mpi", "gloo"))
def test_a_rank_that_never_comes_ends_the_job_within_the_stall_limit(cluster):
    """It is alive, so no connection breaks; the others give it up by the time that was set for that."""
    env = {"HOROVOD_STALL_CHECK_TIME_SECONDS": "2", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "4"}
    result = run(cluster, env=env, phase="backward", what=[60.0])
    assert result.exit_code != 0
    assert "HorovodInternalError" in result.stderr[0], result
    assert "stall" in (result.log + "".join(result.stderr)).lower(), result
    assert result.seconds < 45
