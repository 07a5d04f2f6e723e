#!/bin/sh
# Install what the hosts of benchmarks/netlab run on Debian or Ubuntu: Slurm and MUNGE, an SSH server,
# Debian's Open MPI, iptables; needs root.
#
#     sh benchmarks/netlab/install.sh
#
# No service of the packages is started now, as the lab starts its own; but systemd may start them at
# the next boot (`systemctl disable --now slurmctld slurmd munge ssh`).
set -eu
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "install.sh: needs root, and apt-get; elsewhere install Slurm (slurmctld, slurmd, srun)," \
    "MUNGE, sshd, Open MPI and iptables with the system's package manager" >&2
  exit 2
fi
apt-get update -q
# Packages start no service while this forbids it, under systemd too. A policy of the machine's own
# stays as it is.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ] && [ ! -L "$policy" ]; then
  trap 'rm -f "$policy"' EXIT
  trap 'exit 1' HUP INT TERM
  printf '#!/bin/sh\nexit 101\n' > "$policy"
  chmod 755 "$policy"
fi
DEBIAN_FRONTEND=noninteractive apt-get install -q --yes --no-install-recommends \
  slurm-wlm munge libpmix-dev openssh-server openssh-client openmpi-bin iptables iproute2
