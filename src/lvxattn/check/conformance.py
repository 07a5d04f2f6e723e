"""The suite as pytest tests.

Run ``pytest --pyargs lvxattn.check.conformance --lvx-impl module:function``.
"""

from lvxattn.check.pytest_cases import Chosen, JudgedCase


def test_attention(xattn_judged: JudgedCase) -> None:
    """Judge one case, in one dtype, with one seed."""
    xattn_judged.assert_passed()


def test_something_was_judged(xattn_chosen: Chosen) -> None:
    """Fail if nothing was judged."""
    xattn_chosen.assert_passed()
