"""The harness keeps its promises, above all when a rank does not behave: an end in time, a message, nothing left."""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import harness
import pytest
from harness import ClusterError, processes
from harness.cluster import Pools, check_nothing_left
from harness.launchers import LAUNCHERS, TESTS, environment, program
from harness.plugin import specs_of
from harness.pool import Job

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.cluster import Cluster

# What ending a job may take on a busy machine, beyond its limit and the grace.
MARGIN = 20.0
# The grace for most tests here, which would spend a minute on the real one.
GRACE = 1.0
# A limit that no test here should come near.
FAR = 100.0

every_launcher = pytest.mark.ranks(3, launcher=("mpi", "gloo", "torchrun"))
both = pytest.mark.ranks(3, launcher=("mpi", "gloo"))


class OnPurposeError(Exception):
    """An exception of a class that only this module knows."""


def double(value: int) -> int:
    return 2 * value


def where_am_i() -> tuple[int, int, str]:
    return harness.rank(), harness.size(), harness.launcher()


# --- results


@pytest.mark.ranks(1, 2, 3, 4, 8, launcher=("mpi", "gloo"))
class TestResults:
    def test_come_in_rank_order(self, cluster: Cluster) -> None:
        expected = [(rank, cluster.ranks, cluster.launcher) for rank in range(cluster.ranks)]
        assert cluster.run(where_am_i) == expected

    def test_gather_gives_every_rank_everything(self, cluster: Cluster) -> None:
        def gathered() -> tuple[list[int], list[str]]:
            return harness.gather(harness.rank() ** 2), harness.gather(f"rank {harness.rank()}")

        numbers = list(range(cluster.ranks))
        expected = ([number**2 for number in numbers], [f"rank {number}" for number in numbers])
        assert cluster.run(gathered) == [expected] * cluster.ranks


@pytest.mark.ranks(2, 4, launcher=("mpi", "gloo"))
def test_horovod_agrees_with_gather(cluster: Cluster) -> None:
    def sums(length: int) -> tuple[Any, Any]:
        import torch

        hvd = harness.horovod_torch()
        mine = torch.arange(length, dtype=torch.float64) * (harness.rank() + 1)
        assert (hvd.rank(), hvd.size()) == (harness.rank(), harness.size())
        return hvd.allreduce(mine, op=hvd.Sum), torch.stack(harness.gather(mine)).sum(0)

    for got, expected in cluster.run(sums, 5):
        assert got.tolist() == expected.tolist()
        assert got.tolist()[1] == sum(rank + 1 for rank in range(cluster.ranks))


@pytest.mark.ranks(2, launcher="gloo", pool="tensorflow")
@pytest.mark.time_limit(180)
def test_tensorflow_helpers(cluster: Cluster) -> None:
    def sums() -> tuple[Any, Any, bool]:
        import tensorflow as tf

        hvd = harness.horovod_tensorflow()
        mine = tf.range(3.0) * (harness.rank() + 1)
        everyone = harness.gather(mine.numpy())
        return hvd.allreduce(mine, op=hvd.Sum), sum(everyone), harness.horovod_keras().rank() == harness.rank()

    for got, expected, same_rank in cluster.run(sums):
        assert got.numpy().tolist() == expected.tolist() == [0.0, 3.0, 6.0]
        assert same_rank


@pytest.mark.ranks(2, launcher="torchrun")
def test_torchrun_ranks_can_meet(cluster: Cluster) -> None:
    def total() -> float:
        import torch
        import torch.distributed as dist

        dist.init_process_group("gloo", init_method="env://")
        value = torch.tensor(dist.get_rank() + 1.0)
        dist.all_reduce(value)
        dist.destroy_process_group()
        return value.item()

    # In processes of their own, because the others of this size may have met already.
    assert cluster.run(total, fresh=True) == [3.0, 3.0]


