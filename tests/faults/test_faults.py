"""Jobs without elasticity in which a rank is killed, stopped or slow: they end everywhere, in time, and say why."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
from phases import PHASES

JOB = Path(__file__).with_name("job.py")

pytestmark = [pytest.mark.ranks(2, launcher=("mpi", "gloo")), pytest.mark.time_limit(90)]


def run(cluster, **plan):
    return cluster.script(JOB, [json.dumps(plan)])


def digest(result):
    """The digest of the parameters at the end, the same on every rank."""
    assert result.exit_code == 0, result
    digests = {re.search(r"^finished (\w+)$", out, re.MULTILINE)[1] for out in result.stdout}
    assert len(digests) == 1, result
    return digests.pop()


@pytest.mark.ranks(2, launcher="gloo")
@pytest.mark.parametrize("phase", PHASES)
def test_a_rank_killed_in_any_phase_ends_the_job_everywhere(cluster, phase):
    ends_everywhere(cluster, phase)


@pytest.mark.ranks(2, launcher="mpi")
@pytest.mark.parametrize("phase", ["first collective", "optimizer step"])
def test_a_rank_killed_under_mpi_ends_the_job_everywhere(cluster, phase):
    ends_everywhere(cluster, phase)


def ends_everywhere(cluster, phase):
    result = run(cluster, phase=phase)
    assert f"{phase}: kill" in result.stdout[1]
    assert result.exit_code != 0
    assert not any("finished" in out for out in result.stdout), result
    # Both launchers name the process, and that it was killed.
    expected = "exited on signal 9" if cluster.launcher == "mpi" else "Process 1 exit with status code 137"
    assert expected in result.log, result
    assert result.seconds < 45


@pytest.mark.ranks(2, launcher="mpi")
def test_a_slow_rank_changes_nothing_but_the_time(cluster):
    """Slower than the stall check's patience, which names the rank that others wait for."""
    whole = digest(run(cluster))
    env = {"HOROVOD_STALL_CHECK_TIME_SECONDS": "1"}
    # In backward, and after it has told the others that it takes the step.
    for phase in ("backward", "scalars"):
        slow = run(cluster, env=env, phase=phase, what=6.0)
        assert digest(slow) == whole
        everything = slow.log + "".join(slow.stderr)
        assert "One or more tensors were submitted to be reduced" in everything, slow
        assert re.search(r"^1: \[allreduce\.adacons\.0\.", everything, re.MULTILINE), slow


def test_a_stopped_rank_that_goes_on_changes_nothing_but_the_time(cluster, tmp_path):
    """SIGSTOP in the middle of a collective, and SIGCONT three seconds later."""
    # The folder tells this job from another one that runs beside it.
    plan = {"phase": "first collective", "what": "stop", "folder": str(tmp_path)}
    continued = threading.Event()

    def wake():
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not continued.wait(0.1):
            for entry in Path("/proc").iterdir():
                stopped = entry.name.isdigit() and state_of(entry) == "T" and str(tmp_path) in command_of(entry)
                if stopped:
                    time.sleep(3)
                    os.kill(int(entry.name), signal.SIGCONT)
                    return

    thread = threading.Thread(target=wake)
    thread.start()
    try:
        result = run(cluster, **plan)
    finally:
        continued.set()
        thread.join()
    assert "first collective: stop" in result.stdout[1]
    times = [float(t) for t in re.findall(r"^step \d+ at ([\d.]+)$", result.stdout[0], re.MULTILINE)]
    assert times[3] - times[2] > 2.5
    digest(result)


def state_of(entry):
    try:
        return (entry / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def command_of(entry):
    try:
        return (entry / "cmdline").read_text()
    except OSError:
        return ""


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
