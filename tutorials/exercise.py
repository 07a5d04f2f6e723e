"""Exercises in the notebooks: a stub, a check that prints what is wrong, a folded answer."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def check(what: str) -> Iterator[None]:
    """Print whether the reader's code passes its check; the notebook continues in either case.

    Parameters
    ----------
    what : str
        What a passed check shows.
    """
    try:
        yield
    except Exception as error:  # of the reader's code, or of an assertion
        print(f"not yet: {error}" if str(error) else f"not yet: {type(error).__name__}")
    else:
        print(f"right: {what}")
