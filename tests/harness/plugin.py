"""The plugin gives pytest the marks, the fixture and the order of tests that run on ranks."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import streams
from harness.cluster import Cluster, Pools, check_nothing_left
from harness.launchers import LAUNCHERS, sleep_while_waiting
from harness.pool import Spec

TIME_LIMIT = 120.0


def under_mpi() -> bool:
    """Whether mpirun started this very process."""
    return any(name in os.environ for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--streams", type=int, choices=(1, 2), default=1, help="2: run tests in two processes at a time")


def pytest_configure(config: pytest.Config) -> None:
    for line in (
        'ranks(*numbers, launcher=("mpi", "gloo"), soak={}, env={}, pool=""): what the `cluster` fixture runs on',
        "time_limit(seconds): hard limit of each distributed run of a test",
    ):
        config.addinivalue_line("markers", line)
    if not under_mpi():
        folder = tempfile.TemporaryDirectory(prefix="harness-")
        config.add_cleanup(folder.cleanup)
        sleep_while_waiting(Path(folder.name))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cluster" in metafunc.fixturenames:
        mark = metafunc.definition.get_closest_marker("ranks")
        wanted = dict(mark.kwargs) if mark else {}
        later = wanted.pop("soak", {})
        specs = specs_of(*mark.args, **wanted) if mark else specs_of()
        left = [(name, number) for name, numbers in later.items() for number in numbers]
        missing = sorted(set(left) - {(spec.launcher, spec.ranks) for spec in specs})
        if missing:
            raise ValueError(f"a ranks mark leaves {missing[0]} for the soak, which is not among its processes")
        parameters = [
            pytest.param(spec, marks=pytest.mark.soak) if (spec.launcher, spec.ranks) in left else spec
            for spec in specs
        ]
        metafunc.parametrize("cluster", parameters, ids=str, indirect=True)


def specs_of(
    *numbers: int, launcher: str | Iterable[str] = ("mpi", "gloo"), env: dict[str, str] | None = None, pool: str = ""
) -> list[Spec]:
    """The pools a `ranks` mark asks for."""
    launchers = [launcher] if isinstance(launcher, str) else list(launcher)
    unknown = sorted(set(launchers) - set(LAUNCHERS))
    if unknown:
        raise ValueError(f"unknown launcher {unknown[0]!r} in a ranks mark; there are {sorted(LAUNCHERS)}")
    wrong = [number for number in numbers if not isinstance(number, int) or number < 1]
    if wrong:
        raise ValueError(f"a ranks mark needs positive numbers of processes, not {wrong[0]!r}")
    variables = tuple(sorted((env or {}).items()))
    return [Spec(name, number, variables, pool) for name in launchers for number in numbers or (2,)]


def spec_of(item: pytest.Item) -> Spec | None:
    """The pool a collected test runs on, if it uses one."""
    callspec = getattr(item, "callspec", None)
    found: Spec | None = callspec.params.get("cluster") if callspec else None
    return found


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests without a cluster first, then those that can share a pool, or what ranks import; under mpirun last.

    Of two streams one begins at either end. Ranks under mpirun use up what they do not need while they wait for each
    other, so they run beside tests of one process.
    """

    def key(item: pytest.Item) -> tuple[Any, ...]:
        spec = spec_of(item)
        return (1, spec.launcher.startswith("mpi"), spec.word, spec.launcher, spec.env, spec.ranks) if spec else (0,)

    items.sort(key=key)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Run tests in two streams, if that was asked for."""
    config = session.config
    if config.getoption("streams") == 1 or config.option.collectonly or session.testsfailed or under_mpi():
        return None
    streams.run(session, lambda item: (spec_of(item), item.path))
    return True


@pytest.fixture(scope="session")
def cluster_pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pools]:
    pools = Pools(tmp_path_factory.mktemp("cluster"))
    yield pools
    pools.end()
    check_nothing_left()


@pytest.fixture
def cluster(request: pytest.FixtureRequest, cluster_pools: Pools) -> Cluster:
    """N real processes to run functions on; N and the launcher come from the `ranks` mark."""
    if under_mpi():
        pytest.fail("this test starts its own processes; run it without mpirun", pytrace=False)
    mark = request.node.get_closest_marker("time_limit")
    return Cluster(cluster_pools, request.param, float(mark.args[0]) if mark else TIME_LIMIT, request.module)
