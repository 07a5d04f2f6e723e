"""FSDP2 over meshes of ranks: gradients, memory, precision and checkpoints, as in one process."""

# ruff: noqa: E402 - what follows needs torch

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch.nn.utils import clip_grad_norm_

from lvxattn.torch_impl.examples import fully_sharded as example
from lvxattn.torch_impl.examples import two_dimensional_mesh as mesh
from tests.launch import Ended, checks_of
from tests.tolerances import UNIT, summed
from tests.torch_ranks import forked, torch_report

pytestmark = pytest.mark.mpi

# As in `test_torch_examples`: a gradient passes through about as many sums as the model has
# products, forward and back, none longer than the keys or all tokens of a batch.  A step hands on
# its error to the next ones, which momentum repeats.
PRODUCTS = 2 * (6 * mesh.LAYERS + 3)
LONGEST = max(mesh.S_KV, example.SAMPLES * mesh.S_Q, mesh.E)
LIMIT = {dtype: 4 * PRODUCTS * summed(UNIT[dtype], LONGEST) for dtype in ("float64", "float32")}
TWO_STEPS = 4 * LIMIT["float64"] / (1 - example.MOMENTUM)  # after two others

ALL = tuple(checks_of("torch_fsdp.py"))
COMPILED = ("compiled_layers_in_a_sharded_model",)
KEPT = "nothing_but_shards_is_kept"
LAUNCHES = {  # ranks: those along context, and what is checked; gradients, the first 4, on all
    4: ("2", *(name for name in ALL if name not in COMPILED)),
    3: ("3", *ALL[:4]),
    2: ("2", *ALL[:4], *COMPILED),
}


@pytest.mark.parametrize(
    ("P", "check"), [(P, x) for P, launch in LAUNCHES.items() for x in launch[1:] if x != KEPT]
)
def test_sharded_model_is_that_of_one_process(P: int, check: str) -> None:
    found = torch_report(P, "torch_fsdp.py", *LAUNCHES[P])[check]
    assert found
    for name, ranks in found.items():
        assert len(ranks) == P
        for x in ranks:
            limit = LIMIT["float32" if "float32" in name else "float64"]
            assert x is True if isinstance(x, bool) else x <= limit, f"{name}: {x}"


def test_limits_are_far_from_mistakes() -> None:
    assert LIMIT["float64"] < TWO_STEPS < 1e-9
    assert LIMIT["float32"] < 1e-2


