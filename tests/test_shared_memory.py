"""The files that MPICH shares memory through: this job's own, and those that nobody maps."""

import mmap
import os
import time
from pathlib import Path

import pytest

from lvxattn.common import shared_memory
from lvxattn.common.shared_memory import unlink_own_file, unmapped_files
from tests import launch

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc")


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder in place of /dev/shm, with two files of jobs, the later one older, and another."""
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path)
    for seconds, name in enumerate(("mpich_shm_b_0", "mpich_shm_a_0", "other")):
        (tmp_path / name).write_bytes(bytes(mmap.PAGESIZE))
        os.utime(tmp_path / name, (seconds, seconds))
    return tmp_path


def test_unmapped_files_are_those_that_no_process_maps(folder: Path) -> None:
    assert unmapped_files() == [folder / "mpich_shm_b_0", folder / "mpich_shm_a_0"]
    with open(folder / "mpich_shm_b_0", "r+b") as file, mmap.mmap(file.fileno(), 0):
        assert unmapped_files() == [folder / "mpich_shm_a_0"]


def test_file_that_is_mapped_after_a_moment_is_not_swept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, mine = time.time(), folder / "mpich_shm_c_0"
    monkeypatch.setattr(launch, "BEGAN", began - 60)
    os.utime(folder / "mpich_shm_a_0", (began, began))  # b's is older than the tests
    mine.write_bytes(bytes(mmap.PAGESIZE))
    mapped, slept = list[mmap.mmap](), list[float]()

    def map_it(seconds: float) -> None:
        slept.append(seconds)
        with open(mine, "r+b") as file:
            mapped.append(mmap.mmap(file.fileno(), 0))

    monkeypatch.setattr(launch.time, "sleep", map_it)
    launch.sweep()
    mapped.pop().close()
    assert len(slept) == 1
    assert 0 < slept[0] <= 1
    assert {path.name for path in folder.iterdir()} == {"mpich_shm_b_0", "mpich_shm_c_0", "other"}


def test_unlinked_file_stays_mapped(folder: Path) -> None:
    with (
        open(folder / "mpich_shm_b_0", "r+b") as file,
        mmap.mmap(file.fileno(), 0) as memory,
        open(folder / "other", "r+b") as other,
        mmap.mmap(other.fileno(), 0),
    ):
        unlink_own_file()
        assert {path.name for path in folder.iterdir()} == {"mpich_shm_a_0", "other"}
        memory[0] = 1
        assert memory[0] == 1
        unlink_own_file()  # its name in maps now ends in "(deleted)"
