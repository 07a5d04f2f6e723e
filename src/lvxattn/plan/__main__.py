"""``python -m lvxattn.plan``: what a schedule costs, before there is a cluster."""

import sys

from lvxattn.plan.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
