"""Match the contents of an error message, regardless of its wording.

The exact text of a message is asserted once, in the test nearest to where it is raised.  All other
tests use `says`.
"""

import re


def says(argument: str, *values: object, rank: int | None = None, of: int = 0) -> str:
    """Return a pattern for messages that begin with an argument and contain values and a rank."""
    contained = "".join(rf"(?=.*(?<!\w){re.escape(str(value))}(?!\w))" for value in values)
    end = "" if rank is None else rf".*\(on rank {rank} of {of}\)$"
    return rf"(?s)^{re.escape(argument)}: {contained}{end}"
