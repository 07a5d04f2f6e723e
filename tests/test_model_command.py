"""The command that runs whole models: its input, its check, and its report."""

# ruff: noqa: E402 - what follows needs torch

import json
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from lvxattn.plan.whole import WHOLE
from lvxattn.torch_impl.__main__ import main
from lvxattn.torch_impl.commands.model import check, program
from lvxattn.torch_impl.commands.model.check import Check, Sample
from lvxattn.torch_impl.commands.model.kinds import KINDS, SIZES, parts, random_model
from lvxattn.torch_impl.commands.model.text import frames_before, labels_of, tokens
from tests.commands import Said, commands
from tests.errors import says
from tests.launch import PROGRAMS
from tests.torch_ranks import forked
from tests.torchrun import torchrun

MODELS = [name for name, kind in KINDS.items() if find_spec(kind.package)]
# An even number for whisper; for the others one that no number of ranks divides.
FRAMES = {"whisper": "34", "openflamingo": "5", "owl3": "5"}
ONE_STEP = ["tower", "text", "cross", "backward", "update"]


def arguments(model: str, *more: Any) -> list[str]:
    return ["model", "--model", model, "--frames", FRAMES.get(model, "7"), *map(str, more)]


# What is run on 3 ranks, in one launch: transformers takes longer to import than these to compute.
SHARDED = ["--text", "sharded", "--text-tokens", "23", "--train-steps", "2"]
ON_RANKS = {
    **{f"train {name}": [name, "--train-steps", "3"] for name in MODELS},
    **{f"generate {name}": [name, "--generate", "5"] for name in MODELS},
    "sharded, ring": ["llama3v", *SHARDED, "--schedule", "ring"],
    "sharded": ["idefics", *SHARDED],
    "more ranks than frames": ["llama3v", "--frames", "2"],
    "bfloat16": ["llama3v", "--dtype", "bfloat16"],
    "keys and values kept": ["llama3v", "--keep-kv"],
}
REFUSED = {
    "--frames": ["whisper", "--frames", "7"],
    "text": ["whisper", "--text", "sharded"],
    "schedule": ["llama3v", "--text", "sharded", "--schedule", "ulysses"],
}
FAULTS = {"no factor P": [], "no mask": [], "wrong token": ["--generate", "4"], "other weights": []}


@cache
def on_ranks() -> dict[str, Said]:
    """Return how the command ended on 3 ranks, on all alike, by name."""
    good = [arguments(*line, "--check", "--json") for line in ON_RANKS.values()]
    bad = [arguments(*line) for line in REFUSED.values()]
    said = commands(3, *good, *bad, implementation="torch_impl", timeout=280)
    return dict(zip([*ON_RANKS, *REFUSED], said, strict=True))


@cache
def faulty() -> dict[str, list[dict[str, Any]]]:
    """Return how each fault ended, by rank."""
    lines = {fault: arguments("llama3v", "--check", *more) for fault, more in FAULTS.items()}
    ended = forked(2, PROGRAMS / "faulty_model.py", json.dumps(lines))
    assert (ended.status, ended.left) == (0, ()), ended.err
    return json.loads(ended.out)


