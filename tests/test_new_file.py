"""Files are written as a whole or not at all, and only regular files are read and written."""

import errno
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lvxattn.common import new_file as module
from lvxattn.common.new_file import check_target, new_file, write_file
from lvxattn.common.regular_file import open_regular
from lvxattn.plan.machine import MACHINES, Machine
from tests.full_disk import full_disk
from tests.launch import PROGRAMS, environment, mpiexec, until

OLD = "what was there"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A file that is there, in a folder of its own."""
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    path.write_text(OLD)
    return path


def names(path: Path) -> list[str]:
    """Return the names of all files beside a file."""
    return sorted(file.name for file in path.parent.iterdir())


@pytest.mark.parametrize("content", ["text, é\n", b"\x00bytes"])
def test_content_replaces_file(target: Path, content: str | bytes) -> None:
    write_file(target, content)
    assert target.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert names(target) == ["file"]


def test_target_is_old_file_until_block_ends(target: Path) -> None:
    with new_file(target) as file:
        file.write(b"new")
        file.flush()
        assert target.read_text() == OLD
        (other,) = {*names(target)} - {"file"}
        assert Path(file.name) == target.parent / other
    assert target.read_text() == "new"


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_mode_is_kept(target: Path, mode: int) -> None:
    target.chmod(mode)
    with new_file(target) as file:
        assert stat.S_IMODE(os.stat(file.name).st_mode) == mode
    assert stat.S_IMODE(target.stat().st_mode) == mode


def test_new_file_has_default_mode(target: Path) -> None:
    before = os.umask(0o027)
    try:
        write_file(target.with_name("new"), "")
    finally:
        os.umask(before)
    assert stat.S_IMODE(target.with_name("new").stat().st_mode) == 0o640


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to give files away")
def test_owner_is_kept(target: Path) -> None:
    os.chown(target, 12345, 54321)
    write_file(target, "new")
    assert (target.stat().st_uid, target.stat().st_gid) == (12345, 54321)


def test_group_is_kept_where_the_owner_may_not_be(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = list[int]()

    def fchown(_: int, owner: int, group: int) -> None:
        if owner != -1:
            raise PermissionError
        given.append(group)

    monkeypatch.setattr(os, "fchown", fchown)
    write_file(target, "new")
    assert given == [target.stat().st_gid]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write every file")
def test_read_only_file_is_refused(target: Path) -> None:
    target.chmod(0o400)
    with pytest.raises(PermissionError):
        write_file(target, "new")
    assert target.read_text() == OLD


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_error_leaves_old_file_only(target: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with new_file(target) as file:
            file.write(b"part")
            raise error

    with pytest.raises(error):
        fail()
    assert (target.read_text(), names(target)) == (OLD, ["file"])


def test_full_disk_is_named_and_leaves_old_file(target: Path) -> None:
    with full_disk(4096), pytest.raises(OSError, match="File too large") as told:
        write_file(target, "x" * 10_000)
    assert told.value.filename == str(target)
    assert (target.read_text(), names(target)) == (OLD, ["file"])


def test_complete_file_that_cannot_be_renamed_stays(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*names: str) -> None:
        raise OSError(errno.EBUSY, "busy", names[0], None, names[1])

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="busy; the complete file is ") as told:
        write_file(target, "new")
    assert told.value.filename == str(target)
    assert target.read_text() == OLD
    (left,) = {*names(target)} - {"file"}
    assert told.value.strerror == f"busy; the complete file is {target.parent / left}"
    assert (target.parent / left).read_text() == "new"


KILLED = """
import os, signal, sys
from lvxattn.common.new_file import new_file
with new_file(sys.argv[1]) as file:
    file.write(b"part")
    file.flush()
    print("written", flush=True)
    os.kill({who}, signal.{signal})
    signal.pause()
