"""Exercises in the notebooks: a stub, a check that says what is wrong, a folded answer."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def check(what: str) -> Iterator[None]:
    """Say whether the reader's code does what is asked for; a notebook goes on in either case.

    Parameters
    ----------
    what : str
        What has been shown once all within has passed.
    """
    try:
        yield
    except Exception as error:  # whatever the reader's code, or an assertion about it, may raise
        print(f"not yet: {error}" if str(error) else f"not yet: {type(error).__name__}")
    else:
        print(f"right: {what}")
