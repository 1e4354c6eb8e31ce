#!/usr/bin/env bash
# `make docker-test`: builds the CPU image, runs the MPI tests in one container, then across a cluster of two, started
# by mpirun and by horovodrun over ssh. Everything it starts is gone afterwards; the images stay, for the next time.
set -euo pipefail
cd "$(dirname "$0")/.."
exec </dev/null

export ADACONS_IMAGE=${ADACONS_IMAGE:-adacons-hvd}
# One name per run, so that two runs on one engine do not meet.
export COMPOSE_PROJECT_NAME=adacons-test-$$
# Builds use the host's network, so that they reach whatever package mirrors the host reaches.
build_args=(--network "${ADACONS_BUILD_NETWORK:-host}")
# Seconds before a run is stopped, and a little more before it is killed.
limit=${ADACONS_DOCKER_TEST_LIMIT:-600}
ranks=4
tests=(python -m pytest -q --color=no -p no:cacheprovider tests/mpi)

die() { printf '\n%s\n' "$*" >&2; exit 1; }
step() { printf '\n== %s\n' "$*"; }

command -v docker >/dev/null || die "There is no docker command: install Docker, then run the same command again."
timeout 20 docker info >/dev/null 2>&1 ||
    die "No Docker engine answers: start it, or let this user reach it (usually by the group docker), then run the same command again."
if docker compose version >/dev/null 2>&1; then
    compose=(docker compose)
elif command -v docker-compose >/dev/null; then
    compose=(docker-compose)
else
    die "There is no 'docker compose': install the compose plugin (Debian: apt-get install docker-compose), then run the same command again."
fi
compose+=(-f docker/compose.yaml)

cleanup() {
    "${compose[@]}" down --volumes --timeout 2 >/dev/null 2>&1 || true
    docker rm --force --volumes "$COMPOSE_PROJECT_NAME" >/dev/null 2>&1 || true
}
trap cleanup EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

step "image $ADACONS_IMAGE (minutes the first time: Horovod is compiled in it)"
docker build "${build_args[@]}" --file docker/Dockerfile --tag "$ADACONS_IMAGE" .
docker build "${build_args[@]}" --quiet --file docker/Dockerfile --target test --tag "$ADACONS_IMAGE:test" .
docker image inspect --format 'size: {{.Size}} bytes, user: {{.Config.User}}' "$ADACONS_IMAGE"

step "one container: mpirun -np $ranks"
docker run --rm --name "$COMPOSE_PROJECT_NAME" --shm-size 1g --network none "$ADACONS_IMAGE:test" \
    timeout --kill-after 10 "$limit" mpirun -np $ranks "${tests[@]}"

step "cluster of two containers"
ADACONS_IMAGE=$ADACONS_IMAGE:test "${compose[@]}" up --detach --no-build
on_node1() { "${compose[@]}" exec -T node1 timeout --kill-after 10 "$limit" "$@"; }
for node in node1 node2; do
    tries=0
    until on_node1 ssh -o BatchMode=yes "$node" true 2>/dev/null; do
        [ $((tries += 1)) -lt 30 ] || { "${compose[@]}" logs; die "ssh to $node never answered, see the log above."; }
        sleep 1
    done
done

step "cluster: mpirun -np $ranks -H node1:2,node2:2"
on_node1 mpirun -np $ranks -H node1:2,node2:2 "${tests[@]}"

step "cluster: horovodrun -np $ranks -H node1:2,node2:2 (MPI)"
on_node1 horovodrun -np $ranks -H node1:2,node2:2 "${tests[@]}"

# Gloo has no MPI for the tests to speak through: one collective shows that ranks on both nodes find each other.
step "cluster: horovodrun --gloo -np $ranks -H node1:2,node2:2"
for framework in torch tensorflow; do
    on_node1 horovodrun --gloo -np $ranks -H node1:2,node2:2 \
        python -m adacons_hvd.horovod_build.reduce_two $framework gloo
done

step "docker-test passed"
