"""The command line: `python -m adacons_hvd.horovod_build --help`."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

from . import compiling, prerequisites, proof, source, standards
from .cache import WheelCache, default_root
from .errors import BuildError, disk_full, is_disk_full
from .frameworks import FRAMEWORKS, installed_frameworks
from .recipe import HOROVOD_VERSION, Recipe


def main(arguments: list[str] | None = None) -> int:
    """Builds, proves, keeps and installs, as asked; returns the exit status."""
    options = parser().parse_args(arguments)
    root = options.cache_dir.absolute() if options.cache_dir else default_root()
    try:
        obtain(options, root)
    except BuildError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except OSError as error:
        if not is_disk_full(error):
            raise
        print(f"\n{disk_full(root)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted; nothing half-built was kept.", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """The options, with their help."""
    names = " and ".join(FRAMEWORKS)
    result = argparse.ArgumentParser(
        prog="python -m adacons_hvd.horovod_build",
        description=f"Builds Horovod {HOROVOD_VERSION} against the frameworks installed in this Python environment. "
        "The wheel is kept in a cache, so that building the same thing again takes no time.",
    )
    result.add_argument(
        "--frameworks",
        type=_frameworks,
        metavar="NAMES",
        help=f"comma-separated, of {names} (default: those installed)",
    )
    result.add_argument("--gloo-only", action="store_true", help="leave MPI out: needs no MPI installed")
    result.add_argument(
        "--nccl", action="store_true", help="GPU collectives over NCCL: finds CUDA and NCCL, or says what to install"
    )
    result.add_argument("--install", action="store_true", help="install the wheel into this environment")
    result.add_argument("--wheel-dir", type=Path, metavar="DIR", help="copy the wheel there")
    result.add_argument("--sdist", type=Path, metavar="FILE", help="use this copy of the release, not a download")
    result.add_argument(
        "--cache-dir", type=Path, metavar="DIR", help=f"keep wheels there (default: $ADACONS_CACHE or {default_root()})"
    )
    result.add_argument("--force", action="store_true", help="build even if the cache has the wheel")
    result.add_argument("--jobs", type=int, metavar="N", help="compilers at a time (default: by processors and memory)")
    result.add_argument("--check", action="store_true", help="only check that everything needed is installed")
    return result


def obtain(options: argparse.Namespace, root: Path) -> None:
    """The whole run: a wheel from the cache or built now, proven, then installed and copied as asked."""
    recipe = Recipe(options.frameworks or installed_frameworks(), mpi=not options.gloo_only, nccl=options.nccl)
    cache = WheelCache(root)
    if options.check:
        prerequisites.check(recipe, root)
        print(f"Everything needed to build {recipe} is installed.")
        return
    if not recipe.frameworks:
        prerequisites.check(recipe, root)
    key = recipe.key()
    wheel = None if options.force else cache.find(key)
    fresh = wheel is None
    if wheel is None:
        wheel, fresh = build(recipe, key, cache, options)
    if not fresh:
        print(f"{recipe}: {wheel}")
    if options.wheel_dir:
        options.wheel_dir.mkdir(parents=True, exist_ok=True)
        print(f"Copied to {copy_whole(wheel, options.wheel_dir)}")
    if options.install:
        install(recipe, wheel, already_proven=fresh)


def build(recipe: Recipe, key: str, cache: WheelCache, options: argparse.Namespace) -> tuple[Path, bool]:
    """The wheel of `recipe`, and whether it was built here rather than by another process meanwhile."""
    with cache.lock(key, on_wait=lambda: print("Another process is building the same wheel; waiting for it.")):
        if not options.force and (wheel := cache.find(key)):
            return wheel, False
        prerequisites.check(recipe, cache.root)
        print(f"Building {recipe}", flush=True)
        start = time.monotonic()
        for sentence in standards.untried(recipe.frameworks):
            print(sentence, flush=True)
        with cache.workspace(key) as workspace:
            unproven = None if options.force else cache.find(key, proven=False)
            if unproven:
                print("A wheel was built before and its proof failed; proving it again. (--force builds it anew.)")
                wheel = copy_whole(unproven, workspace)
            else:
                archive = options.sdist.absolute() if options.sdist else source.fetch(cache.sdists, workspace)
                tree = source.unpack(archive, workspace)
                log = cache.logs / f"{key}.log"
                wheel = compiling.build_wheel(recipe, tree, workspace, log, options.jobs or compiling.default_jobs())
            wheel = prove_and_keep(recipe, key, wheel, cache, workspace)
        size = wheel.stat().st_size / 1e6
        print(f"Built and proven in {time.monotonic() - start:.0f} s, {size:.0f} MB: {wheel}")
    return wheel, True


def prove_and_keep(recipe: Recipe, key: str, wheel: Path, cache: WheelCache, workspace: Path) -> Path:
    """Proves the wheel and keeps it; keeps it apart, and says where, if it fails: compiling took long."""
    site = workspace / "site"
    pip("install", "--no-deps", "--no-index", "--target", str(site), str(wheel))
    try:
        proof.prove(recipe, site)
    except BuildError as error:
        kept = cache.keep(key, wheel, recipe.facts(), proven=False)
        raise BuildError(
            f"{error}\nThe wheel is kept, but not as one that works: {kept}\nOnce the cause is mended, the same "
            "command proves it again without compiling; --force compiles anew."
        ) from error
    return cache.keep(key, wheel, recipe.facts())


def install(recipe: Recipe, wheel: Path, already_proven: bool) -> None:
    """Installs the wheel unless this very file is what is installed, and proves it unless it was proven just now."""
    if installed_checksum() == source.checksum(wheel):
        print("Already installed in this environment.")
        return
    pip("install", "--no-deps", "--no-index", "--force-reinstall", str(wheel))
    if not already_proven:
        proof.prove(recipe)
    print(f"Installed into {sys.prefix}")


def installed_checksum() -> str | None:
    """The checksum of the wheel that the installed Horovod came from, as pip recorded it."""
    try:
        recorded = metadata.distribution("horovod").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return None
    origin = json.loads(recorded or "{}")
    checksum = origin.get("archive_info", {}).get("hashes", {}).get("sha256")
    return checksum if isinstance(checksum, str) else None


def copy_whole(wheel: Path, folder: Path) -> Path:
    """Copies the wheel so that a reader of `folder` sees all of it or nothing."""
    target, partial = folder / wheel.name, folder / f".{wheel.name}.{os.getpid()}"
    try:
        shutil.copyfile(wheel, partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def pip(*arguments: str) -> None:
    """Runs this environment's pip, silent unless it fails."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        if "No space left on device" in done.stdout:
            raise disk_full(Path(sys.prefix))
        raise BuildError(f"pip could not do `{' '.join(arguments)}`:\n{done.stdout.strip()}")


def _frameworks(text: str) -> tuple[str, ...]:
    asked = {name.strip() for name in text.split(",") if name.strip()}
    if not asked or not asked <= set(FRAMEWORKS):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of {', '.join(FRAMEWORKS)}")
    return tuple(name for name in FRAMEWORKS if name in asked)


if __name__ == "__main__":
    # A build that is told to stop cleans up like one that is interrupted at the keyboard.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