def test_nothing_but_shards_is_kept() -> None:
    """Between forward and backward, with as many bytes as without FSDP."""
    found = torch_report(4, "torch_fsdp.py", *LAUNCHES[4])[KEPT]
    for rank in range(4):
        kept = {way: of_ranks[rank] for way, of_ranks in found.items()}
        sizes = kept.pop("sizes")
        x, features, layers = sizes["x"], sizes["features"], sizes["layers"]
        lse = layers * 2 * sizes["lse"]  # and its rounding error
        plain = {"x": layers * x, "out": layers * x, "lse": lse, "features": features, "other": 0}
        assert kept["fp32"] == plain
        half = {"x": layers * x // 2, "out": layers * x // 2, "lse": lse}
        assert kept["bf16"] == {**half, "other": features // 2}  # cast once, by the whole model
        assert kept["layers alone in bf16"] == {**half, "other": layers * features // 2}
        # What the meter sees if it is not so.
        assert kept["weights kept"] == {**plain, "other": layers * sizes["out_proj"]}
        assert kept["keys kept"].keys() - plain.keys() == {"q", "k", "v"}


def test_half_precision_errs_as_in_one_process() -> None:
    found = torch_report(4, "torch_fsdp_half.py", "2")["half_precision_errs_as_in_one_process"]
    assert len(found) == 8
    for kind in ("flat", "hsdp"):
        ranks = zip(*(found[f"{kind}: {name}"] for name in (
            "of one process", "sharded", "float32", "no bf16")), strict=True)  # fmt: skip
        for alone, sharded, in_float32, no_bf16 in ranks:
            assert alone > 1e-3  # it did compute in bfloat16
            assert sharded < 2 * alone
            assert in_float32
            assert no_bf16 > 0.3  # 0 if they were added up in bfloat16


def test_one_layer_in_half_precision_is_within_its_limit() -> None:
    found = torch_report(4, "torch_fsdp_half.py", "2")["one_layer_in_half_precision"]
    assert all(found["in bf16"])
    assert max(found["of its limit"]) <= 1
    for what in ("features in another dtype", "inputs in float32"):  # all ranks raise
        for said in found[what]:
            assert re.match(r"RuntimeError: make_kv: expected keys and values, got .*", said)
            assert re.search(r"same dtype.*\(on rank 0 of 2\)$", said)


def trained(P: int, *options: str | Path) -> list[tuple[int, list[float]]]:
    """Return what the example prints: by step, losses on the mesh and alone, and differences."""
    end = forked(P, "-m", example.__name__, "--steps", "2", *options)
    assert (end.status, end.err, end.left) == (0, "", ())
    rows = re.findall(r"^ +(\d+)  (\S+) +(\S+) +(\S+) +(\S+) +(\S+)$", end.out, re.MULTILINE)
    assert len(rows) == 2
    return [(int(step), list(map(float, numbers))) for step, *numbers in rows]


def check(rows: list[tuple[int, list[float]]], first: int = 0) -> None:
    assert [step for step, _ in rows] == [first, first + 1]
    for _, (loss, alone, *apart) in rows:
        assert abs(loss - alone) <= TWO_STEPS * alone
        assert max(apart) <= TWO_STEPS, apart


def test_hsdp_with_micro_batches() -> None:
    check(trained(4, "--hsdp", "--accumulate", "2"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Any) -> Path:
    """A checkpoint of 4 ranks, after 2 steps."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    check(trained(4, "--accumulate", "2", "--checkpoint", folder))
    assert example.saved_steps(folder) == [2]
    assert len(list(folder.glob("step-2/*.distcp"))) == 4  # each rank its own
    return Path(folder)


@pytest.mark.parametrize(
    ("P", "options"), [(3, ["--context", "3"]), (2, ["--context", "1", "--hsdp"])]
)
def test_checkpoint_is_continued_by_fewer_ranks(
    P: int, options: list[str], saved: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(saved, tmp_path / "run")
    check(trained(P, *options, "--checkpoint", folder), first=2)
    assert sorted(example.saved_steps(folder)) == [2, 4]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_checkpoint_is_continued_by_one_process(saved: Path) -> None:
    """With a model that is not sharded, and without a process group."""
    results = []
    for first in (0, 2):
        torch.manual_seed(first)
        model = mesh.Model(mesh.PlainAttention).to(torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), mesh.RATE, momentum=example.MOMENTUM)
        if first:
            assert example.load(saved, model, optimizer) == first
        for step in range(first, 4):
            batch = mesh.whole_batch(step, example.SAMPLES, torch.device("cpu"))
            loss = mesh.summed_loss(model(batch.tokens, batch.frames), batch.targets)
            (loss / (batch.targets != mesh.PADDING).sum()).backward()
            clip_grad_norm_(model.parameters(), example.NORM)
            optimizer.step()
            optimizer.zero_grad()
        results.append([*model.parameters()])
    assert example.largest_difference(*results) <= TWO_STEPS


def test_incomplete_checkpoint_does_not_count(tmp_path: Path) -> None:
    for name in ("step-2/.metadata", "step-10/.metadata", "step-30/__0_0.distcp"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    assert sorted(example.saved_steps(tmp_path)) == [2, 10]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--context", "3"], "--context: expected a divisor of the number of ranks, 2, got 3"),
        (["--steps", "0"], "--steps: expected a whole number from 1 up, got 0"),
        (
            ["--context", "1", "--accumulate", "6"],
            "--accumulate: expected a whole number from 1 up, and one of 11 samples for each micro "
            "batch of 2 ranks along data, got 6",
        ),
        (
            ["--checkpoint", "/"],
            "--checkpoint: expected a folder of checkpoints, or none that exists, got /",
        ),
    ],
    ids=lambda x: x[0][2:] if isinstance(x, list) else None,
)
def test_impossible_options_print_one_line(options: list[str], message: str) -> None:
    end: Ended = forked(2, "-m", example.__name__, *options)
    assert end.err.splitlines()[0] == message
    assert end.err.count(message) == 1
    assert "fully_sharded.py" not in end.err.split("\n", 1)[1]  # no traceback of ours
    assert (end.status, end.out, end.left) == (1, "", ())
