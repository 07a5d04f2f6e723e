"""The files that MPICH shares memory through: this job's own, and those that nobody maps."""

import mmap
import os
from pathlib import Path

import pytest

from lvxattn.common import shared_memory
from lvxattn.common.shared_memory import unlink_own_file, unmapped_files

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
