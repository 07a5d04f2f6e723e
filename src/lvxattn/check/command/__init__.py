"""The oracle's command line: ``python -m lvxattn.check``.

============  =====================================================================
`entry`       the parser, and the subcommands ``golden`` and ``self-test``
`checking`    a suite on a function; one case, in detail and in a file; the list
`launched`    ``--distributed``: which process prints, and one exit status for all
============  =====================================================================
"""

from lvxattn.check.command.entry import main
from lvxattn.check.command.launched import leave

__all__ = ["leave", "main"]
