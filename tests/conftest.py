"""What all tests share: hypothesis draws the same examples on every run, and takes its time."""

import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
settings.load_profile("fixed")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT interrupts this process and what it starts.

    Shells start programs in the background with SIGINT ignored, and children inherit that.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
