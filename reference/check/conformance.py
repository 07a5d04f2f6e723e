"""The suite as pytest's tests.

To run them: ``pytest --pyargs lvxattn.reference.check.conformance --lvx-impl module:function``.
"""

from lvxattn.reference.check.pytest_cases import JudgedCase


def test_attention(xattn_judged: JudgedCase) -> None:
    """One case, in one dtype, with one seed."""
    xattn_judged.hold()