@pytest.mark.ranks(2, launcher="gloo")
class TestFunctions:
    def test_closures_helpers_and_keywords_travel(self, cluster: Cluster) -> None:
        base = 10
        assert cluster.run(lambda value, *, plus: double(value) + base + plus, 3, plus=0.5) == [16.5, 16.5]

    def test_classes_of_the_test_module_come_back_as_themselves(self, cluster: Cluster) -> None:
        assert all(type(error) is OnPurposeError for error in cluster.run(lambda: OnPurposeError("x")))

    def test_ranks_see_the_same_package_as_the_test(self, cluster: Cluster) -> None:
        def place() -> str:
            import adacons_hvd

            return str(adacons_hvd.__file__)

        import adacons_hvd

        assert cluster.run(place) == [adacons_hvd.__file__] * 2

    def test_processes_are_reused_unless_fresh_ones_are_asked_for(self, cluster: Cluster) -> None:
        first = cluster.run(os.getpid)
        assert cluster.run(os.getpid) == first
        private = cluster.run(os.getpid, fresh=True)
        assert not set(private) & set(first)
        assert not set(cluster.run(os.getpid)) & set(private)

    def test_at_most_one_pool_is_alive(self, cluster: Cluster) -> None:
        cluster.run(where_am_i)
        # Two ranks, each with its watcher.
        mine = processes.marked(Job.SESSION)
        kinds = [processes.describe({pid}) for pid in mine]
        assert len([kind for kind in kinds if "harness.worker" in kind]) >= 2
        assert len([kind for kind in kinds if "harness.template" in kind]) == 2
        jobs = {line for pid in mine for line in environ(pid) if line.startswith("HARNESS_JOB=")}
        assert len(jobs) == 1

    def test_a_result_that_cannot_travel_is_an_error(self, cluster: Cluster) -> None:
        with pytest.raises(ClusterError, match="returned a generator that cannot be sent"):
            cluster.run(lambda: (number for number in range(3)))


@pytest.mark.ranks(2, launcher="mpi", env={"HARNESS_TEST_COLOUR": "green"}, pool="nothing imported")
def test_environment_of_the_mark_reaches_the_ranks(cluster: Cluster) -> None:
    assert cluster.run(lambda: os.environ["HARNESS_TEST_COLOUR"]) == ["green", "green"]
    assert cluster.run(lambda: os.environ["OMP_NUM_THREADS"]) == ["1", "1"]


@pytest.mark.ranks(4, launcher="mpi")
def test_ranks_are_forked_from_two_templates_and_differ(cluster: Cluster) -> None:
    def drawn() -> tuple[list[str], int, float, float, str]:
        import random

        import numpy

        loaded = sorted({"torch", "horovod", "tensorflow"} & set(sys.modules))
        return loaded, hash("text"), random.random(), numpy.random.rand(), os.environ["TMPDIR"]

    loaded, hashes, ours, theirs, folders = zip(*cluster.run(drawn), strict=True)
    assert list(loaded) == [["horovod", "torch"]] * 4
    assert len(set(hashes)) == 2
    assert len(set(ours)) == len(set(theirs)) == 4
    assert len(set(folders)) == 1


@pytest.mark.ranks(2, launcher="mpi", pool="nothing imported")
def test_a_pool_imports_no_framework(cluster: Cluster) -> None:
    def loaded() -> list[str]:
        return sorted({"torch", "tensorflow", "horovod", "numpy"} & set(sys.modules))

    assert cluster.run(loaded, fresh=True) == [[], []]


# --- failures


