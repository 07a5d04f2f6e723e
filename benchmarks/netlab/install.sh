#!/bin/sh
# Install what the hosts of benchmarks/netlab run on Debian or Ubuntu: Slurm and MUNGE, an SSH server,
# Debian's Open MPI, iptables; needs root.
#
#     sh benchmarks/netlab/install.sh
#
# No service of the packages is started: the lab starts its own.
set -eu
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "install.sh: needs root, and apt-get; elsewhere install Slurm (slurmctld, slurmd, srun)," \
    "MUNGE, sshd, Open MPI and iptables with the system's package manager" >&2
  exit 2
fi
apt-get update -q
# Run level 1 (single user), in which invoke-rc.d starts no service.
RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -q --yes --no-install-recommends \
  slurm-wlm munge libpmix-dev openssh-server openssh-client openmpi-bin iptables iproute2
