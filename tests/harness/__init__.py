"""Run a plain function, or a script, on several real processes and look at what every rank got.

    import harness
    import pytest

    def mean_of_ranks(offset):                  # runs on every rank; imports its framework itself
        import torch
        hvd = harness.horovod_torch()           # horovod.torch, initialised once per process
        mine = torch.full((4,), float(hvd.rank() + offset))
        everyone = harness.gather(mine)         # every rank's tensor, without Horovod: the oracle
        return hvd.allreduce(mine), sum(everyone) / hvd.size()

    @pytest.mark.ranks(2, 3, launcher=("mpi", "gloo"))      # four tests: mpi-2, mpi-3, gloo-2, gloo-3
    def test_mean(cluster):
        results = cluster.run(mean_of_ranks, 1)             # [rank 0's return value, rank 1's, ...]
        for got, expected in results:
            assert got.tolist() == expected.tolist()

What a test says about its cluster

    @pytest.mark.ranks(2, 3, launcher=("mpi", "gloo"), env={"NAME": "value"}, pool="tensorflow")
    @pytest.mark.time_limit(120)

`ranks` takes the numbers of processes (default 2) and

- `launcher`, one name or several: "mpi" (mpirun, Horovod's MPI controller), "gloo" (horovodrun --gloo),
  "torchrun" (no Horovod: torch.distributed with init_method="env://"), "mpi-hosts" and "gloo-hosts" (this machine as
  several hosts to Horovod). Default: mpi and gloo. Another one is one more entry in `launchers.py`.
- `soak`, numbers by launcher, as in {"gloo": (2, 4)}: those of them that only `make soak` runs.
- `env`, environment of the ranks on top of `launchers.environment`.
- `pool`, any word: tests that use another word do not share processes. Say pool="tensorflow" where TensorFlow is used,
  so that no process loads both frameworks. By the word ranks find imported what they need, see `launchers.IMPORTED`.

`time_limit` is the hard limit in seconds of each `run` or `script` (default 120); `run(..., timeout=)` overrides it.
Both marks may stand on a test, a class or a module (`pytestmark`).

What a test gets: `cluster`

- `cluster.ranks`, `cluster.launcher`.
- `cluster.run(fn, *args, timeout=None, fresh=False, **kwargs)` calls `fn(*args, **kwargs)` on every rank and returns
  the return values in rank order. `fn`, arguments and results travel by cloudpickle: closures, lambdas, helpers of the
  same test module, tensors and arrays are all fine. Assertions inside `fn` work as in any test.
- `cluster.script(path_or_source, args=(), timeout=None, env=None, forked=False)` runs a program as the job itself: a
  `Path`, or a `str` holding the source. Returns a `ScriptResult`: `exit_code`, `stdout` and `stderr` (one string per
  rank), `log` (the launcher's own output), `seconds`. A non-zero exit code is a result; only a timeout raises.
- `cluster.elastic(path_or_source, folder, hosts=...)` is a job whose ranks come and go; see `elastic.py`.

What `fn` can use, on every launcher: `harness.rank()`, `harness.size()`, `harness.launcher()`, `harness.gather(value)`
(a list of every rank's value, on every rank: through mpi4py under "mpi", else through the test process),
`harness.horovod_torch()`, `harness.horovod_tensorflow()`, `harness.horovod_keras()`. Under "mpi"
`mpi4py.MPI.COMM_WORLD` is ready to use.

Processes are reused. The ranks stay up for the next test that wants the same launcher, number, environment and word,
and tests are sorted to make that the common case; at most one such pool is alive. So a function must leave no
collective in flight, and one that leaves other traces (hvd.shutdown(), a changed default dtype, a process set) asks for
`fresh=True`: new processes, ended afterwards. Importing a framework takes seconds, so ranks are forked from a process
that has done it (`template.py`), and so are elastic workers. Scripts import by themselves, as users' do, unless they
are to be `forked`, too.

With `--streams 2`, as in `make test`, two pytest processes share the tests, each with a pool of its own (`streams.py`):
while one waits for processes to start or for a network, the other's tests run.

When something goes wrong `run` raises `ClusterError`: a rank raised, left (`sys.exit`, `os._exit`), was killed, or was
still running at the limit. After the first failure the others get 5 seconds. The message shows who failed first, each
rank's traceback, where the ranks that hung were, and each rank's output; `error.ranks` maps each rank to a sentence.
The processes are then ended, and the next test gets new ones. They end too if pytest itself is killed.

`tests/` is no package: import this as `harness`.

The other kind of distributed test is `tests/mpi`, where pytest itself runs on every rank:
`mpirun -np N python -m pytest tests/mpi` (see `tests/mpi/conftest.py`). `pytest tests` leaves that folder out and runs
it through test_harness.py instead, under mpirun.
"""

from harness.errors import ClusterError
from harness.inside import (
    gather,
    horovod_keras,
    horovod_tensorflow,
    horovod_torch,
    launcher,
    rank,
    size,
)

__all__ = [
    "ClusterError",
    "gather",
    "horovod_keras",
    "horovod_tensorflow",
    "horovod_torch",
    "launcher",
    "rank",
    "size",
]