@pytest.fixture
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Asserts that after the test no process of this session is alive: failures must not keep a pool."""
    monkeypatch.setattr("harness.pool.GRACE", GRACE)
    yield
    assert processes.describe(processes.marked(Job.SESSION)) == ""


def fails(cluster: Cluster, body: Any, timeout: float = FAR, within: float = GRACE + MARGIN) -> ClusterError:
    """Run something that must fail, in time."""
    cluster.run(where_am_i)
    started = time.monotonic()
    with pytest.raises(ClusterError) as caught:
        cluster.run(body, timeout=timeout)
    assert time.monotonic() - started < within
    return caught.value


@both
@pytest.mark.usefixtures("nothing_left")
class TestFailures:
    @every_launcher
    def test_a_rank_that_raises(self, cluster: Cluster) -> None:
        def body() -> None:
            print(f"printed by rank {harness.rank()}")
            if harness.rank() == 1:
                raise OnPurposeError("on purpose")

        error = fails(cluster, body)
        assert f"body() on 3 ranks under {cluster.launcher}: rank 1 raised OnPurposeError: on purpose" in str(error)
        assert error.ranks[0] == error.ranks[2] == "returned"
        assert "rank 1: traceback" in str(error)
        assert 'raise OnPurposeError("on purpose")' in str(error)
        for rank in range(3):
            assert f"rank {rank}: stdout\nprinted by rank {rank}" in str(error)

    @every_launcher
    def test_a_rank_that_hangs(self, cluster: Cluster) -> None:
        def body() -> None:
            if harness.rank() == 2:
                sleep_long_here()

        error = fails(cluster, body, timeout=2, within=2 + MARGIN)
        assert "no end after 2 s" in str(error)
        assert error.ranks == {0: "returned", 1: "returned", 2: "was still running after 2 s"}
        assert "rank 2: where it was" in str(error)
        assert "sleep_long_here" in str(error)

    def test_a_rank_that_crashes(self, cluster: Cluster) -> None:
        def body() -> None:
            if harness.rank() == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(FAR)

        error = fails(cluster, body)
        assert "rank 0 was killed by SIGKILL" in str(error).partition("\n")[0]

    @pytest.mark.parametrize("code", [0, 7])
    def test_a_rank_that_exits_at_once(self, cluster: Cluster, code: int) -> None:
        def body() -> None:
            if harness.rank() == 1:
                os._exit(code)
            time.sleep(FAR)

        error = fails(cluster, body)
        assert f"rank 1 ended with exit code {code}" in str(error).partition("\n")[0]

    def test_a_rank_that_calls_exit(self, cluster: Cluster) -> None:
        def body() -> None:
            if harness.rank() == 1:
                sys.exit(3)

        error = fails(cluster, body)
        assert "rank 1 called sys.exit(3)" in str(error).partition("\n")[0]


def sleep_long_here() -> None:
    time.sleep(FAR)


@both
@pytest.mark.usefixtures("nothing_left")
class TestHorovodFailures:
    def test_ranks_left_alone_in_a_collective(self, cluster: Cluster) -> None:
        def body() -> None:
            import torch

            hvd = harness.horovod_torch()
            hvd.allreduce(torch.ones(3), name="all_here")
            if harness.rank() == 1:
                raise OnPurposeError("left the others alone")
            hvd.allreduce(torch.ones(3), name="one_missing")

        error = fails(cluster, body, within=30 + GRACE + MARGIN)
        assert "rank 1 raised OnPurposeError: left the others alone" in str(error).partition("\n")[0]
        assert "was still running 1 s after that" in error.ranks[0]
        assert "rank 0: where it was" in str(error)
        assert "in allreduce" in str(error)

    def test_a_crash_inside_horovod(self, cluster: Cluster) -> None:
        def body() -> None:
            import torch

            hvd = harness.horovod_torch()
            if harness.rank() == 2:
                os.kill(os.getpid(), signal.SIGSEGV)
            hvd.allreduce(torch.ones(3), name="one_missing")

        error = fails(cluster, body, within=30 + GRACE + MARGIN)
        assert "rank 2 was killed by SIGSEGV" in str(error).partition("\n")[0]

    def test_a_stopped_rank_that_ignores_signals(self, cluster: Cluster) -> None:
        def body() -> None:
            if harness.rank() == 0:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                os.kill(os.getpid(), signal.SIGSTOP)

        error = fails(cluster, body, timeout=2, within=2 + MARGIN)
        assert error.ranks[0] == "was still running after 2 s"

    def test_an_escaped_child_is_found(self, cluster: Cluster) -> None:
        def body() -> None:
            # A process of its own session and, once its parent ends, of nobody.
            subprocess.Popen(["sleep", "1000"], start_new_session=True)
            raise OnPurposeError("with a child left behind")

        fails(cluster, body)


@both
def test_the_next_function_finds_a_working_cluster(cluster: Cluster) -> None:
    def body() -> None:
        raise OnPurposeError("all of them")

    error = fails(cluster, body)
    assert "rank 0, 1, 2: traceback" in str(error)
    assert cluster.run(harness.rank) == [0, 1, 2]


# --- scripts

SCRIPT = """
import sys
print(__name__, "torch" in sys.modules, sys.argv[1:])
import torch
import horovod.torch as hvd
hvd.init()
total = hvd.allreduce(torch.tensor(float(hvd.rank())), op=hvd.Sum)
print("rank", hvd.rank(), "total", total.item())
print("to stderr", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""


@both
@pytest.mark.parametrize("forked", [False, True])
@pytest.mark.usefixtures("nothing_left")
class TestScripts:
    def test_what_was_imported_output_per_rank_and_exit_code(self, cluster: Cluster, forked: bool) -> None:
        result = cluster.script(SCRIPT, ["0", "more"], forked=forked)
        assert result.exit_code == 0, result
        start = f"__main__ {forked} ['0', 'more']\n"
        assert result.stdout == [f"{start}rank {rank} total 3.0\n" for rank in range(3)]
        assert all("to stderr" in err for err in result.stderr)

    def test_a_failing_file(self, cluster: Cluster, tmp_path: Path, forked: bool) -> None:
        file = tmp_path / "fails.py"
        file.write_text("raise SystemExit(5)")
        assert cluster.script(file, forked=forked).exit_code != 0

    @pytest.mark.ranks(3, launcher="mpi")
    def test_a_hanging_one(self, cluster: Cluster, forked: bool) -> None:
        with pytest.raises(ClusterError, match=r"no end after 4 s[\s\S]*rank 0: stdout\nI was here"):
            cluster.script("import time; print('I was here', flush=True); time.sleep(1000)", timeout=4, forked=forked)


# --- the marks


def test_marks_are_checked() -> None:
    assert [str(spec) for spec in specs_of()] == ["mpi-2", "gloo-2"]
    assert [str(spec) for spec in specs_of(3, 4, launcher="gloo", pool="tf")] == ["gloo-3-tf", "gloo-4-tf"]
    with pytest.raises(ValueError, match="unknown launcher 'slurm'"):
        specs_of(2, launcher="slurm")
    with pytest.raises(ValueError, match="positive numbers of processes, not 0"):
        specs_of(2, 0)


def test_a_missing_launcher_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="no-such-launcher is neither beside"):
        program("no-such-launcher")


