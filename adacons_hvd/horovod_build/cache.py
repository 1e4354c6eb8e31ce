"""The folder where built wheels are kept, outside any checkout, so that the next checkout takes seconds.

    sdist/           the release as downloaded
    wheels/KEY/      the wheel and facts.json: what it was built from, and its checksum
    unproven/KEY/    the same of a wheel whose proof failed: never installed, proven again by the next run
    logs/KEY.log     the compiler's output, of the last attempt
    locks/KEY.lock   held during a build: a second builder of the same wheel waits and then finds it
    work/KEY-PID/    a build in progress; removed whatever happens

An entry appears under wheels/ by one rename, complete and proven, or not at all; under unproven/ complete, too.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import BuildError, is_disk_full
from .source import checksum


def default_root() -> Path:
    """`ADACONS_CACHE`, else adacons_hvd in the user's XDG cache folder."""
    if chosen := os.environ.get("ADACONS_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).absolute() / "adacons_hvd"


class WheelCache:
    """Finds, keeps and guards built wheels below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sdists = root / "sdist"
        self.logs = root / "logs"
        try:
            for name in ("sdist", "logs", "wheels", "unproven", "locks", "work"):
                (root / name).mkdir(parents=True, exist_ok=True)
            # A folder can exist and still refuse files: another user's, or a file system mounted read-only.
            with tempfile.TemporaryFile(dir=root / "work"):
                pass
        except OSError as error:
            if is_disk_full(error):
                raise
            raise BuildError(
                f"The cache folder {root} cannot be written ({error.strerror}): set ADACONS_CACHE to one that can."
            ) from error

    def find(self, key: str, *, proven: bool = True) -> Path | None:
        """The wheel kept under `key`, if it is there and undamaged; a damaged entry is dropped."""
        folder = self._place(key, proven)
        try:
            entry = json.loads((folder / "facts.json").read_text())
            wheel = folder / str(entry["wheel"])
            if checksum(wheel) == entry["sha256"]:
                return wheel
        except FileNotFoundError:
            if not folder.exists():
                return None
        except (ValueError, KeyError, OSError):
            pass
        shutil.rmtree(folder, ignore_errors=True)
        return None

    def keep(self, key: str, wheel: Path, facts: dict[str, str], *, proven: bool = True) -> Path:
        """Moves a finished wheel, which has to lie in this cache's `work`, to its place under `key`."""
        entry = wheel.parent / f"entry-{key}"
        entry.mkdir()
        wheel.replace(entry / wheel.name)
        described = {"wheel": wheel.name, "sha256": checksum(entry / wheel.name), "facts": facts}
        (entry / "facts.json").write_text(json.dumps(described, indent=2) + "\n")
        for path in entry.iterdir():
            with path.open("rb") as written:
                os.fsync(written.fileno())
        # Whatever lay there under this key, proven or not, this one replaces.
        for state in (True, False):
            shutil.rmtree(self._place(key, state), ignore_errors=True)
        place = self._place(key, proven)
        entry.replace(place)
        return place / wheel.name

    def _place(self, key: str, proven: bool) -> Path:
        return self.root / ("wheels" if proven else "unproven") / key

    @contextlib.contextmanager
    def lock(self, key: str, on_wait: Callable[[], None]) -> Iterator[None]:
        """Holds the build of `key`; calls `on_wait` once if another process has it and waits for that one.

        The operating system releases the lock when its holder dies, however it dies.
        """
        with (self.root / "locks" / f"{key}.lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def workspace(self, key: str) -> Iterator[Path]:
        """An empty folder for one build, gone afterwards; call it with the lock of `key` held."""
        # With the lock held, whatever lies here under this key was left by a builder that was killed.
        for leftover in (self.root / "work").glob(f"{key}-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        folder = self.root / "work" / f"{key}-{os.getpid()}"
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
