"""Checks of the exercises in the notebooks."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def check(what: str) -> Iterator[None]:
    """Print whether the reader's code passes the assertions within; never raise.

    Parameters
    ----------
    what : str
        What the assertions show if they pass.
    """
    try:
        yield
    except Exception as error:  # from the reader's code, or an assertion about it
        print(f"not yet: {error}" if str(error) else f"not yet: {type(error).__name__}")
    else:
        print(f"right: {what}")