def test_a_survivor_fails_the_session_and_is_ended(cluster_pools: Pools) -> None:
    cluster_pools.close()
    check_nothing_left()
    process = subprocess.Popen(["sleep", "1000"], env={**os.environ, **dict([Job.SESSION.split("=")])})
    try:
        # Popen may return an instant before the kernel shows the new environment.
        assert processes.wait_until(lambda: process.pid in processes.marked(Job.SESSION), MARGIN)
        with pytest.raises(RuntimeError, match="sleep 1000"):
            check_nothing_left()
        assert process.wait(MARGIN) == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()


# --- pytest itself: these run another pytest, and find everything it started by a mark of their own


def environ(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def pytest_on(folder: Path, source: str, *options: str) -> tuple[subprocess.Popen[str], str]:
    """Start another pytest, which knows this harness, on one test file."""
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_inner.py").write_text(source)
    mark = f"HARNESS_OUTER={secrets.token_hex(8)}"
    env = environment(LAUNCHERS["gloo"], folder, dict([mark.split("=")]))
    # Whoever starts this suite in the background starts it deaf to SIGINT, and that would be inherited.
    command = ["env", "--default-signal=INT", sys.executable, "-m", "pytest", "-p", "harness.plugin"]
    command += ["--basetemp", str(folder / "tmp"), *options]
    output = (folder / "output").open("w")
    return subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=output, text=True), mark


INNER = """
import time, pathlib, pytest
from harness.launchers import IMPORTED

IMPORTED["a little"] = ("json",)

@pytest.mark.ranks(3, launcher={launcher!r}, pool={pool!r})
def test_hang(cluster):
    def body():
        pathlib.Path({flag!r}).touch()
        time.sleep(1000)
    cluster.run(body, timeout=500)
"""


