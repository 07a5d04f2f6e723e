"""What all tests share: hypothesis draws the same examples on every run, and takes its time."""

import os
import signal
from collections.abc import Iterator
from contextlib import suppress

import numpy as np  # noqa: F401 - its BLAS must be there to be limited
import pytest
from hypothesis import settings

from tests.launch import sweep

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of PyTorch, which is not there yet

with suppress(ImportError):  # on a machine with a GPU nobody has chosen the packages
    from threadpoolctl import threadpool_limits

    # Products are small here, and two threads on a busy machine wait for one another.
    threadpool_limits(1, "blas")

settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
settings.load_profile("fixed")

# What takes longest begins first, or one process would be left alone with it in the end.
LONGEST = ["test_exercises", "test_ranks", "test_torch_run", "test_torch_faults", "test_train"]
LONGEST += ["test_faults", "test_torch", "test_check_distributed", "test_check_wrong"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first."""
    rank = {f"{name}.py": n for n, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(scope="session", autouse=True)
def no_shared_memory_is_left() -> Iterator[None]:
    """Remove, in the end, the shared memory of ranks that this run has killed."""
    yield
    sweep()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT interrupts this process and what it starts.

    Shells start programs in the background with SIGINT ignored, and children inherit that.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
