#!/usr/bin/env bash
# One node of a cluster of containers: serves ssh, without root, to the other nodes alone.
#
# The first node to start makes the cluster's keys in the shared folder /cluster; they exist nowhere else and are gone
# with the volume. ssh and sshd use port 2222, which needs no privilege, by configuration, so that horovodrun and mpirun
# need no option for it.
set -euo pipefail
readonly keys=/cluster port=2222

umask 077
exec 9>"$keys/lock"
flock 9
if ! [ -e "$keys/ready" ]; then
    ssh-keygen -q -t ed25519 -N '' -C adacons-user -f "$keys/user"
    ssh-keygen -q -t ed25519 -N '' -C adacons-host -f "$keys/host"
    touch "$keys/ready"
fi
exec 9>&-

mkdir -p ~/.ssh
cat >~/.ssh/config <<END
Host *
    Port $port
    IdentityFile $keys/user
    UserKnownHostsFile $HOME/.ssh/known_hosts
    LogLevel ERROR
END
# All nodes have one host key, made for this cluster, so whoever holds it is a node of this cluster.
echo "* $(cut -d' ' -f1,2 "$keys/host.pub")" >~/.ssh/known_hosts
cp "$keys/user.pub" ~/.ssh/authorized_keys
# A command run over ssh gets none of the image's environment by itself.
variables=(PATH)
mapfile -t -O 1 variables < <(compgen -e | grep -E '^(OMP_|OMPI_)')
environment=()
for name in "${variables[@]}"; do environment+=("$name=${!name}"); done
cat >~/.ssh/sshd_config <<END
Port $port
HostKey $keys/host
PidFile none
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
SetEnv ${environment[*]}
# A launcher opens several connections at once, one per node and service.
MaxStartups 64
END
exec /usr/sbin/sshd -D -e -f ~/.ssh/sshd_config
