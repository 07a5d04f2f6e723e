"""Command line: ``python -m lvxattn.check package.module:function``."""

import os
import sys

from lvxattn.check.command import leave, main

if __name__ == "__main__":
    try:
        status = main()
        leave()
    except BrokenPipeError:  # the reader of the table, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)
