#!/bin/sh
# In place of ssh: runs the command on this machine, whatever host it was meant for. Each has temporary files of its own,
# since Open MPI's daemons would make the same folder at the same time, at which one of them may fail.
shift
TMPDIR=$(mktemp -d)
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT
trap 'exit 1' HUP INT TERM
/bin/sh -c "$*"
