"""The object a test gets: run functions and scripts on the ranks its marks ask for."""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import TimeoutExpired
from typing import TYPE_CHECKING, Any, TypeVar

import cloudpickle

from harness import processes
from harness.elastic import ElasticJob
from harness.errors import ClusterError
from harness.launchers import IMPORTED, LAUNCHERS, environment
from harness.pool import Job, Pool, Spec, section, start_of_ranks
from harness.template import Template

if TYPE_CHECKING:
    from types import ModuleType

Result = TypeVar("Result")


@dataclass(frozen=True)
class ScriptResult:
    """How a script's job ended. `stdout` and `stderr` hold one string per rank, `log` what the launcher printed."""

    exit_code: int
    stdout: list[str]
    stderr: list[str]
    log: str
    seconds: float

    def __str__(self) -> str:
        parts = [f"exit code {self.exit_code} after {self.seconds:.1f} s"]
        for rank, (out, err) in enumerate(zip(self.stdout, self.stderr, strict=True)):
            parts += [section(f"rank {rank}: stdout", out), section(f"rank {rank}: stderr", err)]
        return "\n".join(filter(None, [*parts, section("launcher", self.log)]))


class Pools:
    """The one pool that may be alive, the folders of all that were, and what their ranks are forked from."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count()
        self._pool: Pool | None = None
        #: The templates of the last pool that had some, and what they are for.
        self._templates: list[Template] = []
        self._imported: object = None

    def folder(self, spec: Spec) -> Path:
        """A new folder for a job's output."""
        folder = self._folder / f"{next(self._numbers)}-{spec.launcher}-{spec.ranks}"
        folder.mkdir()
        return folder

    def take(self, spec: Spec) -> Pool:
        """The pool for this spec: the one that is up, if it fits. Its user returns it by `keep`, or ends it."""
        if self._pool and self._pool.spec == spec:
            pool, self._pool = self._pool, None
            return pool
        self.close()
        return Pool(spec, self.folder(spec), self.templates_for(spec))

    def templates_for(self, spec: Spec) -> list[str]:
        """The addresses of the two templates of such a pool's ranks; none if these are to import by themselves."""
        launcher = LAUNCHERS[spec.launcher]
        modules = IMPORTED.get(spec.word, ()) if spec.word else launcher.imported
        if not modules:
            return []
        # What Horovod reads from the environment it reads when it is initialised: in the ranks, which have their own.
        extra = {name: value for name, value in spec.env if not name.startswith("HOROVOD_")}
        if self._imported != (modules, extra, launcher.env):
            # Tests are sorted, so what came before is not needed any more, and it takes memory.
            self._close_templates()
            env = environment(launcher, self._folder, extra)
            self._templates = [Template(modules, self._folder, env) for _ in range(2)]
            self._imported = modules, extra, launcher.env
        return [template.address for template in self._templates]

    def _close_templates(self) -> None:
        while self._templates:
            self._templates.pop().close()
        self._imported = None

    def keep(self, pool: Pool) -> None:
        """Let the next user have this pool."""
        self._pool = pool

    def close(self) -> None:
        """End the pool that is up, if any."""
        pool, self._pool = self._pool, None
        if pool:
            pool.close()

    def end(self) -> None:
        """End the pool, and the templates."""
        self.close()
        self._close_templates()


class Cluster:
    """N ranks under one launcher; see the package's docstring."""

    def __init__(self, pools: Pools, spec: Spec, timeout: float, module: ModuleType) -> None:
        self._pools = pools
        self._spec = spec
        self._timeout = timeout
        self._module = module

    def __repr__(self) -> str:
        return f"Cluster({self._spec})"

    @property
    def ranks(self) -> int:
        """How many ranks functions and scripts run on."""
        return self._spec.ranks

    @property
    def launcher(self) -> str:
        """The name of the launcher that starts them."""
        return self._spec.launcher

    def with_ranks(self, number: int) -> Cluster:
        """The same with another number of ranks."""
        return Cluster(self._pools, replace(self._spec, ranks=number), self._timeout, self._module)

    def run(
        self,
        fn: Callable[..., Result],
        *args: Any,
        timeout: float | None = None,
        fresh: bool = False,
        **kwargs: Any,
    ) -> list[Result]:
        """`fn(*args, **kwargs)` on every rank; the return values in rank order."""
        __tracebackhide__ = True
        call = self._pickle((fn, args, kwargs))
        folders = [str(Path(self._module.__file__ or "").parent)]
        if fresh:
            self._pools.close()
        pool = self._pools.take(self._spec)
        name = f"{getattr(fn, '__name__', repr(fn))}()"
        # If this raises, the pool has ended itself.
        results = pool.run(name, folders, call, self._timeout if timeout is None else timeout)
        if fresh:
            pool.close()
        else:
            self._pools.keep(pool)
        return results

    def _pickle(self, call: tuple[Any, ...]) -> bytes:
        # By value, because the ranks cannot import a test module the way pytest does.
        cloudpickle.register_pickle_by_value(self._module)
        try:
            pickled: bytes = cloudpickle.dumps(call)
            return pickled
        finally:
            cloudpickle.unregister_pickle_by_value(self._module)

    def script(
        self,
        program: Path | str,
        args: Sequence[str] = (),
        timeout: float | None = None,
        env: Mapping[str, str] | None = None,
        forked: bool = False,
    ) -> ScriptResult:
        """A Python program as the job itself: a file (`Path`) or its source (`str`)."""
        __tracebackhide__ = True
        self._pools.close()
        folder = self._pools.folder(self._spec)
        if isinstance(program, str):
            file = folder / "script.py"
            file.write_text(program)
        else:
            file = program.resolve()
        templates = self._pools.templates_for(self._spec) if forked else []
        start = start_of_ranks(self._spec, folder, templates)
        limit = self._timeout if timeout is None else timeout
        started = time.monotonic()
        job = Job(self._spec, folder, [*start, str(file), *args], env, templates)
        exit_code: int | None = None
        try:
            with suppress(TimeoutExpired):
                exit_code = job.process.wait(limit)
        finally:
            job.end()
        files = [[folder / f"rank{rank}.{kind}" for rank in range(self.ranks)] for kind in ("out", "err")]
        out, err = ([file.read_text(errors="replace") if file.exists() else "" for file in kind] for kind in files)
        seconds = time.monotonic() - started
        result = ScriptResult(-1 if exit_code is None else exit_code, out, err, job.log(), seconds)
        if exit_code is None:
            where = f"{file.name} on {self.ranks} ranks under {self.launcher}"
            raise ClusterError(f"{where}: no end after {limit:g} s\n{result}")
        return result

    def elastic(
        self, program: Path | str, folder: Path, *, env: Mapping[str, str] | None = None, **options: Any
    ) -> ElasticJob:
        """An elastic job, whose workers are forked as the ranks are; see :mod:`harness.elastic`."""
        self._pools.close()
        templates = self._pools.templates_for(self._spec)
        return ElasticJob(program, folder, env={**dict(self._spec.env), **(env or {})}, templates=templates, **options)


def check_nothing_left() -> None:
    """Raise if any process started by this test session is still alive, after ending it."""
    left = processes.marked(Job.SESSION)
    if left:
        names = processes.describe(left)
        processes.signal_all(left, signal.SIGKILL)
        raise RuntimeError(f"processes of distributed tests were still alive at the end of the session:\n{names}")
