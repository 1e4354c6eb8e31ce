"""The one exception that users of the command see, as a sentence."""

from __future__ import annotations

import importlib.util

__all__ = ["CommandError", "require"]


class CommandError(Exception):
    """An error that says in a sentence what is wrong and what to do."""


def require(package: str, purpose: str) -> None:
    """Ask for a package of the extra ``cli`` in a sentence, if it is missing."""
    if importlib.util.find_spec(package) is None:
        raise CommandError(f"{purpose} needs the package {package}: pip install 'adacons-hvd[cli]'")
