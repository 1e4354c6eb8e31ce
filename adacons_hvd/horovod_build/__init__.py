"""Builds Horovod 0.28.1, its last release, against the frameworks installed here.

    python -m adacons_hvd.horovod_build --install

As released, Horovod compiles against neither current PyTorch nor current TensorFlow. The files in `patches/` are all
that it takes; each says why it is needed and for which versions. One run goes through

    recipe          what is built, and the key under which the result is kept
    prerequisites   is everything here that the build needs? If not, what to install
    source          the release from the package index, its checksum verified, patched
    compiling       the long part, with its progress
    proof           two processes reduce a tensor under every controller and framework that was built
    cache           the wheel, kept for the next checkout

Nothing here imports a framework or anything outside the standard library, so it runs before the rest of the package
is installed.
"""
