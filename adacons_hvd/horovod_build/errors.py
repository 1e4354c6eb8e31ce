"""The messages by which the build tells its user why it cannot go on."""

from __future__ import annotations

import errno
from pathlib import Path


class BuildError(Exception):
    """One or more sentences, each saying what is wrong and what to do. Shown as they are, without a traceback."""


def disk_full(where: Path) -> BuildError:
    """The error for a disk that filled up while something was written below `where`."""
    return BuildError(
        f"The disk that holds {where} is full: free about 1 GB there, or point ADACONS_CACHE at a folder on another "
        "disk, then run the same command again; nothing half-built was kept."
    )


def is_disk_full(error: OSError) -> bool:
    """Whether an operating system error means that no space, or no quota, is left."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
