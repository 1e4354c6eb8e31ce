"""One pytest per rank, acting as one: `mpirun -np N python -m pytest tests/mpi`, for any N, 1 included.

Every rank runs the same tests in the same order. After each test the ranks tell each other how it went, so a test
fails on all ranks or on none, and rank 0 alone reports, with what the other ranks have to say. A rank that fails while
others wait for it in a collective cannot tell them: it prints its failure and, after a short grace, aborts the whole
job. So does a rank that fails outside a test's body (a fixture, an import). A test that exceeds its time limit (60 s,
or the `time_limit` mark) ends the job after showing where each rank is.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from collections.abc import Generator
from typing import TYPE_CHECKING, NoReturn

import pytest
from mpi4py import MPI

if TYPE_CHECKING:
    from types import ModuleType

# How long the other ranks may take to reach the end of a test that failed on this one.
GRACE = 5.0
TIME_LIMIT = 60.0

# Before any framework is loaded: several ranks with several threads each would only get into each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The reports have a communicator of their own: a test's unfinished messages must not mix with them.
reports = MPI.COMM_WORLD.Dup()


@pytest.fixture(scope="session")
def comm() -> MPI.Intracomm:
    """mpi4py's communicator: the channel that is not under test."""
    return MPI.COMM_WORLD


@pytest.fixture(scope="session")
def hvd() -> ModuleType:
    """`horovod.torch`, initialised after mpi4py initialised MPI."""
    import horovod.torch

    horovod.torch.init()
    return horovod.torch


def pytest_report_header() -> str:
    return f"mpi: {reports.size} ranks, {MPI.Get_library_version().split(',')[0]}"


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    if reports.rank:
        # Rank 0 speaks for all, and it alone writes pytest's cache.
        for name in ("terminalreporter", "lfplugin", "nfplugin", "stepwiseplugin"):
            if config.pluginmanager.has_plugin(name):
                config.pluginmanager.unregister(name=name)


def copy_of_stderr(config: pytest.Config) -> int:
    """The real standard error, not the one pytest captures; as a descriptor to be closed."""
    capture = config.pluginmanager.get_plugin("capturemanager")
    if capture is None:
        return os.dup(2)
    with capture.global_and_fixture_disabled():
        return os.dup(2)


def abort(config: pytest.Config, text: str) -> NoReturn:
    """Print why, and end every rank."""
    with open(copy_of_stderr(config), "w") as stderr:
        print(f"\n[rank {reports.rank} of {reports.size}] {text}\naborting the job", file=stderr, flush=True)
    # mpirun passes on what a rank printed, but not always what it printed just before the end.
    time.sleep(0.5)
    MPI.COMM_WORLD.Abort(1)
    raise AssertionError("unreachable")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    mark = item.get_closest_marker("time_limit")
    limit = float(mark.args[0]) if mark else TIME_LIMIT
    stderr = copy_of_stderr(item.config)
    # Neither timer needs Python, so they also work on a rank that hangs inside a collective. The alarm kills the rank,
    # and mpirun then ends the others: only after every rank has shown where it is, one after the other.
    faulthandler.dump_traceback_later(limit + 0.2 * reports.rank, file=stderr)
    signal.setitimer(signal.ITIMER_REAL, limit + 0.2 * reports.size + 1)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        os.close(stderr)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if reports.size > 1:
        if report.when == "call":
            share(item, report)
        elif report.failed:
            abort(item.config, f"{report.nodeid} failed in its {report.when}:\n{report.longreprtext}")
    return report


def share(item: pytest.Item, report: pytest.TestReport) -> None:
    """Make a test's outcome the same on all ranks: failed where it failed on any."""
    failed = bytearray(reports.size)
    request = reports.Iallgather(bytearray([report.failed]), failed)
    limit = time.monotonic() + GRACE
    while not request.Test():
        if report.failed and time.monotonic() > limit:
            others = f"the other ranks did not get to its end within {GRACE:.0f} s"
            abort(item.config, f"{report.nodeid} failed, and {others}:\n{report.longreprtext}")
        time.sleep(0.001)
    if any(failed):
        own = "\n".join([report.longreprtext, *(f"--- {title}\n{text}" for title, text in report.sections)])
        for rank, text in enumerate(reports.allgather(own)):
            if failed[rank] and rank != reports.rank:
                report.sections.append((f"rank {rank}", text))
        if not report.failed:
            report.outcome = "failed"
            report.longrepr = "failed on rank " + ", ".join(str(rank) for rank, bad in enumerate(failed) if bad)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if report.failed and reports.size > 1:
        abort(collector.config, f"collecting {report.nodeid} failed:\n{report.longreprtext}")
    return report
