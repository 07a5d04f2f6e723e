"""The PyTorch command line under torchrun: its process group, threads, devices and exit.

What it shares with the MPI command line is tested in test_run.py, on both.
"""

# ruff: noqa: E402 - what follows needs torch

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from lvxattn.cli import InputError
from lvxattn.cli.tensors import dtype_of
from lvxattn.torch_impl.__main__ import main
from lvxattn.torch_impl.commands import processes
from lvxattn.torch_impl.commands.processes import (
    SIZES,
    choose_device,
    limit_threads,
    lost_ranks,
    user_set_threads,
    world,
)
from lvxattn.torch_impl.commands.run import Backend
from lvxattn.torch_impl.group import Group, over_cpu
from tests.errors import says
from tests.launch import PROGRAMS
from tests.test_processes import LAUNCHERS, child
from tests.torchrun import torchrun

SMALL = ["--text-tokens", "19", "--visual-tokens", "100", "--head-dim", "8", "--heads", "4"]
MODULE = "-m", "lvxattn.torch_impl"
ALONE = Group(None)


def test_torchrun_leaves_no_process(tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    ended = torchrun(
        2, *MODULE, "run", *SMALL, "--backward", "--check", "--json", tmp_path / "all.json",
        env={"OMP_NUM_THREADS": str(cores)},
    )  # fmt: skip
    assert (ended.status, ended.err, ended.left) == (0, "", ())
    assert ended.out.count("LV-XAttn run\n") == 1  # rank 0's, once
    assert "all checks passed" in ended.out
    report = json.loads((tmp_path / "all.json").read_text())
    assert [rank["threads"] for rank in report["ranks"]] == [cores] * 2  # as the user has it


@pytest.mark.slow
def test_bad_input_is_printed_first_under_torchrun() -> None:
    ended = torchrun(2, PROGRAMS / "torch_refuse.py", "run", "--head-dim", "0")
    assert ended.status == 1  # torchrun's own: the ranks' is in its report
    first, report = ended.err.split("\n", 1)
    assert re.fullmatch(r"lvxattn run: error: argument --head-dim: .*'0' \(on all ranks\)", first)
    assert re.search(r"Root Cause.*\n\[0\]:\n(  .*\n)*  exitcode  : 2 ", report)
    assert "lvxattn run: error" not in report  # once, not once a rank
    assert "torch_impl/" not in report  # no traceback of ours
    assert (ended.out, ended.left) == ("", ())


@pytest.mark.slow
def test_threads_are_shared_and_waits_time_out(tmp_path: Path) -> None:
    env: dict[str, str | None] = {"LVXATTN_TIMEOUT": "2", "OMP_NUM_THREADS": None}
    ended = torchrun(2, PROGRAMS / "torch_world.py", tmp_path / "done", env=env)
    assert ended.status == 0, ended.err
    report = json.loads(ended.out)
    assert report["threads"] == 4  # of 8 cores; torchrun said 1
    assert 1.5 < report["waited"] < 30
    assert report["said"].startswith("rank 0 of 2 ")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Return an environment without a launcher; restores the number of threads."""
    for name in (*SIZES, "RANK", "MASTER_ADDR", "LVXATTN_TIMEOUT", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    yield monkeypatch
    torch.set_num_threads(threads)


def test_one_rank_without_torchrun(
    alone: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *SMALL, "--check", "--backward"]) == 0
    said = capsys.readouterr()
    assert "lv-xattn on 1 rank," in said.out
    assert not torch.distributed.is_initialized()


def test_launched_world_of_one_is_destroyed(
    alone: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "localhost")):
        alone.setenv(name, value)
    alone.setenv("MASTER_PORT", "0")
    with world() as group:
        assert torch.distributed.is_initialized()
        with world() as same:  # used, and left alone
            assert same.group == group.group
        assert torch.distributed.is_initialized()
    assert not torch.distributed.is_initialized()
    assert main(["run", "--heads", "0"]) == 2
    assert capsys.readouterr().err.startswith("lvxattn run: error: argument --heads")
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("text", ["x", "0", "-1", "inf"])
def test_bad_timeout_raises(
    text: str, alone: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone.setenv("LVXATTN_TIMEOUT", text)
    assert main(["run", *SMALL]) == 2
    error = capsys.readouterr().err.removeprefix("lvxattn: error: ")
    assert re.search(says("LVXATTN_TIMEOUT", repr(text), rank=0, of=1), error)
    assert error.count("\n") == 1


@pytest.mark.parametrize("text", ["²", "x", "9" * 5000])
@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_PORT"])
def test_bad_number_of_torchrun_is_refused(
    name: str, text: str, alone: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        alone.setenv(variable, "1")
    alone.setenv(name, text)
    assert main(["run", *SMALL]) == 2
    error = f"lvxattn: error: {name}: expected a whole number, got {text!r:.40}\n"
    assert capsys.readouterr() == ("", error)


@pytest.mark.parametrize("name", SIZES)
def test_processes_without_rendezvous_are_refused(
    name: str, alone: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone.setenv(name, "4")
    assert main(["run", *SMALL]) == 2
    assert capsys.readouterr() == (
        "",
        f"lvxattn: error: one of 4 processes ({name} = 4) that cannot find one another: start "
        "them with torchrun, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT\n",
    )


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"PMI_SIZE": "1"},
        {"PMI_SIZE": "²"},
        {"WORLD_SIZE": "9" * 5000},
        {"SLURM_NTASKS": "8"},  # the batch script itself
        {"PMI_SIZE": "4", "RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "here"},
    ],
)
def test_single_process_is_accepted(environment: dict[str, str]) -> None:
    assert lost_ranks(environment) is None


UNDER_TORCHRUN = {"TORCHELASTIC_RUN_ID": "some"}


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
@pytest.mark.parametrize("mine", ["some", "other", None])
def test_only_stopped_ranks_of_the_same_torchrun_are_ended(
    mine: str | None, alone: pytest.MonkeyPatch
) -> None:
    alone.setattr(os, "getppid", os.getpid)
    alone.setattr(processes.dist, "destroy_process_group", lambda: None)
    alone.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if mine:
        alone.setenv("TORCHELASTIC_RUN_ID", mine)
    killed = list[int]()
    with child(LAUNCHERS[1] | UNDER_TORCHRUN, "T") as pid, alone.context() as during:
        during.setattr(os, "kill", lambda pid, _: killed.append(pid))
        processes._end()
    assert killed == ([pid] if mine == "some" else [])


@pytest.mark.parametrize(
    ("environment", "before", "by_user"),
    [
        ({}, None, False),
        ({"OMP_NUM_THREADS": ""}, None, False),
        ({"OMP_NUM_THREADS": "1"}, None, True),
        ({"MKL_NUM_THREADS": "2"}, None, True),
        ({**UNDER_TORCHRUN, "OMP_NUM_THREADS": "1"}, {}, False),
        ({**UNDER_TORCHRUN, "OMP_NUM_THREADS": "1"}, None, False),
        ({**UNDER_TORCHRUN, "OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "1"}, True),
        ({**UNDER_TORCHRUN, "OMP_NUM_THREADS": "2"}, None, True),
        ({**UNDER_TORCHRUN, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "2"}, {}, True),
    ],
)
def test_thread_count_of_torchrun_is_ignored(
    environment: dict[str, str], before: dict[str, str] | None, by_user: bool
) -> None:
    assert user_set_threads(environment, before) == by_user


@pytest.mark.parametrize(("variable", "threads"), [(None, 6), ("2", None)])
def test_threads_default_to_cores(
    variable: str | None, threads: int | None, alone: pytest.MonkeyPatch
) -> None:
    alone.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    if variable:
        alone.setenv("OMP_NUM_THREADS", variable)
    before = torch.get_num_threads()
    assert limit_threads(ALONE) == torch.get_num_threads() == (threads or before)


def test_cpu_is_chosen_on_request_or_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for wish in ("cpu", "auto"):
        assert choose_device(wish, ALONE) == (torch.device("cpu"), ALONE)
    with pytest.raises(InputError, match=r"--device gpu: .* \(on rank 0 of 1\)"):
        choose_device("gpu", ALONE)


class Ranks(Group):
    """One rank of two; the other one's objects are `said`."""

    def __init__(self, *said: object) -> None:
        self._group, self.rank, self.size, self.said = (lambda: "the world"), 1, 2, list(said)

    def allgather(self, sendobj: object) -> list[object]:  # type: ignore[override]
        return [self.said.pop(0), sendobj]


@pytest.mark.parametrize(
    ("wish", "count", "other", "index", "nccl"),
    [
        ("auto", 2, "gpu 0", 1, True),
        ("gpu", 2, "gpu 0", 1, True),
        ("auto", 1, "gpu 0", 0, False),  # shared: NCCL takes one rank a GPU
        ("auto", 1, "gpu 7", 0, True),  # each is shown its own only
    ],
)
def test_nccl_is_used_with_a_gpu_per_rank(
    wish: str, count: int, other: str, index: int, nccl: bool, alone: pytest.MonkeyPatch
) -> None:
    current, made = [], []
    alone.setenv("LOCAL_RANK", "1")
    alone.setenv("LVXATTN_TIMEOUT", "5")
    alone.setattr(torch.version, "cuda", "12")
    alone.setattr(torch.cuda, "is_available", lambda: True)
    alone.setattr(torch.cuda, "device_count", lambda: count)
    alone.setattr(torch.cuda, "set_device", current.append)
    alone.setattr(
        torch.cuda, "get_device_properties", lambda d: SimpleNamespace(uuid=f"gpu {d.index}")
    )
    alone.setattr(torch.distributed, "is_nccl_available", lambda: True)
    alone.setattr(torch.distributed, "new_group", lambda **how: made.append(how))
    alone.setattr(processes.socket, "gethostname", lambda: "here")
    ranks = Ranks(None, ("here", other))
    device, group = choose_device(wish, ranks)
    assert device == torch.device("cuda", index) == current[0]
    assert (group is not ranks) == nccl
    assert [how["backend"] for how in made] == ["cpu:gloo,cuda:nccl"] * nccl
    assert [how["timeout"].total_seconds() for how in made] == [5] * nccl


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "bool"])
@pytest.mark.parametrize("shape", [(2, 3), (0, 3)])
def test_arrays_round_trip(dtype: str, shape: tuple[int, int]) -> None:
    backend = Backend(torch.device("cpu"), ALONE)
    x = (np.arange(6)[: shape[0] * 3].reshape(shape) / 3).astype(dtype_of(dtype))
    there = backend.put(x)
    assert str(there.dtype) == f"torch.{dtype}"
    back = backend.get(there)
    assert back.dtype == x.dtype
    np.testing.assert_array_equal(back, x)
    if dtype == "bfloat16":
        np.testing.assert_array_equal(there.float().numpy(), x.astype(np.float32))


def test_group_backend_matches_device(alone: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    group = Ranks("the other")
    for config, over in (
        ("cpu:gloo", {cpu: True, cuda: True}),
        ("cpu:gloo,cuda:nccl", {cpu: True, cuda: False}),
        ("cuda:nccl", {cuda: False}),
    ):
        alone.setattr("torch.distributed.get_backend_config", lambda _, c=config: c)
        assert {device: over_cpu(group, device) for device in over} == over
    with pytest.raises(ValueError, match="group: expected one with a backend for cpu tensors"):
        over_cpu(group, cpu)
