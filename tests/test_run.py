"""The run command: presets, sizes and files, its check, its reports and its refusals."""

import json
import os
import re
import struct
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from lvxattn.cli import run, tensors
from lvxattn.cli.arguments import Parser
from lvxattn.cli.run_options import add_options
from lvxattn.cli.run_problem import Problem as RunProblem
from lvxattn.cli.run_problem import RandomTensors, describe, least_nbytes, take_share
from lvxattn.cli.run_report import _why
from lvxattn.common.handshake import SCHEDULES
from lvxattn.common.validation import accumulator
from lvxattn.mpi_impl.__main__ import main
from lvxattn.plan import MACHINES, candidates, planned
from lvxattn.plan.machine import Measured
from lvxattn.plan.models import MODELS, PROBLEMS
from tests.cases import Case, Problem
from tests.commands import Said, commands
from tests.full_disk import full_disk
from tests.judge import ratio, worst_ratios
from tests.tolerances import limits

DTYPES = ("float64", "float32", "float16", "bfloat16")
CODES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
BEYOND = "99999999999999999999"  # more than an index of an array can be
SMALL = ["--text-tokens", "19", "--visual-tokens", "100", "--head-dim", "8", "--heads", "4"]


# The command lines, and on how many ranks; a launch of the second takes seconds.
MPI_RANKS, TORCH_RANKS = ("mpi_impl", 3), ("torch_impl", 2)
WORLDS = [
    pytest.param(*MPI_RANKS, marks=pytest.mark.mpi),
    pytest.param(
        *TORCH_RANKS, marks=pytest.mark.skipif(find_spec("torch") is None, reason="needs PyTorch")
    ),
]
EACH = pytest.mark.parametrize(("implementation", "P"), WORLDS)


