"""The suite as pytest's tests.

To run them: ``pytest --pyargs lvxattn.check.conformance --lvx-impl module:function``.
"""

from lvxattn.check.pytest_cases import Chosen, JudgedCase


def test_attention(xattn_judged: JudgedCase) -> None:
    """One case, in one dtype, with one seed."""
    xattn_judged.hold()


def test_something_was_judged(xattn_chosen: Chosen) -> None:
    """What all of them together have to show."""
    xattn_chosen.hold()
