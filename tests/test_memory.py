"""Memory: what is free, what a pass needs, and the refusal of what does not fit."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from lvxattn.common import handshake
from lvxattn.common.free_memory import IGNORE, check_memory, free_memory, judge
from lvxattn.reference import Layout, run_ranks
from tests.commands import commands
from tests.launch import PROGRAMS, mpiexec

GB = 10**9
HOST = "MemTotal: 32000 kB\nMemFree: 10 kB\nMemAvailable: 20000 kB\nSwapFree: 900 kB\n"
BELOW = {  # 1,000 in use of 5,000, 300 of it pages of files and the like
    2: {
        "memory.max": "5000",
        "memory.current": "1000",
        "memory.stat": "file 7\ninactive_file 200\nactive_file 60\nslab_reclaimable 40",
    },
    1: {
        "memory.limit_in_bytes": "5000",
        "memory.usage_in_bytes": "1000",
        "memory.stat": "inactive_file 7\ntotal_inactive_file 200\ntotal_active_file 60\n"
        "slab_reclaimable 40",
    },
}
NO_LIMIT = {2: {"memory.max": "max"}, 1: {"memory.limit_in_bytes": str(2**63 - 4096)}}


def system(root: Path, files: dict[str, dict[str, str]], cgroup: str = "3:cpuset:/") -> Path:
    """Write files as Linux has them below a folder."""
    always = {"proc": {"meminfo": HOST}, "proc/self": {"cgroup": cgroup}}
    for folder, texts in (always | files).items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (root / folder / name).write_text(text + "\n")
    return root


def test_free_memory_of_a_host_without_limits(tmp_path: Path) -> None:
    assert free_memory(system(tmp_path, {})) == {"": 20000 * 1024}


@pytest.mark.parametrize(
    ("version", "line", "folder"),
    [
        (2, "0::/user/job", "sys/fs/cgroup/user/job"),
        (2, "0::/user/job", "sys/fs/cgroup/user"),  # a limit above
        (2, "0::/of/the/host", "sys/fs/cgroup"),  # in a container
        (1, "4:memory:/user/job", "sys/fs/cgroup/memory/user/job"),
        (1, "9:cpu,memory:/", "sys/fs/cgroup/memory"),
    ],
)
def test_limit_of_a_cgroup_counts(tmp_path: Path, version: int, line: str, folder: str) -> None:
    root = system(tmp_path, {folder: BELOW[version]}, f"3:cpuset:/elsewhere\n{line}")
    free = free_memory(root)
    assert free is not None
    assert sorted(free.values()) == [4300, 20000 * 1024]


@pytest.mark.parametrize("version", [1, 2])
def test_cgroup_without_a_limit_is_passed_by(tmp_path: Path, version: int) -> None:
    base = {1: "sys/fs/cgroup/memory", 2: "sys/fs/cgroup"}[version]
    full = NO_LIMIT[version] | {"memory.current": "1000", "memory.usage_in_bytes": "1000"}
    root = system(tmp_path, {base: full}, {1: "4:memory:/", 2: "0::/"}[version])
    free = free_memory(root)
    assert free is not None
    assert min(free.values()) == 20000 * 1024


def test_system_that_does_not_say_refuses_nothing(tmp_path: Path) -> None:
    assert free_memory(tmp_path) is None
    assert judge(["a"], [1e20], [None], "") == "100,000,000,000.0 GB a rank"


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="not Linux")
def test_free_memory_of_this_host_is_below_all() -> None:
    free, pages = free_memory(), os.sysconf("SC_PHYS_PAGES")
    assert free is not None
    assert 0 < min(free.values()) < pages * os.sysconf("SC_PAGE_SIZE")


def host_rooms(*sizes: float) -> list[dict[str, int]]:
    """Return what is free on hosts without cgroups, given in GB."""
    return [{"": int(size * GB)} for size in sizes]


def test_ranks_of_one_host_share_its_memory() -> None:
    hosts, needs = ["a", "b", "a"], [2.0 * GB, 3.0 * GB, 1.5 * GB]
    assert judge(hosts, needs, host_rooms(4.0, 9.0, 3.6), "") == (
        "3.0 GB a rank; 3.6 GB is free for 2 ranks on a"
    )
    with pytest.raises(
        MemoryError,
        match=r"^memory: expected at most 3\.4 GB, which is free, for 2 ranks on a, got 3\.5 GB, "
        r"of which rank 0 needs 2\.0 GB; use more hosts, or set LVXATTN_IGNORE_MEMORY=1$",
    ):
        judge(hosts, needs, host_rooms(4.0, 9.0, 3.4), "use more hosts")


@pytest.mark.parametrize("shared", [False, True])
def test_ranks_of_one_cgroup_share_its_limit(shared: bool) -> None:
    # Two containers of one host, with a limit each or together.
    rooms = [{"": 9 * GB, "cgroup 1": 2 * GB}, {"": 9 * GB, f"cgroup {2 - shared}": 2 * GB}]
    if not shared:
        line = judge(["a", "a"], [int(1.5 * GB), GB], rooms, "")
        assert line == "1.5 GB a rank; 2.0 GB is free for 1 rank on a"
        return
    with pytest.raises(MemoryError, match=r"at most 2\.0 GB, .* for 2 ranks on a, got 2\.5 GB"):
        judge(["a", "a"], [int(1.5 * GB), GB], rooms, "")


def test_check_can_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(IGNORE, "1")
    assert free_memory(system(tmp_path, {})) is None
    # By one rank for all of its host: the others must not raise alone.
    assert judge(["a", "a"], [2 * GB, 2 * GB], [{"": GB}, None], "") == "2.0 GB a rank"


@pytest.mark.skipif(free_memory() is None, reason="the system does not say what is free")
def test_all_ranks_raise_together() -> None:
    def attempt(comm: object) -> str:
        with pytest.raises(MemoryError) as caught:
            check_memory(2**60, comm, "give less")  # type: ignore[arg-type]
        return str(caught.value)

    first, *others = run_ranks(3, attempt)
    assert "rank 0 needs 1,152,921,504.6 GB; give less" in first
    assert others == [first, first]


@pytest.mark.parametrize("size", ["large", "small"])
def test_layout_refuses_what_does_not_fit(monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    monkeypatch.setattr(handshake, "free_memory", lambda: {"": 1000})

    def agree(comm: object) -> object:
        rows = handshake.LARGE // 64 if size == "large" else 8
        q = np.broadcast_to(np.float32(0), (1, 1, rows, 64))  # takes no memory
        return Layout.agree(q, q, q, comm)  # type: ignore[arg-type]

    if size == "small":  # for which nobody asks
        assert len(run_ranks(2, agree)) == 2
        return
    with pytest.raises(MemoryError, match=r"^memory: expected at most .* for 2 ranks on .*hosts"):
        run_ranks(2, agree)


@pytest.mark.mpi
@pytest.mark.parametrize("P", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_pass_needs_at_least_what_is_said(P: int) -> None:
    ended = mpiexec(P, PROGRAMS / "run_memory.py", "lv-xattn", "ring", "gather", "ulysses")
    assert ended.status == 0, ended.err
    for rank in json.loads(ended.out):
        for what, need, peak in rank:
            assert need <= peak, what
            assert peak < 7 * need + 2**24, what  # copies, and tiles


# Command lines that need more than any machine has, and what to change.
TOO_LARGE = {
    "mpi_impl": [
        (["run", "--visual-tokens", 10**13], "give fewer --frames, --visual-tokens"),
        (["run", "--visual-tokens", 10**13, "--backward", "--schedule", "auto"], "give fewer"),
        (["demo", "--frames", 10**12, "--output", "demo.png"], "give fewer --frames"),
        (["measure", "--heads", 10**7, "--head-dim", 10**5, "--output", "m.json"], "fewer --heads"),
    ],
    "torch_impl": [
        (["train", "--batch", 10**12, "--output", "{}"], "give fewer --frames, a smaller --batch"),
        (["model", "--model", "llama3v", "--frames", 10**12], "give a smaller --size or fewer"),
    ],
}


# Elsewhere nothing is refused.
@pytest.mark.skipif(free_memory() is None, reason="the system does not say what is free")
@pytest.mark.mpi
@pytest.mark.parametrize("implementation", TOO_LARGE)
def test_commands_refuse_what_does_not_fit(implementation: str, tmp_path: Path) -> None:
    if implementation == "torch_impl":
        pytest.importorskip("torch")
        pytest.importorskip("transformers")
    lines = [[str(w).format(tmp_path) for w in line] for line, _ in TOO_LARGE[implementation]]
    said = commands(2, *lines, implementation=implementation)
    for (line, change), each in zip(TOO_LARGE[implementation], said, strict=True):
        assert each.status == 2
        assert not each.out.strip(), line
        expected = r"lvxattn \w+: error: memory: expected at most [\d.,]+ GB, which is free, for 2 "
        assert re.match(expected, each.err), each.err
        assert change in each.err
        assert each.err.count("\n") == 1


@pytest.mark.skipif(free_memory() is None, reason="the system does not say what is free")
@pytest.mark.mpi
def test_run_says_what_it_needs_before_it_works() -> None:
    (said,) = commands(2, ["run", "--visual-tokens", 4096, "--check"])
    assert re.search(r"memory    at least 0\.\d+ GB a rank; [\d.]+ GB is free for 2 r", said.out)