"""


@pytest.mark.parametrize("who", ["os.getpid()", "0"], ids=["process", "its group"])
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGHUP"])
def test_killed_writer_leaves_old_file_only(target: Path, who: str, name: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", KILLED.format(who=who, signal=name), str(target)],
        env=environment(),
        capture_output=True,
        text=True,
        start_new_session=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == -getattr(signal, name), ended.stderr
    assert ended.stdout == "written\n"
    assert until(lambda: names(target) == ["file"])
    assert target.read_text() == OLD


def test_dead_guard_is_not_missed(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.subprocess, "Popen", dying)
    write_file(target, "new")
    assert (target.read_text(), names(target)) == ("new", ["file"])


def dying(command: list[str], **options: object) -> "subprocess.Popen[bytes]":
    """Start a guard that ends at once."""
    process: subprocess.Popen[bytes] = REAL(["/bin/sh", "-c", "exit 1"], **options)
    process.wait()
    return process


REAL = subprocess.Popen


def test_no_process_left_is_no_error(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError

    monkeypatch.setattr(module.subprocess, "Popen", refuse)
    write_file(target, "new")
    assert (target.read_text(), names(target)) == ("new", ["file"])


def test_planted_link_is_not_followed(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "token_hex", lambda _: "guessed")
    planted = target.with_name(".lvxattn-guessed")
    for victim in (target.with_name("victim"), target.with_name("nothing")):
        planted.symlink_to(victim)
        with pytest.raises(FileExistsError) as told:
            write_file(target, "new")
        assert told.value.filename == str(target)
        assert planted.is_symlink()
        assert not victim.exists()
        planted.unlink()
    assert target.read_text() == OLD


def test_link_is_written_through(target: Path) -> None:
    link, dangling = target.with_name("link"), target.with_name("dangling")
    link.symlink_to("file")
    dangling.symlink_to("later")
    target.chmod(0o600)
    write_file(link, "new")
    write_file(dangling, "later")
    assert target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert target.with_name("later").read_text() == "later"
    assert link.is_symlink()
    assert dangling.is_symlink()
    assert names(target) == ["dangling", "file", "later", "link"]


def irregular(folder: Path) -> dict[str, Path]:
    """Make one of each kind of file that is no regular one."""
    os.mkfifo(folder / "fifo")
    (folder / "linked").symlink_to("fifo")
    (folder / "loop").symlink_to("loop")
    server = socket.socket(socket.AF_UNIX)
    try:
        server.bind(os.path.relpath(folder / "socket"))  # the path of a socket may not be long
    finally:
        server.close()
    return {
        "a directory": folder,
        "a FIFO": folder / "fifo",
        "a FIFO ": folder / "linked",
        "a socket": folder / "socket",
        "a device": Path("/dev/null"),
    }


@pytest.mark.parametrize(
    "use",
    [
        lambda path: write_file(path, "new"),
        check_target,
        lambda path: open_regular(path).close(),
        Machine.load,
    ],
    ids=["write", "check", "read", "machine"],
)
def test_irregular_file_is_refused_at_once(
    use: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for kind, path in irregular(tmp_path).items():
        with pytest.raises(OSError, match=f"expected a regular file, got {kind.strip()}") as told:
            use(path)
        assert told.value.filename == str(path)
    for path in (tmp_path / "loop", tmp_path / "fifo" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(OSError, match=r"nowhere|symbolic links|a directory|name too long"):
            use(path)


def test_file_that_becomes_a_fifo_before_it_is_opened_is_refused(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    regular, fifo = target.stat(), target.with_name("fifo")
    os.mkfifo(fifo)
    with monkeypatch.context() as before:
        before.setattr(os, "stat", lambda _: regular)
        with pytest.raises(OSError, match="expected a regular file, got a FIFO"):
            open_regular(fifo).close()


def test_checking_leaves_everything_as_it_is(target: Path) -> None:
    link = target.with_name("link")
    link.symlink_to("later")
    before = target.stat().st_ino, target.stat().st_mtime_ns
    for path in (target, link, target.with_name("new")):
        check_target(path)
    assert names(target) == ["file", "link"]
    assert target.read_text() == OLD
    assert (target.stat().st_ino, target.stat().st_mtime_ns) == before
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        check_target(target.parent / "nowhere" / "file")


def test_two_writers_at_once_leave_one_of_their_files(target: Path) -> None:
    with new_file(target) as first, new_file(target) as second:
        for n in range(100):
            for file in (first, second)[:: 1 if n % 2 else -1]:
                file.write(b"first\n" if file is first else b"second\n")
                file.flush()
    assert target.read_bytes() == b"first\n" * 100  # whose block ended last
    assert names(target) == ["file"]


def test_readers_beside_a_writer_find_whole_files(target: Path) -> None:
    machines = [MACHINES["h100"], MACHINES["a30-8"]]
    machines[0].save(target)
    reading = threading.Event()
    reading.set()

    def write() -> None:
        while reading.is_set():
            for machine in machines[::-1]:
                machine.save(target)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        found = {Machine.load(target).name for _ in range(500)}
        assert until(lambda: Machine.load(target).name == "a30-8")
    finally:
        reading.clear()
        writer.join()
    assert found <= {"h100", "a30-8"}


@pytest.mark.mpi
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_rank_leaves_no_part_of_the_output(rank: int, target: Path) -> None:
    ended = mpiexec(2, PROGRAMS / "run_killed.py", str(rank), str(target))
    assert ended.status != 0
    assert f"rank {rank} has the output" in ended.out
    assert until(lambda: names(target) == ["file"])
    assert target.read_text() == OLD
    assert not ended.left
