"""``python -m lvxattn.plan``: the cost of each schedule on a cluster."""

import sys

from lvxattn.cli.plan import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
