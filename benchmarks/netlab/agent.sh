#!/bin/sh
# What mpiexec takes for ssh:  agent.sh [OPTION...] ADDRESS COMMAND  runs COMMAND on a host of the lab.
# NETLAB_HOSTS has "ADDRESS=PID" for every host, PID being a process in its namespaces.
while [ "${1#-}" != "$1" ]; do shift; done
address=$1
shift
for host in $NETLAB_HOSTS; do
  if [ "${host%=*}" = "$address" ]; then
    pid=${host#*=}
    exec nsenter --target "$pid" --mount --net --uts --ipc --pid -- sh -c "$*"
  fi
done
echo "agent.sh: no host $address in this lab" >&2
exit 255