@pytest.mark.parametrize("launcher", list(LAUNCHERS))
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=lambda number: number.name)
def test_a_killed_pytest_leaves_nothing(tmp_path: Path, launcher: str, number: signal.Signals) -> None:
    flag = tmp_path / "flag"
    # Ranks that are forked from a template, and ranks that are not.
    pool = "a little" if number == signal.SIGKILL else "nothing imported"
    process, mark = pytest_on(tmp_path, INNER.format(launcher=launcher, flag=str(flag), pool=pool))
    try:
        assert processes.wait_until(flag.exists, 60), (tmp_path / "output").read_text()
        assert len(processes.marked(mark)) >= 1 + 1 + 2 * 3
        process.send_signal(number)
        process.wait(MARGIN)
        assert processes.wait_until(lambda: not processes.marked(mark), MARGIN), processes.describe(
            processes.marked(mark)
        )
    finally:
        processes.signal_all(processes.marked(mark), signal.SIGKILL)
        process.wait()


def test_tests_are_ordered_by_pool(tmp_path: Path) -> None:
    source = """
import pytest
@pytest.mark.ranks(3, 2, launcher=("mpi", "gloo"))
def test_a(cluster): pass
def test_b(): pass
@pytest.mark.ranks(2, launcher="gloo")
def test_c(cluster): pass
"""
    process, _ = pytest_on(tmp_path, source, "--collect-only", "-q")
    assert process.wait(60) == 0
    names = [line.partition("::")[2] for line in (tmp_path / "output").read_text().splitlines() if "::" in line]
    assert names == ["test_b", "test_a[gloo-2]", "test_c[gloo-2]", "test_a[gloo-3]", "test_a[mpi-2]", "test_a[mpi-3]"]


def test_what_is_left_for_the_soak(tmp_path: Path) -> None:
    source = """
import pytest
@pytest.mark.ranks(2, 3, soak={"gloo": (3,)})
def test_a(cluster): pass
"""
    for asked, names in {"not soak": ["mpi-2", "mpi-3", "gloo-2"], "soak": ["gloo-3"]}.items():
        process, _ = pytest_on(tmp_path, source, "--collect-only", "-q", "-m", asked)
        assert process.wait(60) == 0
        output = (tmp_path / "output").read_text()
        assert sorted(re.findall(r"test_a\[(.*)\]", output)) == sorted(names)
    wrong = source.replace('"gloo": (3,)', '"gloo": (4,)')
    process, _ = pytest_on(tmp_path, wrong, "--collect-only", "-q")
    assert process.wait(60) != 0
    assert "leaves ('gloo', 4) for the soak, which is not among its processes" in (tmp_path / "output").read_text()


def test_two_streams(tmp_path: Path) -> None:
    """Both run tests, at a time, and what happens in either is told in one output."""
    source = """
import os, pathlib, time
def test_meets_the_other():
    pathlib.Path({mine!r}).touch()
    until = time.monotonic() + 30
    while not pathlib.Path({other!r}).exists():
        assert time.monotonic() < until
        time.sleep(0.01)
def test_fails():
    print("printed by", {mine!r})
    assert {mine!r} == "nothing"
"""
    files = [str(tmp_path / name) for name in ("here", "there")]
    (tmp_path / "test_another.py").write_text(source.format(mine=files[0], other=files[1]))
    process, _ = pytest_on(tmp_path, source.format(mine=files[1], other=files[0]), "--streams", "2")
    assert process.wait(60) == 1
    output = (tmp_path / "output").read_text()
    assert "2 failed, 2 passed" in output
    assert all(output.count(f"printed by {file}") == 1 for file in files)