def save(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    """Write a file with the safetensors package."""
    path.write_bytes(safetensors.numpy.save(arrays))
    return path


def load(path: Path) -> dict[str, np.ndarray]:
    """Read a file with the safetensors package."""
    return {
        name: np.frombuffer(entry["data"], tensors.dtype_of(CODES[entry["dtype"]])).reshape(
            entry["shape"]
        )
        for name, entry in safetensors.deserialize(path.read_bytes())
    }


def problem(case: Case) -> Problem:
    """Return a case's problem without dlse, which the command line does not know."""
    made = case.make()
    return replace(made, dlse=np.zeros_like(made.dlse))


def save_problem(path: Path, made: Problem) -> Path:
    arrays = {"q": made.q, "k": made.k, "v": made.v, "dout": made.dout}
    return save(path, arrays | ({} if made.mask is None else {"mask": made.mask}))


CASES = [
    *[
        Case(f"file, {dtype}", B=2, H=4, H_KV=2, D_V=5, S_Q=19, dtype=dtype, mask="padding")
        for dtype in DTYPES
    ],
    Case("file, odd sizes", H=1, H_KV=1, S_Q=5, S_KV=7, D=1, D_V=1, dtype="float16"),
    Case("file, no mask", dtype="float32"),
    Case("file, mask of two axes", mask="two axes"),
    Case("file, additive mask", H=4, mask="additive", dtype="float32"),
    Case("file, dead rows", mask="dead rows", dtype="float32"),
    Case("file, fewer keys than ranks", S_KV=2, S_Q=2),
]


MADE = [problem(case) for case in CASES]
BREAKAGES = ("merge", "out", "lse", "dq", "dk", "dv", "nan")
RANDOM = ["run", *SMALL, "--seed", "3", "--backward"]


@dataclass(frozen=True)
class Outcomes:
    """The outcomes of all command lines of one implementation, from one launch.

    Attributes
    ----------
    folder : Path
        Of its files.
    files, presets, chosen, broken, hidden, bad : list of Said
        Of `file_lines`, `preset_lines`, `chosen_lines`, `BREAKAGES`, `hidden_lines` and
        `bad_inputs`.
    """

    folder: Path
    files: list[Said]
    presets: list[Said]
    chosen: list[Said]
    broken: list[Said]
    hidden: list[Said]
    bad: list[Said]


Runs = Callable[[str, int], Outcomes]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Return a function that runs all command lines of an implementation, once."""

    @cache
    def outcomes(implementation: str, P: int) -> Outcomes:
        folder = tmp_path_factory.mktemp(f"{implementation}{P}")
        broken = [["run", *SMALL, "--backward", "--check"]] * len(BREAKAGES)
        bad = [["run", *line] for line, _ in bad_inputs(folder, implementation)]
        hidden = hidden_lines(folder)
        parts = (
            file_lines(folder),
            preset_lines(folder, P),
            chosen_lines(folder),
            broken,
            hidden,
            bad,
        )
        breakages = {id(broken): BREAKAGES, id(hidden): ("", "merge")}
        said = iter(
            commands(
                P,
                *[line for part in parts for line in part],
                breakages=[
                    breakage
                    for part in parts
                    for breakage in breakages.get(id(part), [""] * len(part))
                ],
                implementation=implementation,
                timeout=100,
            )
        )
        return Outcomes(folder, *[[next(said) for _ in part] for part in parts])

    return outcomes


def file_lines(folder: Path) -> list[list[Any]]:
    """Command lines that read and write a file each, and one whose tensors are random."""
    return [
        [
            *("run", "--input", save_problem(folder / f"{n}.in", one), "--backward", "--check"),
            *("--output", folder / f"{n}.out", "--schedule", ["lv-xattn", "ring"][n % 2]),
            "--quiet",
        ]
        for n, one in enumerate(MADE)
    ] + [[*RANDOM, "--output", folder / "random.out", "--quiet"]]


@pytest.mark.parametrize(
    ("implementation", "P"), [pytest.param("mpi_impl", 1, marks=pytest.mark.mpi), *WORLDS]
)
def test_files_in_every_dtype_give_correct_results(implementation: str, P: int, runs: Runs) -> None:
    ran = runs(implementation, P)
    for n, one in enumerate(MADE):
        said = ran.files[n]
        assert (said.status, said.out, said.err) == (0, "", ""), one.case.name
        path = ran.folder / f"{n}.out"
        results = load(path)
        for tensor in tensors.open_tensors(str(path)).tensors.values():
            assert tensor.start % tensors.dtype_of(tensor.dtype).itemsize == 0
        assert sorted(results) == ["dk", "dq", "dv", "lse", "out"]
        for name in ("out", "dq", "dk", "dv"):
            assert results[name].dtype == one.q.dtype
        assert max(worst_ratios(one, results).values()) <= 1, one.case.name
    assert not list(ran.folder.glob(".*"))


@pytest.mark.mpi
@pytest.mark.skipif(find_spec("torch") is None, reason="needs PyTorch")
def test_command_lines_agree_on_a_file(runs: Runs) -> None:
    ours, theirs = runs(*MPI_RANKS), runs(*TORCH_RANKS)
    for n, one in enumerate(MADE):
        limit = limits(one.case, one.truth(), one.case.dtype, accumulator(one.case.dtype))
        a, b = (load(ran.folder / f"{n}.out") for ran in (ours, theirs))
        for name in a:
            assert a[name].dtype == b[name].dtype
            got, want = (x[name].astype(np.float64) for x in (a, b))
            assert ratio(got, want, 2 * limit[name]) <= 1, (one.case.name, name)


@EACH
def test_random_problem_equals_that_of_one_rank(implementation: str, P: int, runs: Runs) -> None:
    parser = Parser()
    add_options(parser)
    made = take_share(describe(parser.parse_args(RANDOM[1:])), 0, 1).tensors
    case = Case("random", H=4, H_KV=4, S_Q=19, S_KV=100, dtype="float32")
    lse = np.zeros(made["q"].shape[:3])
    one = Problem(case, *(made[x] for x in ("q", "k", "v", "dout")), lse, 8**-0.5, None)
    results = load(runs(implementation, P).folder / "random.out")
    assert max(worst_ratios(one, results).values()) <= 1


def test_each_rank_reads_its_own_bytes_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = problem(Case("slices", B=2, H=4, H_KV=2, D_V=5, mask="full"))
    path = save_problem(tmp_path / "in", made)
    whole = describe(Namespace(input=str(path), backward=True, scale=None))
    read: list[int] = []
    fill = tensors._fill

    def counting(file: Any, run: memoryview, *where: str) -> None:
        read.append(len(run))
        fill(file, run, *where)

    monkeypatch.setattr(tensors, "_fill", counting)
    shares = [take_share(whole, rank, 3) for rank in range(3)]
    assert sum(read) == sum(x.nbytes for x in (made.q, made.k, made.v, made.dout, made.mask))
    for name, axis in (("q", 2), ("k", 2), ("v", 2), ("dout", 2), ("mask", 3)):
        joined = np.concatenate([share.tensors[name] for share in shares], axis=axis)
        np.testing.assert_array_equal(joined, getattr(made, name))


def test_random_tensors_do_not_depend_on_ranks() -> None:
    shapes = {"q": (2, 3, 2500, 4), "k": (2, 3, 2500, 4), "mask": (2, 1, 1, 2500)}
    whole = RunProblem("", RandomTensors(7, shapes, "float32"), shapes, "float32")
    (one,) = (take_share(whole, 0, 1).tensors,)
    parts = [take_share(whole, rank, 3).tensors for rank in range(3)]
    for name, axis in (("q", 2), ("k", 2), ("mask", 3)):
        joined = np.concatenate([part[name] for part in parts], axis=axis)
        np.testing.assert_array_equal(joined, one[name])
    assert not np.array_equal(one["q"], one["k"])
    assert one["mask"].any()
    assert not one["mask"].all()


@pytest.mark.parametrize("name", sorted(PROBLEMS))
def test_fixed_lengths_are_the_models_unless_given(name: str) -> None:
    parser = Parser()
    add_options(parser)
    x = PROBLEMS[name]
    for line, S_Q, S_KV in (
        ("", x.S_Q, x.S_KV),
        ("--text-tokens 3", 3, x.S_KV),
        ("--visual-tokens 5", x.S_Q, 5),
    ):
        found = describe(parser.parse_args(["--model", name, *line.split()]))
        assert found.title == name
        assert found.shapes["q"] == (1, x.heads, S_Q, x.head_dim)
        assert found.shapes["k"] == found.shapes["v"] == (1, x.kv_heads, S_KV, x.head_dim)


def test_memory_is_that_of_the_given_grid() -> None:
    parser = Parser()
    add_options(parser)

    def least(*grid: str) -> int:
        line = "--text-tokens", "16384", "--visual-tokens", "64", "--schedule", "grid", *grid
        options = parser.parse_args(line)
        return least_nbytes(describe(options), options, 0, 4, on_host=True)

    assert least() == least("--grid", "1x4") < least("--grid", "4x1") / 2


def test_choice_is_compared_with_another_schedule() -> None:
    """A grid of one row is lv-xattn, one of one column ring."""
    short, square = (
        planned((1, 8, S_Q, 64), (1, 8, 4096, 64), 4, dtype="float32") for S_Q in (64, 4096)
    )
    assert _why(short, candidates(short)).endswith("; gather: 498 kB")
    first, second, *_ = candidates(square)
    assert (first.schedule, second.schedule) == ("ulysses", "grid")
    assert "; grid 2x2: " in _why(square, candidates(square))


def preset_lines(folder: Path, P: int) -> list[list[Any]]:
    """Command lines about presets and sizes."""
    return [
        [
            *("run", "--model", "openflamingo-3b", "--frames", "3", "--text-tokens", "9"),
            *("--check", "--json", "-"),
        ],
        [
            *("run", *SMALL, "--kv-heads", "2", "--value-dim", "3", "--batch", "2", "--backward"),
            *("--mask", "padding", "--dtype", "float16", "--repeat", "2", "--check"),
            *("--scale", "0.25", "--json", folder / "all.json"),
        ],
        [
            *("run", *SMALL, "--quiet", "--schedule", "ring", "--scale", "0.5", "--check"),
            *("--json", folder / "ring.json"),
        ],
        *[["run", *SMALL, "--dtype", dtype, "--check", "--quiet"] for dtype in DTYPES],
        ["run", "--model", "q-former", "--backward", "--check", "--quiet"],
        ["run", "--text-tokens", "0", "--visual-tokens", "0", "--backward", "--check", "--quiet"],
        *[
            [
                *("run", *SMALL, "--schedule", schedule, "--heads", "6", "--backward", "--check"),
                *("--quiet", "--json", folder / f"{schedule}.json"),
            ]
            for schedule in ("ulysses", "gather")
        ],
        [
            *("run", *SMALL, "--schedule", "grid", "--grid", f"1x{P}", "--backward", "--check"),
            *("--quiet", "--json", folder / "grid.json"),
        ],
    ]


def chosen_lines(folder: Path) -> list[list[Any]]:
    """Command lines that let the schedule be chosen."""
    measured = Measured("mpi_impl", "a GPU", H=4, H_KV=2, D=8, dtype="float32")
    replace(MACHINES["h100"], name="mine", measured=measured).save(folder / "mine")
    auto = "run", *SMALL, "--schedule", "auto"
    return [
        [*auto],
        [*auto, "--machine", "h100"],
        [*auto, "--machine", folder / "mine", "--json", "-"],
    ]


@EACH
def test_presets_and_sizes_pass_check(implementation: str, P: int, runs: Runs) -> None:
    ran = runs(implementation, P)
    preset, sizes, *others = ran.presets

    model, report = MODELS["openflamingo-3b"], json.loads(preset.out)
    q, k = model.shapes(9, 3)
    assert (tuple(report["shapes"]["q"]), tuple(report["shapes"]["k"])) == (q, k)
    assert [check["name"] for check in report["checks"]] == ["out", "lse"]
    assert report["totals"]["keys"] == k[2] == sum(rank["keys"] for rank in report["ranks"])
    # P - 1 hops of the queries and as many of the results (out, lse as two numbers), all in all.
    assert report["totals"]["bytes"] == (P - 1) * (4 * np.prod(q) * 2 + 8 * np.prod(q[:3]))
    assert report["totals"]["messages"] == P * 2 * (P - 1)

    report = json.loads((ran.folder / "all.json").read_text())
    assert [check["name"] for check in report["checks"]] == ["out", "lse", "dq", "dk", "dv"]
    assert all(check["rows"] >= 16 and check["passed"] for check in report["checks"])
    assert report["repeats"] == 2
    assert [len(seconds) for seconds in report["measured"].values()] == [2, 2]  # no warm-up
    assert report["scale"] == 0.25
    assert report["totals"]["backward"] > 0
    assert report["ranks"][P - 1]["messages"] == 4 * (P - 1)
    assert "float16" in sizes.out

    report = json.loads((ran.folder / "ring.json").read_text())
    assert (report["schedule"], report["scale"]) == ("ring", 0.5)
    assert report["totals"]["bytes"] == (P - 1) * 2 * 4 * 4 * 100 * 8  # keys and values
    assert (report["why"], report["explained"]) == ("", "")
    for schedule in ("ulysses", "gather", "grid"):
        report = json.loads((ran.folder / f"{schedule}.json").read_text())
        assert report["schedule"] == schedule
        assert report["grid"] == ([1, P] if schedule == "grid" else None)
        assert all(check["passed"] for check in report["checks"])
    for said in (preset, sizes, *others):
        assert (said.status, said.err) == (0, "")
    assert [said.out for said in others] == [""] * len(others)


@EACH
def test_auto_explains_its_choice(implementation: str, P: int, runs: Runs) -> None:
    q, k = (1, 4, 19, 8), (1, 4, 100, 8)
    fewest, least, mine = runs(implementation, P).chosen
    assert {(said.status, said.err) for said in (fewest, least, mine)} == {(0, "")}
    # In PyTorch a message of a backward is stamped, where it goes through the host.
    stamp = 8 if implementation == "torch_impl" else 0
    layout = replace(planned(q, k, P, dtype="float32"), stamp_nbytes=stamp)
    by_bytes, *_ = candidates(layout)
    best, other, *_ = candidates(layout, MACHINES["h100"])
    assert by_bytes.schedule != best.schedule  # or else nothing is seen here
    assert f"\n  schedule  {by_bytes.schedule} on {P} ranks, forward, once\n" in fewest.out
    assert f"{by_bytes.nbytes / 1e3:.3g} kB; " in chosen(fewest.out)
    assert chosen(fewest.out).startswith("fewest bytes, forward and backward: ")
    assert f"\n  schedule  {best.schedule} on {P} ranks, forward, once\n" in least.out
    assert chosen(least.out) == (
        f"least time on h100, forward and backward: {best.seconds:.2e} s; "
        f"{other.schedule}: {other.seconds:.2e} s"
    )
    report = json.loads(mine.out)
    assert report["schedule"] == best.schedule
    assert report["why"] == chosen(least.out).replace("h100", "mine")
    assert report["machine"] == (
        "4/2 heads of 8 in float32, by mpi_impl on a GPU; this has other heads; "
        f"it had {MACHINES['h100'].ranks} ranks, not {P}"
    )
    assert report["explained"].startswith(f"{best.schedule} is taken\n")
    assert len(report["explained"].splitlines()) == 2 + len(SCHEDULES)


def chosen(text: str) -> str:
    """Return why the schedule was chosen, of what is printed."""
    (line,) = re.findall(r"^  chosen    (.*)$", text, re.MULTILINE)
    return line


@pytest.mark.mpi
def test_the_table_has_fixed_widths() -> None:
    one, four = commands(
        2, ["run", *SMALL], ["run", *SMALL, "--visual-tokens", "123456", "--text-tokens", "1"]
    )
    tables = [
        [line for line in said.out.splitlines() if line[:7].strip() in ("rank", "0", "1", "all")]
        for said in (one, four)
    ]
    assert len(tables[0]) == len(tables[1]) == 4
    assert len({len(line) for table in tables for line in table}) == 1
    assert max(len(line) for said in (one, four) for line in said.out.splitlines()) <= 100


def test_long_host_name_is_shortened(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run.socket, "gethostname", lambda: "n" * 40)
    assert main(["run", *SMALL]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "nnnn…" in line)
    assert len(line) == 100


@EACH
def test_check_catches_wrong_results(implementation: str, P: int, runs: Runs) -> None:
    for breakage, said in zip(BREAKAGES, runs(implementation, P).broken, strict=True):
        assert said.status == 1, breakage
        assert said.err == "lvxattn run: a check failed\n"
        failed = {line.split()[0] for line in said.out.splitlines() if line.endswith("FAIL")}
        assert {"merge": "lse", "nan": "out"}.get(breakage, breakage) in failed
        if breakage in ("dq", "dk", "dv"):
            assert failed == {breakage}


def hidden_lines(folder: Path) -> list[list[Any]]:
    """Command lines with a mask that hides a row by a number."""
    made = problem(Case("hidden", dtype="float32"))
    mask = np.zeros((1, 1, made.q.shape[2], made.k.shape[2]), np.float32)
    mask[:, :, 1] = -1e9
    path = save_problem(folder / "hidden.in", replace(made, mask=mask))
    return [["run", "--input", path, "--backward", "--check"]] * 2


@EACH
def test_row_hidden_by_finite_number_passes_check(implementation: str, P: int, runs: Runs) -> None:
    right, broken = runs(implementation, P).hidden
    assert right.status == 0, right.out
    assert broken.status == 1
    assert re.search(r"out .* FAIL", broken.out)


def damaged(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def bad_inputs(folder: Path, implementation: str) -> list[tuple[list[Any], str]]:
    """Command lines, and what is said of each."""
    bad = [] if has_gpu() else [(["--device", "gpu", *SMALL], "--device gpu: ")]
    x = np.ones((1, 2, 6, 4), np.float32)
    good = {"q": x, "k": x, "v": x}
    whole = save(folder / "good", good).read_bytes()
    (folder / "short").write_bytes(whole[:-1])
    (folder / "stub").write_bytes(whole[:20])
    (folder / "empty").write_bytes(b"")
    entry = {"dtype": "F32", "shape": [1, 2, 6, 4], "data_offsets": [0, 191]}
    three = {name: {**entry, "data_offsets": [0, 192]} for name in "qkv"}
    files: list[tuple[Path, str]] = [
        (folder / "none", "No such file"),
        (folder, "expected a regular file, got a directory"),
        (fifo(folder / "fifo"), "expected a regular file, got a FIFO"),
        (folder / "short", "cut short: v ends at byte"),
        (folder / "stub", "no complete header"),
        (folder / "empty", "no complete header"),
        (damaged(folder / "a", b"{]"), "damaged header"),
        (damaged(folder / "b", [1]), "damaged header"),
        (damaged(folder / "c", {"q": {"dtype": "F32"}}), "damaged header"),
        (damaged(folder / "d", {"q": entry}, bytes(192)), "does not take bytes 0 to 191"),
        (damaged(folder / "e", {**three, "k": {**three["k"], "shape": [-1]}}, bytes(192)), "[-1]"),
        (save(folder / "f", {"q": x, "v": x}), "expected a tensor k, found q, v"),
        (save(folder / "g", {n: a.astype(np.int32) for n, a in good.items()}), "got I32"),
        (save(folder / "h", {**good, "v": x.astype(np.float64)}), "float64"),
        (save(folder / "i", {**good, "k": x[..., :3].copy()}), "(1, 2, 6, 3)"),
        (save(folder / "j", {**good, "v": x[:, :, 1:].copy()}), "(1, 2, 5, 4)"),
        (save(folder / "k", {**good, "q": x[0]}), "(2, 6, 4)"),
        (save(folder / "l", {**good, "mask": np.ones((1, 1, 5, 6), bool)}), "(1, 1, 5, 6)"),
        (
            damaged(folder / "o", {"q": {**three["q"], "shape": [True, 48]}}, bytes(192)),
            "[True, 48]",
        ),
        (damaged(folder / "r", {**three, "a\nb": three["q"]}, bytes(192)), "a tensor 'a\\nb'"),
        (
            damaged(folder / "s", {"q": {**three["q"], "shape": [0, 2**40, 2**40]}}, bytes(192)),
            "q: no array has shape [0, 1099511627776, 1099511627776]",
        ),
        (damaged(folder / "p", {**three, "k": three["q"]}, bytes(192)), "k and q overlap"),
        (save(folder / "m", {**good, "mask": np.ones((6, 5), bool)}), "(6, 5)"),
    ]
    nowhere, pipe = folder / "nowhere" / "file", fifo(folder / "pipe")
    # No process can create a file in /proc, not even root's.
    sealed = "error: {}: /proc/lvxattn" if Path("/proc").is_dir() else "/proc"
    return [
        *bad,
        *[(["--input", path], text) for path, text in files],
        (["--input", folder / "good", "--backward"], "dout"),
        (
            ["--input", save(folder / "n", {**good, "dout": x[:, :1].copy()}), "--backward"],
            "dout: ",
        ),
        (["--input", folder / "good", "--dtype", "float32"], "--dtype: not allowed with"),
        (["--input", folder / "good", "--output", nowhere], "there is no folder "),
        (["--input", folder / "good", "--output", folder / "good"], "--input"),
        (
            [*SMALL, "--output", folder / "x", "--json", folder / "x"],
            "--json: expected another file than --output's",
        ),
        *[
            ([*SMALL, option, pipe], "/pipe cannot be written: expected a regular file, got")
            for option in ("--output", "--json", "--trace")
        ],
        (["--input", folder / "good", "--output", folder], "got a directory"),
        ([*SMALL, "--json", nowhere, "--quiet"], "/nowhere"),
        *[
            ([*SMALL, option, f"/proc/lvxattn{end}", "--quiet"], sealed.format(option))
            for option, end in (("--json", ""), ("--trace", ""), ("--plot-trace", ".png"))
        ],
        (["--model", "gpt"], "invalid choice: 'gpt'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--schedule", "star"], "invalid choice: 'star'"),
        (["--grid", "2x2"], "argument --grid: needs --schedule grid"),
        (["--schedule", "grid", "--grid", "2x-2"], "--grid: expected two numbers, as in 4x2, "),
        ([*SMALL, "--schedule", "grid", "--grid", "7x2"], "grid: expected two numbers whose "),
        (
            [*SMALL, "--schedule", "ulysses", "--kv-heads", "1"],
            "schedule: ",
        ),
        (["--machine", "h100"], "argument --machine: needs --schedule auto"),
        *[
            ([*SMALL, "--schedule", "auto", "--machine", machine], text)
            for machine, text in (
                ("h1000", "'h1000'"),
                (folder, "expected a regular file, got a directory"),
                (pipe, "expected a regular file, got a FIFO"),
                (folder / "short", "/short"),
                (other_version(folder / "version"), "/version"),
            )
        ],
        (["--frames", "3"], "--frames: needs a --model of llama3v, "),
        (["--frames", "3", "--model", "q-former"], "--frames: needs a --model of llama3v, "),
        (["--heads", "3", "--kv-heads", "2"], "H_KV"),
        (["--head-dim", "0"], "--head-dim: expected a whole number from 1 up, got '0'"),
        (["--text-tokens", "-1"], "--text-tokens: "),
        (["--repeat", "0"], "--repeat: "),
        (["--scale", "nan"], "--scale: expected a finite number, got 'nan'"),
        (["--visual-tokens", "1000000000000000"], "memory"),
        (
            ["--text-tokens", BEYOND],
            f"expected a whole number from 0 up, below 2**63, got '{BEYOND}'",
        ),
        (["--batch", BEYOND], "--batch: "),
        (["--model", "llama3v", "--frames", BEYOND], "--frames: "),
        (["--seed", BEYOND], "--seed: "),
        (["--heads", "1000000000", "--batch", "1000000000"], "q: no memory holds shape "),
    ]


def fifo(path: Path) -> Path:
    """Make a FIFO, which has no other end: who opens it waits."""
    os.mkfifo(path)
    return path


def other_version(path: Path) -> Path:
    """Write a machine file of another version."""
    MACHINES["h100"].save(path)
    path.write_text(path.read_text().replace('"version": 4', '"version": 1'))
    return path


def has_gpu() -> bool:
    """Whether PyTorch can compute on a GPU."""
    import torch

    return torch.cuda.is_available()


@EACH
def test_bad_input_prints_one_line(implementation: str, P: int, runs: Runs, tmp_path: Path) -> None:
    ran = runs(implementation, P)
    for (line, text), said in zip(bad_inputs(tmp_path, implementation), ran.bad, strict=True):
        assert said.status == 2, line
        assert said.out == ""
        assert said.err.count("\n") == 1
        assert said.err.startswith("lvxattn run: error: ")
        assert text in said.err, said.err
    assert not list(ran.folder.glob("**/.*"))


@pytest.mark.mpi
@pytest.mark.parametrize("implementation", ["mpi_impl", "torch_impl"])
def test_other_command_line_is_refused(implementation: str) -> None:
    lines = [["run", "--seed", "{rank}"], ["run", "--{rank}"]]
    others, wrong = commands(3, *lines, implementation=implementation)
    for said, word in ((others, "--seed "), (wrong, "--")):
        assert (said.status, said.out) == (2, "")
        assert said.err == (
            f"lvxattn: error: command line: expected rank 0's, run {word}0, got run {word}1 "
            "(on rank 1 of 3)\n"
        )


@pytest.mark.parametrize("command", ["run --json", "run --trace", "measure --output"])
def test_unwritable_file_is_refused_before_work(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    name, option = command.split()
    sizes = SMALL if name == "run" else ["--heads", "2", "--head-dim", "16"]
    assert main([name, *sizes, option, "x" * 300]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "File name too long" in said.err


def test_output_follows_symlinks(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (said,) = commands(2, ["run", *SMALL, "--output", tmp_path / "link", "--quiet"])
    assert said.status == 0
    assert (tmp_path / "link").is_symlink()
    assert set(load(tmp_path / "real")) == {"out", "lse"}


@pytest.mark.mpi
def test_nan_result_fails_check(tmp_path: Path) -> None:
    x = np.ones((1, 1, 6, 4), np.float32)
    path = save(tmp_path / "nan", {"q": x, "k": x * np.nan, "v": x})
    (said,) = commands(2, ["run", "--input", path, "--check", "--quiet"])
    assert said.status == 1
    assert "a check failed" in said.err


@pytest.mark.mpi
def test_output_replaces_existing_file(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_text("what was there")
    (said,) = commands(2, ["run", *SMALL, "--output", target, "--quiet"])
    assert said.status == 0
    assert set(load(target)) == {"out", "lse"}
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("option", ["--json", "--trace"])
def test_full_disk_leaves_old_file(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "old"
    target.write_text("what was there")
    with full_disk(100):
        status = main(["run", *SMALL, "--quiet", option, str(target)])
    said = capsys.readouterr()
    assert (status, said.err) == (
        2,
        f"lvxattn run: error: {target}: File too large (on rank 0 of 1)\n",
    )
    assert target.read_text() == "what was there"
    assert list(tmp_path.iterdir()) == [target]


def test_input_beside_output_is_left_alone(tmp_path: Path) -> None:
    x = np.ones((1, 2, 6, 4), np.float32)
    path = save(tmp_path / "x.part", {"q": x, "k": x, "v": x})
    before = path.read_bytes()
    assert main(["run", "--input", str(path), "--output", str(tmp_path / "x"), "--quiet"]) == 0
    assert path.read_bytes() == before
    assert set(load(tmp_path / "x")) == {"out", "lse"}


def test_full_disk_leaves_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with full_disk(1000):
        status = main(["run", *SMALL, "--output", str(tmp_path / "out")])
    said = capsys.readouterr()
    assert (status, said.out, said.err.count("\n")) == (2, "", 1)
    assert "out: File too large" in said.err
    assert list(tmp_path.iterdir()) == []
