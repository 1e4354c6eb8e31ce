"""Horovod's source: fetched once, known by its checksum, patched exactly or not at all."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
from pathlib import Path

from .errors import BuildError
from .recipe import HOROVOD_VERSION, SDIST_NAME, SDIST_SHA256, patches


def fetch(folder: Path, scratch: Path) -> Path:
    """The release's archive in `folder`, downloaded through pip (hence from the user's own index) if not there."""
    archive = folder / SDIST_NAME
    if archive.is_file() and checksum(archive) == SDIST_SHA256:
        return archive
    requirement = scratch / "requirement.txt"
    requirement.write_text(f"horovod=={HOROVOD_VERSION} --hash=sha256:{SDIST_SHA256}\n")
    # pip compares the checksum before it runs anything of the archive's. The environment keeps Horovod's setup.py,
    # which pip asks for the metadata, from trying to download what it would need for a build.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-build-isolation", "--no-binary", "horovod", "--require-hashes"]
    command += ["--retries", "2", "--timeout", "20", "--dest", str(scratch), "--requirement", str(requirement)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    downloaded = scratch / SDIST_NAME
    if done.returncode != 0 or not downloaded.is_file():
        raise BuildError(_why_not_downloaded(done.stderr, archive))
    verify(downloaded)
    folder.mkdir(parents=True, exist_ok=True)
    downloaded.replace(archive)
    return archive


def verify(archive: Path) -> None:
    """Refuses an archive that is not, byte for byte, the release the patches were written for."""
    if not archive.is_file():
        raise BuildError(f"There is no file {archive}: name the downloaded {SDIST_NAME}.")
    found = checksum(archive)
    if found != SDIST_SHA256:
        raise BuildError(
            f"{archive} is not Horovod's {HOROVOD_VERSION} release: its SHA-256 is {found}, the release's is "
            f"{SDIST_SHA256}. Delete it and run again to download it anew."
        )


def unpack(archive: Path, folder: Path) -> Path:
    """The patched source tree, unpacked from a verified archive."""
    verify(archive)
    with tarfile.open(archive) as contents:
        # The filter exists from Python 3.10.12 and 3.11.4 on; the checksum vouches for the contents anyway.
        if hasattr(tarfile, "data_filter"):
            contents.extractall(folder, filter="data")
        else:
            contents.extractall(folder)
    tree = folder / SDIST_NAME.removesuffix(".tar.gz")
    for patch in patches():
        apply(patch, tree)
    return tree


def apply(patch: Path, tree: Path) -> None:
    """Applies one patch where its context stands line for line, and refuses it anywhere else."""
    command = ["patch", "--strip=1", "--fuzz=0", "--forward", "--batch", "--no-backup-if-mismatch", f"--input={patch}"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    # An offset means that the file is not the one the patch was made from, even if the context occurs elsewhere.
    if done.returncode != 0 or "offset" in done.stdout:
        raise BuildError(
            f"The patch {patch.name} does not fit this source: it was written for Horovod {HOROVOD_VERSION} as "
            f"released. `patch` said:\n{done.stdout.strip()}{done.stderr.strip()}"
        )


def checksum(path: Path) -> str:
    """A file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _why_not_downloaded(pip_said: str, archive: Path) -> str:
    said = [line for line in pip_said.splitlines() if line.startswith(("ERROR", "    "))][-4:]
    reason = "\n".join(said) or pip_said.strip()[-400:]
    if "HASH" in pip_said.upper() and "MATCH" in pip_said.upper():
        return f"The package index serves another {SDIST_NAME} than the release; nothing of it was run.\n{reason}"
    return (
        f"{SDIST_NAME} could not be downloaded. Is this machine offline? Connect it, or set PIP_INDEX_URL to a "
        f"mirror, or copy the file from another machine to {archive}; then run the same command again.\n"
        f"pip said: {reason}"
    )