def test_a_second_stream_that_dies_is_noticed(tmp_path: Path) -> None:
    flag = str(tmp_path / "flag")
    # The second stream begins with this one, while the first one is kept from it by the last; what is between is taken
    # beforehand.
    (tmp_path / "test_at_first.py").write_text(
        f"import os, pathlib\ndef test_dies():\n    pathlib.Path({flag!r}).touch()\n    os._exit(0)\n"
    )
    (tmp_path / "test_last.py").write_text(
        f"import pathlib\ndef test_waits():\n    while not pathlib.Path({flag!r}).exists():\n        pass\n"
    )
    process, _ = pytest_on(tmp_path, "def test_between(): pass", "--streams", "2")
    assert process.wait(60) == pytest.ExitCode.INTERNAL_ERROR
    assert "came to an end in test_at_first.py::test_dies" in (tmp_path / "output").read_text()


# --- tests/mpi: mpirun -np N python -m pytest


def mpirun_pytest(folder: Path, ranks: int, *arguments: str, timeout: float) -> tuple[int, str]:
    """Exit code and output of `mpirun -np N python -m pytest ...`; the whole job is ended at the time limit."""
    launcher = LAUNCHERS["mpi"]
    mark = f"HARNESS_OUTER={secrets.token_hex(8)}"
    env = environment(launcher, folder, dict([mark.split("=")]))
    command = [*launcher.command(ranks), sys.executable, "-m", "pytest", "--color=no", *arguments]
    with subprocess.Popen(
        command, cwd=TESTS.parent, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        finally:
            processes.end(process, mark)
    return process.returncode, output


def test_the_mpi_suite_passes_on_one_rank(tmp_path: Path) -> None:
    code, output = mpirun_pytest(tmp_path, 1, "tests/mpi", timeout=300)
    assert code == 0, output
    assert "mpi: 1 ranks" in output
    assert "skipped" not in output


def passes_on_three(cluster: Cluster, which: str) -> None:
    """Some of the MPI suite passes. Ranks are forked from what has imported its framework."""
    source = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    result = cluster.script(source, [str(TESTS / "mpi"), "--color=no", "-k", which], timeout=300, forked=True)
    assert result.exit_code == 0, result
    assert "mpi: 3 ranks" in result.stdout[0]
    assert "skipped" not in result.stdout[0]
    # Only rank 0 speaks.
    assert result.stdout[1:] == ["", ""]


@pytest.mark.ranks(3, launcher="mpi")
def test_the_mpi_suite_passes(cluster: Cluster) -> None:
    passes_on_three(cluster, "not tensorflow")


@pytest.mark.ranks(3, launcher="mpi", pool="tensorflow")
def test_the_mpi_suite_passes_with_tensorflow(cluster: Cluster) -> None:
    passes_on_three(cluster, "tensorflow")


MPI_TESTS = {
    "raises": (
        "if comm.rank == 1: raise ValueError('on purpose')\n    comm.barrier()",
        ["[rank 1 of 3]", "on purpose"],
    ),
    "hangs": (
        "if comm.rank == 2: import time; time.sleep(1000)\n    comm.barrier()",
        ["Alarm clock"],
    ),
    "dies": ("if comm.rank == 0: import os; os._exit(0)\n    comm.barrier()", []),
    "disagrees": ("assert comm.rank != 2", ["failed on rank 2", "assert 2 != 2", "1 failed, 1 passed"]),
    "breaks": ("assert False", ["rank 1", "1 failed, 1 passed"]),
}


@pytest.mark.parametrize("case", MPI_TESTS)
def test_a_failing_rank_fails_the_mpi_suite(tmp_path: Path, case: str) -> None:
    body, expected = MPI_TESTS[case]
    (tmp_path / "conftest.py").write_text((TESTS / "mpi" / "conftest.py").read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = time_limit(seconds)\n")
    (tmp_path / "test_inner.py").write_text(
        "import pytest\n\n"
        f"@pytest.mark.time_limit(8)\ndef test_first(comm):\n    {body}\n\n"
        "def test_second(comm):\n    comm.barrier()\n"
    )
    code, output = mpirun_pytest(tmp_path, 3, str(tmp_path), timeout=60)
    assert code != 0, output
    for words in expected:
        assert words in output, output
    if case == "hangs":
        # Each rank showed where it was.
        assert output.count("in test_first") == 3, output
