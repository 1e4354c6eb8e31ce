"""The `cluster` fixture for every test; see `harness/__init__.py`."""

from pathlib import Path

from harness.plugin import (  # noqa: F401
    cluster,
    cluster_pools,
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_generate_tests,
    pytest_runtestloop,
    under_mpi,
)

# Each of the two kinds of tests in its own kind of process: importing mpi4py initialises MPI, which must not happen to
# a pytest that starts launchers of its own; and N copies of pytest must not each start N processes. Naming a path on
# the command line collects it all the same, and test_harness.py runs tests/mpi under mpirun. tests/trainers needs
# packages of its own: `make test-trainers`.
collect_ignore = [path.name for path in Path(__file__).parent.iterdir() if (path.name == "mpi") != under_mpi()]
collect_ignore.append("trainers")
