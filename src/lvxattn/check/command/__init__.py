"""The oracle's command line: ``python -m lvxattn.check``.

============  ===================================================================
`entry`       the parser, and which of the following it is
`checking`    a suite on a function
`one_case`    one case, everything about it, and its tensors in a file
`listing`     the cases
`golden`      golden files, written and verified
`proof`       ``self-test``
`arguments`   what the user gave, looked at before anything is done
`ranks`       who speaks, and how all ranks end alike
============  ===================================================================
"""

from lvxattn.check.command.entry import main
from lvxattn.check.command.ranks import leave

__all__ = ["leave", "main"]
