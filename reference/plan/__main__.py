"""``python -m lvxattn.reference.plan``: what a schedule costs, before there is a cluster."""

import sys

from lvxattn.reference.plan.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
