"""What an error of the checked function means, in one line, with its place in the user's code."""

import re
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path

from lvxattn.check.one_call import BackwardError, ContractError
from lvxattn.check.time_limit import EndedError, TimeIsUpError

_LONGEST = 300  # characters of a message
# In errors by which functions refuse values of another size than keys in their own words, unlike
# those of a library in which shapes turn out not to fit.
_REFUSED = re.compile(
    r"Error: .*\b(head[ _]?(dim|size)|heads?_dim|value[ _]?(dim|size|head)|d_?v\b|embed|same head"
    r"|last dim|q/k/v|qk?, ?k,? ?(and )?v)",
    re.IGNORECASE,
)


def failure_of(error: BaseException) -> tuple[str, str]:
    """Return the status and the one-line message of an error; a KeyboardInterrupt is raised."""
    if isinstance(error, KeyboardInterrupt):
        raise error
    if isinstance(error, BackwardError) and error.__cause__ is not None:
        status, message = failure_of(error.__cause__)
        own = isinstance(error.__cause__, ContractError)  # which names the result
        return status, message if own else f"the backward: {message}"
    if isinstance(error, NotImplementedError):
        return "unsupported", one_line(error) or "NotImplementedError"
    if isinstance(error, ContractError | TimeIsUpError):
        return "error", one_line(error)
    cause = error.__cause__ if isinstance(error, EndedError) else None
    return "error", describe_error(cause or error)


def refuses_value_size(message: str) -> bool:
    """Whether an error is about the size of values: the function's own way to refuse it."""
    return bool(_REFUSED.search(message))


def describe_error(error: BaseException) -> str:
    """Return an error's type, its message, and the line of the user's code that raised it.

    That is the innermost line outside the check and installed packages, or else the innermost one
    outside the check.
    """
    text = ": ".join(part for part in (type(error).__name__, one_line(error)) if part)
    frames = traceback.extract_tb(error.__traceback__)
    place = users_place([(frame.filename, frame.lineno) for frame in frames])
    if not place:  # the call itself failed
        return (
            f"{text}; it was called as fn(q, k, v, *, scale, mask), or its backward as "
            "backward(dout, q, k, v, out, lse, *, scale, mask), distributed ones with comm after "
            "the arrays"
        )
    return f"{text} ({place})"


def users_place(frames: Iterable[tuple[str, int | None]]) -> str:
    """Return the innermost place outside the check, of the user's code if there is one.

    Parameters
    ----------
    frames : iterable of (str, int)
        Files and lines; outermost first.
    """
    places = [place for place in frames if not place[0].startswith(_OURS)]
    own = [place for place in places if not place[0].startswith(_INSTALLED)]
    return "{}:{}".format(*(own or places)[-1]) if places else ""


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
        "callers",
        "call_kernel.py",
        "one_call.py",
        "surroundings.py",
        "time_limit.py",
        "case_arrays.py",
        "frameworks",
    )
)
_INSTALLED = (*map(sysconfig.get_path, ("stdlib", "purelib", "platlib")), "<frozen ")
