"""Format an error of the checked function in one line, with its place in the user's code."""

import sysconfig
import traceback
from pathlib import Path

_LONGEST = 300  # characters of a message


def describe_error(error: BaseException) -> str:
    """Return an error's type, its message, and the line of the user's code that raised it.

    That is the innermost line outside the check and installed packages, or else the innermost one
    outside the check.
    """
    text = ": ".join(part for part in (type(error).__name__, one_line(error)) if part)
    places = [
        (frame.filename, frame.lineno)
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(_OURS)
    ]
    if not places:  # the call itself failed
        return (
            f"{text}; it was called as fn(q, k, v, *, scale, mask), or its backward as "
            "backward(dout, q, k, v, out, lse, *, scale, mask), distributed ones with comm after "
            "the arrays"
        )
    own = [place for place in places if not place[0].startswith(_INSTALLED)]
    filename, line = (own or places)[-1]
    return f"{text} ({filename}:{line})"


def one_line(text: object) -> str:
    """Return a text, or an error's message, as one line of limited length."""
    try:
        words = " ".join(str(text).split())
    except Exception as error:  # the error's class is the user's, too
        words = f"a message that raises {type(error).__name__}"
    if len(words) <= _LONGEST:
        return words
    return f"{words[: _LONGEST // 2]} ... {words[-_LONGEST // 2 :]}"  # the cause often comes last


_FOLDER = Path(__file__).parent
_OURS = tuple(
    str(_FOLDER / name)
    for name in (
        "suite.py",
        "distributed.py",
        "ranks",
        "call_kernel.py",
        "time_limit.py",
        "case_arrays.py",
        "frameworks",
    )
)
_INSTALLED = (*map(sysconfig.get_path, ("stdlib", "purelib", "platlib")), "<frozen ")
