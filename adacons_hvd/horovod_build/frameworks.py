"""Which frameworks are installed, and of which version; none is imported to find out."""

from __future__ import annotations

from importlib import metadata, util

# Each framework, and the distributions that may provide it.
FRAMEWORKS = {
    "torch": ("torch",),
    "tensorflow": ("tensorflow", "tensorflow-cpu", "tensorflow-rocm", "tf-nightly", "tf-nightly-cpu"),
}


def installed_frameworks() -> tuple[str, ...]:
    """The frameworks that this interpreter could import; none is imported to find out."""
    return tuple(name for name in FRAMEWORKS if util.find_spec(name) is not None)


def framework_version(name: str) -> str:
    """A framework's version as its distribution states it, or "unknown" where none does."""
    for distribution in FRAMEWORKS[name]:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return "unknown"
