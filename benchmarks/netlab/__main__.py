"""Run an MPI program on a cluster of shaped links on this machine; say what each host sent.

    python benchmarks/netlab --hosts 4 --rate 50mbit -- python -m mpi4py PROGRAM

The exit status is the program's, or 2 where no cluster can be built.
"""

import argparse
import sys

from lab import Lab, LabError


def main() -> int:
    """Build the cluster, run the program, print bytes to stderr."""
    parser = argparse.ArgumentParser(prog="netlab", description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--rate", default="1gbit", help="of each host's link: 50mbit, 1gbit")
    parser.add_argument("--ranks-per-host", type=int, default=1)
    parser.add_argument("--placement", choices=["block", "cyclic"], default="block")
    parser.add_argument(
        "--shared",
        action="append",
        default=[],
        metavar="FOLDER",
        help="below /tmp or /dev/shm, of which each host has its own: all hosts see this machine's",
    )
    parser.add_argument("command", nargs="+", help="put -- before it")
    options = vars(parser.parse_args())
    command = options.pop("command")
    try:
        with Lab(**options) as lab:
            status = lab.mpiexec(command, capture=False).returncode
            for host, sent in enumerate(lab.bytes_sent()):
                print(f"host{host} sent {sent:,} bytes", file=sys.stderr)
            return status
    except (LabError, ValueError) as reason:
        print(f"netlab: {reason}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