def refused(capsys: pytest.CaptureFixture[str], *more: Any) -> str:
    """Return the error of a command line that one process refuses."""
    assert main(["model", *map(str, more)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1, said.err
    return said.err.removeprefix("lvxattn model: error: ").strip()


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


class TestInput:
    @pytest.mark.parametrize(
        ("more", "argument"),
        [
            (["--model", "llama"], "argument --model"),
            (["--model", "llama3v", "--frames", "0"], "argument --frames"),
            (["--model", "llama3v", "--size", "tiny", "--weights", "x"], "argument --size"),
            (["--model", "llama3v", "--generate", "2", "--train-steps", "2"], "--train-steps"),
            (["--model", "llama3v", "--generate", "2", "--text", "sharded"], "--generate"),
            (["--model", "llama3v", "--schedule", "ring"], "--schedule: needs --text sharded"),
            ([], "--model"),
        ],
    )
    def test_bad_arguments(
        self, more: list[str], argument: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert argument in refused(capsys, *more)

    @pytest.mark.parametrize(
        ("more", "argument", "values"),
        [
            (["--model", "whisper", "--frames", "7"], "--frames", ["even", "7"]),
            (["--model", "llama3v", "--text-tokens", "2"], "--text-tokens", ["3", "2"]),
            (["--model", "idefics", "--text-tokens", "3000"], "--text-tokens", ["2,048", "3,000"]),
            (["--model", "llama3v", "--weights", "/nowhere"], "--weights", ["/nowhere"]),
            (["--model", "llama3v", "--json", "/nowhere/x"], "--json", ["/nowhere"]),
        ],
    )
    def test_bad_values(
        self, more: list[str], argument: str, values: list[str], capsys: Any
    ) -> None:
        assert re.search(says(argument, *values, rank=0, of=1), refused(capsys, *more))

    def test_weights_of_another_model(self, tmp_path: Path, capsys: Any) -> None:
        random_model(KINDS["whisper"], "tiny", 8, 8, 0).save_pretrained(tmp_path)
        for model, values in (("llama3v", ("mllama", "whisper")), ("openflamingo", ())):
            error = refused(capsys, "--model", model, "--weights", tmp_path)
            assert re.search(says("--weights", *values, rank=0, of=1), error)
        # Of this model, for another number of frames; and then damaged.
        given = "--model", "whisper", "--weights", tmp_path, "--frames"
        assert re.search(says("--frames", "8", "10", rank=0, of=1), refused(capsys, *given, 10))
        (tmp_path / "model.safetensors").write_bytes(b"x")
        assert re.search(says("--weights", tmp_path, rank=0, of=1), refused(capsys, *given, 8))
        (tmp_path / "config.json").unlink()
        assert "config.json" in refused(capsys, *given, 8)

    def test_weights_are_not_unpickled(self, tmp_path: Path, capsys: Any) -> None:
        model = random_model(KINDS["whisper"], "tiny", 8, 8, 0)
        model.save_pretrained(tmp_path)
        given = "--model", "whisper", "--weights", tmp_path, "--frames", 8
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        assert "model.safetensors" in refused(capsys, *given)
        (tmp_path / "adapter_config.json").write_text("{}")
        assert "adapter" in refused(capsys, *given)

    def test_code_beside_weights_does_not_run(
        self, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Asked on a terminal, a user might agree."""
        monkeypatch.setattr("builtins.input", lambda _: "y")
        folder = tmp_path / "model"
        folder.mkdir()
        config = {"model_type": "planted", "auto_map": {"AutoConfig": "planted.Planted"}}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "planted.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
        refused(capsys, "--model", "whisper", "--weights", folder)
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("missing", ["transformers", "open_flamingo"])
    def test_missing_package(self, missing: str, monkeypatch: Any, capsys: Any) -> None:
        monkeypatch.setattr(program, "find_spec", lambda name: name != missing or None)
        error = refused(capsys, "--model", "openflamingo")
        assert f"--model: {missing} is not installed: pip install " in error

    @pytest.mark.slow
    @pytest.mark.parametrize("argument", REFUSED)
    def test_bad_input_on_ranks(self, argument: str) -> None:
        said = on_ranks()[argument]
        assert said.status == 2
        assert said.out == "" or argument == "schedule"  # found in the first attention
        assert said.err.startswith(f"lvxattn model: error: {argument}: ")
        assert said.err.count("\n") == 1


class TestModels:
    @pytest.mark.parametrize("name", MODELS)
    def test_sizes(self, name: str) -> None:
        count = []
        for size in SIZES:
            with torch.device("meta"):
                model = random_model(KINDS[name], size, 3000, 64, 0)
            count.append(sum(p.numel() for p in model.parameters()))
            assert parts(model, KINDS[name].tower)
            assert parts(model, KINDS[name].cross)
        assert count[0] < 1e6 < 4e7 < count[1] < 1e8
        # As published for Llama 3.2 11B Vision and Whisper large-v3; sizes alone for the others.
        published = {"llama3v": 10_670_220_835, "whisper": 1_543_490_560}
        assert count[2] == published.get(name, count[2])
        assert count[2] > 1e9

    @pytest.mark.parametrize("name", MODELS)
    def test_gates_are_open(self, name: str) -> None:
        """Behind a closed one nothing is tested."""
        model = random_model(KINDS[name], "tiny", 8, 32, 0)
        shut = [key for key, p in model.named_parameters() if p.numel() == 1 and not p.any()]
        assert not shut

    @pytest.mark.parametrize(
        ("name", "planned"),
        [
            ("llama3v", "llama3v"),
            ("owl3", "mplug-owl3-7b"),
            ("openflamingo", "openflamingo-9b"),
        ],
    )
    def test_planner_counts_its_weights(self, name: str, planned: str) -> None:
        if name not in MODELS:
            pytest.skip(f"{KINDS[name].package} is not installed")
        with torch.device("meta"):
            model = random_model(KINDS[name], "full", 8, 32, 0)
        count = sum(p.numel() for p in model.parameters())
        assert WHOLE[planned].parameters == pytest.approx(count, rel=0.012)

    def test_text_sees_frames_that_came_before(self) -> None:
        table = frames_before(3, 8)
        assert table.int().tolist() == [[i > 0, i > 1, i > 2] for i in range(8)]
        ids, images = tokens(frames_before(20, 8), 50, 99)
        assert images[0].tolist() == [False, True, True, True, True, False, False, False]
        assert (ids == 99).tolist() == images.tolist()
        assert (labels_of(ids, images) == -100).tolist() == images.tolist()


class TestOneProcess:
    def test_table(self, capsys: Any) -> None:
        assert main(arguments("llama3v", "--check", "--train-steps", "2")) == 0
        out = capsys.readouterr().out
        assert re.search(r"step     2   loss \d", out)
        assert "all checks passed" in out
        assert max(map(len, out.splitlines())) <= 100

    def test_json(self, capsys: Any, tmp_path: Path) -> None:
        assert main(arguments("llama3v", "--json", tmp_path / "all.json")) == 0
        report = json.loads((tmp_path / "all.json").read_text())
        assert "a step" in capsys.readouterr().out
        (rank,) = report["ranks"]
        assert sum(rank[name] for name in ONE_STEP) == pytest.approx(rank["total"])
        assert all(rank[name] > 0 for name in ONE_STEP)
        assert rank["peak"] > 4 * report["parameters"]
        assert (rank["bytes"], rank["waiting"]) == (0, 0)

    def test_weights(self, capsys: Any, tmp_path: Path) -> None:
        model = random_model(KINDS["llama3v"], "tiny", 7, 32, 9).eval()
        model.save_pretrained(tmp_path)
        torch.manual_seed(5)
        wanted = float(model(**KINDS["llama3v"].batch(model, 7, 32)).loss.detach())
        losses = []
        for more in (["--weights", tmp_path], ["--size", "tiny"]):
            assert main(arguments("llama3v", "--json", *more, "--seed", 5)) == 0
            losses += json.loads(capsys.readouterr().out)["losses"]
        assert losses[0] == pytest.approx(wanted, rel=1e-6)
        assert losses[1] != pytest.approx(wanted, rel=1e-4)


class TestRanks:
    def test_equal_to_one_process(self) -> None:
        """Under torchrun itself; the others are forks."""
        ended = torchrun(2, "-m", "lvxattn.torch_impl", *arguments("llama3v", "--check", "--json"))
        assert (ended.status, ended.left) == (0, ()), ended.err
        report = json.loads(ended.out)
        self.assert_right(report, "logits", "loss", "gradients")
        assert all(rank["waiting"] > 0 and rank["bytes"] > 0 for rank in report["ranks"])

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ON_RANKS)
    def test_equal_on_ranks(self, name: str) -> None:
        said = on_ranks()[name]
        assert (said.status, said.err) == (0, "")
        report = json.loads(said.out)
        if report["tokens"]:
            self.assert_right(report, "tokens")
            assert len(report["tokens"]) == 5
            return
        self.assert_right(report, "logits", "loss", "gradients")
        assert report["schedule"] == {"sharded, ring": "ring", "sharded": "lv-xattn"}.get(
            name, "replicated"
        )
        losses = report["losses"]
        assert losses == sorted(losses, reverse=True)
        assert len(set(losses)) == len(losses) == report["steps"]

    def assert_right(self, report: dict[str, Any], *names: str) -> None:
        found = {row["name"]: row for row in report["checks"]}
        assert set(names) <= set(found)
        for row in found.values():
            assert row["passed"], row
            # The limits are rounding errors, not what a wrong result is off by.
            assert row["limit"] < (0.26 if report["dtype"] == "bfloat16" else 1e-5)
        if "gradients" in found:
            assert found["gradients"]["compared"] >= 40


class TestCheck:
    """A check that cannot fail is none."""

    @pytest.mark.slow
    @pytest.mark.parametrize("fault", FAULTS)
    def test_planted_fault_is_seen(self, fault: str) -> None:
        every = faulty()[fault]
        out, err = every[0]["out"], every[0]["err"]
        if fault == "other weights":
            assert [rank["status"] for rank in every] == [2, 2]
            assert re.match(r"lvxattn model: error: the weights differ between ranks 0 and 1", err)
        else:
            assert [rank["status"] for rank in every] == [1, 1]
            assert "FAIL" in out
            assert err == "lvxattn model: a check failed\n"

    def test_nan_fails(self) -> None:
        good, bad = (Sample.of(torch.tensor([x, 2.0])) for x in (1.0, torch.nan))
        assert not Check("x", 1, 1, good.error_of(bad), 1.0).passed
        assert Check("x", 1, 1, good.error_of(good), 0.0).passed
        assert not Check("x", 1, 1, 0.0, torch.nan).passed
        assert check._error_over_limit(Check("x", 1, 1, torch.nan, 1.0)) == float("inf")

    def test_errors_are_relative_to_the_largest(self) -> None:
        want, got = (Sample.of(torch.tensor([1.0, -4.0, x])) for x in (0.0, 1.0))
        assert want.error_of(got) == 0.25
