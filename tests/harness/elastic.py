"""Elastic jobs: `horovodrun` with a list of hosts that a test changes while the job runs, and workers that it kills.

    SCRIPT = '''
    import horovod.torch as hvd                          # or adacons_hvd.torch, adacons_hvd.tensorflow.keras, ...
    from harness.elastic import tell
    hvd.init()
    ...
    @hvd.elastic.run
    def train(state):
        while state.step < 10:
            ...
            state.step += 1
            state.commit()
            tell(step=state.step, size=hvd.size())       # any JSON; the test reads it in `job.told()`
    train(state)
    tell(done=True)
    '''

    @pytest.mark.ranks(launcher="gloo")
    def test_a_host_leaves(cluster, tmp_path):
        with cluster.elastic(SCRIPT, tmp_path, hosts={"localhost": 2, "127.0.0.1": 1}) as job:
            job.wait_until(lambda told: any(fact.get("step") == 3 for fact in told), 60)
            job.hosts = {"localhost": 2}                 # the next commit on each worker notices
            result = job.result(60)
        assert result.exit_code == 0, result

Hosts. All names in `HOSTS` are this machine, and Horovod takes each for a host of its own. Their number matters because
Horovod bars a whole host once one worker on it has failed: put a worker that is to die on a host without others. Which
host has rank 0 at the start is Horovod's choice; later comers rank after those who were there. To grow, name more slots
in `job.hosts` than there were; `ranks` is the number to start with, `min_ranks` and `max_ranks` the limits (by default
1 and no limit). Horovod looks for changes once a second, and a worker hears of them in `state.commit()`.

What workers say. `tell(**facts)` notes facts with the worker's `host`, `slot`, `pid` and the `time`; `job.told()` has
everything that was told so far, in order of time. What a worker prints is in `result.output`, by the rank it started
with, and in the message of every error.

When to stop. Which step is done when a host comes or goes is a matter of chance, so let the loop's condition depend on
what all ranks know alike, as in `while not (state.resized and state.after == 5)`, never on a clock or a file.

Ending. `job.kill("127.0.0.1", 0)` sends SIGKILL to the worker that told last from there. A worker that is to die at
an exact place does it by itself: `os.kill(os.getpid(), signal.SIGKILL)`. `result(seconds)` waits for the end of the
job; if that does not come in time, or `wait_until` is in vain, ClusterError is raised with everybody's output. At the
end of the `with` block every process of the job is ended.

Workers are forked, as functions' ranks are, from a process that has imported what the `ranks` mark says. Where one is
killed, it takes up to HOROVOD_GLOO_TIMEOUT_SECONDS (here 12) until those notice who did not wait for it, but for others
that did.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import TimeoutExpired
from types import TracebackType
from typing import Any

from harness import processes
from harness.errors import ClusterError
from harness.pool import Job, Spec, section, start_of_ranks

HOSTS = ("localhost", "127.0.0.1", "127.1", "127.0.1")
FOLDER = "HARNESS_ELASTIC_FOLDER"
#: How much an error shows of a fact.
LONGEST = 200

Fact = dict[str, Any]


def tell(**facts: Any) -> None:
    """On a worker: let the test know."""
    host, slot = os.environ["HOROVOD_HOSTNAME"], int(os.environ["HOROVOD_LOCAL_RANK"])
    line = json.dumps({"host": host, "slot": slot, "pid": os.getpid(), "time": time.time(), **facts}) + "\n"
    with (Path(os.environ[FOLDER]) / f"{os.getpid()}.told").open("a", encoding="utf-8") as file:
        file.write(line)


def told_in(folder: Path) -> list[Fact]:
    """Everything that workers told there, in order of time."""
    # The last line of a worker that was killed may be incomplete.
    lines = [line for file in folder.glob("*.told") for line in file.read_text().splitlines(True)]
    facts = [json.loads(line) for line in lines if line.endswith("\n")]
    return sorted(facts, key=lambda fact: float(fact["time"]))


class Course:
    """On a worker: how far an elastic job has come, which it tells, and where a worker is to die.

    Stages are what lies between changes of the workers. The plan is the script's argument, as JSON: `sizes` of the
    stages, and `deaths`, lists of a stage, how many steps of it have been done, a rank, the number of workers and a
    phase. The course is over six steps into the last stage.
    """

    #: Of the job's state; give them to it.
    FIELDS: Mapping[str, Any] = {"step": 0, "workers": None, "stage": -1, "count": 0}

    def __init__(self, hvd: Any, bits: Callable[[], str]) -> None:
        self.plan = json.loads(sys.argv[1])
        self._hvd = hvd
        self._bits = bits
        self._state: Any = None

    def enter(self, state: Any, workers: Any) -> None:
        """Begin with this state, which is of another stage if it has been with other workers so far."""
        self._state = state
        tell(enter=state.step, bits=self._bits())
        if workers != state.workers:
            state.workers, state.stage, state.count = workers, state.stage + 1, 0

    @property
    def over(self) -> bool:
        return [self._state.stage, self._state.count] == [len(self.plan["sizes"]) - 1, 6] or self._state.step >= 3000

    def reached(self, phase: str, *, together: bool = False) -> None:
        """Die, if this is where; if together, once all others are here as well.

        A worker that is still in a collective when another dies may be ended by Gloo, and which one is, is chance.
        """
        stage, count, size = self._state.stage, self._state.count, self._hvd.size()
        dying = [
            rank
            for *when, rank, workers, where in self.plan["deaths"]
            if [*when, workers, where] == [stage, count, size, phase]
        ]
        if dying and together:
            tell(reached=phase, stage=stage, count=count)
        if self._hvd.rank() in dying:
            while together and self._here(phase, stage, count) < size:
                time.sleep(0.01)
            os.kill(os.getpid(), processes.signal.SIGKILL)

    @staticmethod
    def _here(phase: str, stage: int, count: int) -> int:
        """How many workers have told that they are there."""
        facts = told_in(Path(os.environ[FOLDER]))
        return sum((f.get("reached"), f.get("stage"), f.get("count")) == (phase, stage, count) for f in facts)

    def _place(self) -> Fact:
        return {"stage": self._state.stage, "rank": self._hvd.rank(), "size": self._hvd.size()}

    def begin(self, **facts: Any) -> None:
        """Tell that a step begins."""
        tell(begun=self._state.step + 1, **self._place(), **facts)

    def end(self, **facts: Any) -> bool:
        """Tell that the step is done; whether the state is to be committed now, as it is after every second one."""
        place = self._place()
        self._state.step += 1
        self._state.count += 1
        tell(done=self._state.step, bits=self._bits(), **place, **facts)
        commits: bool = self._state.step % 2 == 0
        if commits:
            tell(committing=self._state.step, bits=self._bits())
        return commits


@dataclass(frozen=True)
class ElasticResult:
    """How an elastic job ended. `output` maps "rank 0: stdout" and so on to what was printed."""

    exit_code: int
    told: list[Fact]
    output: dict[str, str]
    seconds: float

    def __str__(self) -> str:
        printed = [section(title, text) for title, text in self.output.items()]
        return "\n".join([f"exit code {self.exit_code} after {self.seconds:.1f} s", *filter(None, printed)])


class ElasticJob(Job):
    """An elastic job; see the module's docstring. To be used in a `with` statement."""

    def __init__(
        self,
        program: Path | str,
        folder: Path,
        *,
        hosts: Mapping[str, int],
        ranks: int | None = None,
        min_ranks: int = 1,
        max_ranks: int | None = None,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        templates: Sequence[str] = (),
    ) -> None:
        self.folder = folder
        self._hosts_file = folder / "hosts"
        self.hosts = dict(hosts)
        script = folder / "hosts.sh"
        script.write_text(f"#!/bin/sh\ncat '{self._hosts_file}'\n")
        script.chmod(0o700)
        file = folder / "script.py"
        file.write_text(program if isinstance(program, str) else program.read_text())
        options = ["--host-discovery-script", str(script), "--network-interface", "lo", "--min-np", str(min_ranks)]
        if max_ranks is not None:
            options += ["--max-np", str(max_ranks)]
        own = {
            FOLDER: str(folder),
            # The launcher puts the hosts it starts with into a set, and goes by its order.
            "PYTHONHASHSEED": "0",
            # How long workers wait for one that is gone, or that is still starting; and the launcher for hosts.
            "HOROVOD_GLOO_TIMEOUT_SECONDS": "12",
            "HOROVOD_ELASTIC_TIMEOUT": "60",
        }
        spec = Spec("gloo", ranks or sum(hosts.values()))
        start = start_of_ranks(spec, folder, templates)
        self._started = time.monotonic()
        super().__init__(spec, folder, [*options, *start, str(file), *args], {**own, **(env or {})})

    @property
    def hosts(self) -> dict[str, int]:
        """How many workers each host has room for. Assign to change it."""
        return dict(self._hosts)

    @hosts.setter
    def hosts(self, hosts: Mapping[str, int]) -> None:
        self._hosts = dict(hosts)
        new = self._hosts_file.with_suffix(".new")
        new.write_text("".join(f"{host}:{slots}\n" for host, slots in hosts.items()))
        new.replace(self._hosts_file)  # at once: the launcher may be reading

    def told(self) -> list[Fact]:
        """Everything the workers told so far, in order of time."""
        return told_in(self.folder)

    def wait_until(self, condition: Callable[[list[Fact]], bool], seconds: float) -> list[Fact]:
        """Wait until `condition(job.told())` holds; returns what was told by then."""
        __tracebackhide__ = True

        def over() -> bool:
            return condition(self.told()) or self.process.poll() is not None

        processes.wait_until(over, seconds)
        told = self.told()
        if condition(told):
            return told
        ended = self.process.poll() is not None
        raise self._failure("the job ended without what was waited for" if ended else f"in vain for {seconds:g} s")

    def kill(self, host: str, slot: int) -> None:
        """SIGKILL for the worker there."""
        pids = [fact["pid"] for fact in self.told() if (fact["host"], fact["slot"]) == (host, slot)]
        if not pids:
            raise ValueError(f"no worker has told anything from {host}, slot {slot}")
        processes.signal_all({pids[-1]}, processes.signal.SIGKILL)

    def result(self, seconds: float) -> ElasticResult:
        """How the job ended, waiting for it as long as that."""
        __tracebackhide__ = True
        try:
            self.process.wait(seconds)
        except TimeoutExpired:
            raise self._failure(f"no end after {seconds:g} s") from None
        return self._result()

    def __enter__(self) -> ElasticJob:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def _result(self) -> ElasticResult:
        code = self.process.poll()
        names = {"out": "stdout", "err": "stderr"}
        files = sorted(file for kind in names for file in self.folder.glob(f"rank*.{kind}"))
        output = {f"rank {file.stem[4:]}: {names[file.suffix[1:]]}": file.read_text(errors="replace") for file in files}
        output["launcher"] = self.log()
        return ElasticResult(-1 if code is None else code, self.told(), output, time.monotonic() - self._started)

    def _failure(self, what: str) -> ClusterError:
        self.end()
        result = self._result()
        told = "\n".join(json.dumps(fact)[:LONGEST] for fact in result.told)
        return ClusterError("\n".join([f"elastic job: {what}", section("told", told), str(result)]))
