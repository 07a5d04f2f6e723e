"""Run a program on a cluster of shaped links on this machine; say what each host sent.

    python benchmarks/netlab --hosts 4 --rate 50mbit -- python -m mpi4py PROGRAM
    python benchmarks/netlab --hosts 2 --ssh --slurm --on 0 -- bash

The first runs the program on MPI ranks, and the second one command on a host.  The cluster ends
with it.  The exit status is the program's, or 2 where no cluster can be built.
"""

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # a folder that is run has no package

from netlab.lab import Lab, LabError  # noqa: E402
from netlab.slurm import Slurm  # noqa: E402
from netlab.ssh import SSH  # noqa: E402


def main() -> int:
    """Build the cluster, run the program, print bytes to stderr."""
    parser = argparse.ArgumentParser(
        prog="netlab",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument(
        "--rate", default="1gbit", help="of each host's link: 50mbit; or one for each: 1gbit,50mbit"
    )
    parser.add_argument("--ranks-per-host", type=int, default=1)
    parser.add_argument("--placement", choices=["block", "cyclic"], default="block")
    parser.add_argument(
        "--shared",
        action="append",
        default=[],
        metavar="FOLDER",
        help="below /tmp or /dev/shm, of which each host has its own: all hosts see this machine's",
    )
    parser.add_argument(
        "--on", type=int, metavar="HOST", help="run the command once, on this host (0, 1, ...)"
    )
    parser.add_argument("--ssh", action="store_true", help="with an SSH server on every host")
    parser.add_argument("--slurm", action="store_true", help="with Slurm on the hosts")
    parser.add_argument("command", nargs="+", help="put -- before it")
    options = vars(parser.parse_args())
    command, host = options.pop("command"), options.pop("on")
    services = [Class for Class in (SSH, Slurm) if options.pop(Class.__name__.lower())]
    if "," in options["rate"]:
        options["rate"] = options["rate"].split(",")
    try:
        if host is not None and not 0 <= host < options["hosts"]:
            raise ValueError(f"--on: expected 0 to {options['hosts'] - 1}, got {host}")
        with ExitStack() as stack:
            lab = stack.enter_context(Lab(**options))
            env = {}
            for service in [stack.enter_context(Class(lab)) for Class in services]:
                env.update(service.environment)
            if host is None:
                done = lab.mpiexec(command, capture=False, env=env)
            else:
                done = lab.run(host, command, capture=False, env=env, stdin=None)
            for i, sent in enumerate(lab.bytes_sent()):
                print(f"host{i} sent {sent:,} bytes", file=sys.stderr)
            return done.returncode
    except (LabError, ValueError) as reason:
        print(f"netlab: {reason}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
