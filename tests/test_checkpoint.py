"""Checkpoints that are damaged or planted, the folder's lock, and who reads pickles at all."""

import ast
import errno
import hashlib
import json
import math
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lvxattn.cli import InputError
from lvxattn.torch_impl.commands.train import checkpoint, run_training
from lvxattn.torch_impl.commands.train import run_folder as module
from lvxattn.torch_impl.commands.train.options import Settings
from lvxattn.torch_impl.commands.train.run_folder import run_folder
from lvxattn.torch_impl.commands.train.training_report import Curve, Row
from lvxattn.torch_impl.group import Group
from tests.launch import PROGRAMS, ROOT
from tests.test_train import options
from tests.torch_ranks import forked

SETTINGS = Settings(4, first_frames=2, batch=1, dtype="float32", seed=0)
ALONE = Group(None)
PART, MANIFEST, SUMS = "part-0.safetensors", "manifest.json", "SHA256SUMS"


def begun() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Return a small model whose weights are 0, with its optimizer."""
    model = torch.nn.Linear(2, 3)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def rows(steps: int) -> list[Row]:
    """Return the rows of a curve."""
    return [[n, 2, 1.5, 0.5, None, 0.25] for n in range(1, steps + 1)]


def taken(folder: Path, steps: int) -> list[torch.Tensor]:
    """Write a checkpoint after some steps; return the weights."""
    model, optimizer = begun()
    for _ in range(steps):
        optimizer.zero_grad()
        (model(torch.ones(2)).sum() - 1).square().backward()
        optimizer.step()
    checkpoint.save(folder, model, optimizer, Curve(rows(steps)), SETTINGS, ALONE)
    return [x.detach() for x in model.parameters()]


def resumed(folder: Path) -> tuple[Curve, list[torch.Tensor], torch.optim.Optimizer]:
    """Load the checkpoint; after an error, check that model and optimizer are as they were."""
    model, optimizer = begun()
    try:
        curve = checkpoint.load(folder, model, optimizer, SETTINGS, ALONE)
    except InputError:
        assert not any(x.any() for x in model.parameters())
        assert not optimizer.state
        raise
    return curve, [x.detach() for x in model.parameters()], optimizer


def refused(folder: Path) -> str:
    """Return the one line with which a checkpoint is refused."""
    with pytest.raises(InputError) as caught:
        resumed(folder)
    said = str(caught.value)
    assert len(said.splitlines()) == 1, said
    return said


def outcome(folder: Path) -> str:
    """Return why a checkpoint is refused, or that it is not."""
    try:
        resumed(folder)
    except InputError as error:
        return str(error)
    return "resumed"


def seal(folder: Path) -> None:
    """Write the checksums of changed files anew."""
    files = sorted(file for file in folder.iterdir() if file.name != SUMS)
    sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    (folder / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint after 2 steps, and the one before, after 1.  Copy it."""
    folder = tmp_path_factory.mktemp("written")
    taken(folder, 1)
    taken(folder, 2)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy of `written`."""
    return shutil.copytree(written, tmp_path / "run")


class TestFiles:
    def test_weights_moments_and_curve_come_back(self, tmp_path: Path) -> None:
        weights = taken(tmp_path, 3)
        curve, found, optimizer = resumed(tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(weights, found, strict=True))
        assert [row[0] for row in curve.rows] == [1, 2, 3]
        for state in optimizer.state.values():
            assert state["step"] == 3
            assert state["exp_avg"].any()
            assert state["exp_avg_sq"].any()

    def test_weights_without_gradients_have_no_moments(self, tmp_path: Path) -> None:
        model, optimizer = begun()
        (model(torch.ones(2)).sum() * 0 + model.weight.sum()).backward()
        model.bias.grad = None
        optimizer.step()
        checkpoint.save(tmp_path, model, optimizer, Curve(rows(1)), SETTINGS, ALONE)
        _, weights, state = resumed(tmp_path)
        assert weights[0].all()
        assert len(state.state) == 1

    def test_files_are_those_of_the_formats(self, written: Path) -> None:
        from safetensors.numpy import load_file

        folder = written / "checkpoint"
        assert sorted(os.listdir(folder)) == sorted([PART, MANIFEST, SUMS])
        assert {*load_file(folder / PART)} == {
            *("model.weight", "model.bias", "exp_avg.weight", "exp_avg.bias"),
            *("exp_avg_sq.weight", "exp_avg_sq.bias"),
        }
        manifest = json.loads((folder / MANIFEST).read_text())
        assert manifest["optimizer_steps"] == {"weight": 2, "bias": 2}
        before = (folder / SUMS).read_text()
        assert len(before.splitlines()) == 2

    def test_the_one_before_is_kept(self, written: Path) -> None:
        assert sorted(os.listdir(written)) == ["checkpoint", "checkpoint.old"]


class TestDamage:
    @pytest.mark.parametrize(
        "every", [pytest.param(False, id="a bit of each byte"),
                  pytest.param(True, id="every bit", marks=pytest.mark.slow)],
    )  # fmt: skip
    def test_any_flipped_bit_is_found(self, every: bool, folder: Path) -> None:
        rng = random.Random(0)
        for name in (PART, MANIFEST, SUMS):
            file = folder / "checkpoint" / name
            right = file.read_bytes()
            for at in range(len(right)):
                for bit in range(8) if every else [rng.randrange(8)]:
                    wrong = bytearray(right)
                    wrong[at] ^= 1 << bit
                    file.write_bytes(wrong)
                    said = refused(folder)
                    assert name in said or name == SUMS
            file.write_bytes(right)
        assert len(resumed(folder)[0]) == 2

    @pytest.mark.parametrize("name", [PART, MANIFEST, SUMS])
    @pytest.mark.parametrize("how", ["cut", "empty", "missing", "FIFO", "folder"])
    def test_other_damage_is_one_line(self, how: str, name: str, folder: Path) -> None:
        file = folder / "checkpoint" / name
        content = file.read_bytes()
        file.unlink()
        if how == "FIFO":
            os.mkfifo(file)
        elif how == "folder":
            file.mkdir()
        elif how != "missing":
            file.write_bytes(content[:40] if how == "cut" else b"")
        assert name in refused(folder)

    def test_intact_older_checkpoint_is_named(self, folder: Path) -> None:
        last, older = folder / "checkpoint", folder / "checkpoint.old"
        (last / PART).write_bytes((last / PART).read_bytes()[:-1])
        assert refused(folder) == (
            f"cannot read {last}: {PART} is damaged: its SHA-256 is not that in {SUMS}; "
            f"without that folder, {older} is resumed, after step 1 (on rank 0 of 1)"
        )
        shutil.rmtree(last)
        assert len(resumed(folder)[0]) == 1

    def test_damaged_older_checkpoint_is_not_named(self, folder: Path) -> None:
        for name in ("checkpoint", "checkpoint.old"):
            (folder / name / PART).write_bytes(b"")
        assert "checkpoint.old" not in refused(folder)


class TestPlanted:
    """Files with right checksums, written by somebody else."""

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("format", 2), ("format", None), ("settings", None), ("settings", []),
            ("settings", {"frames": "4\n5"}), ("curve", None), ("curve", {}), ("curve", "ab"),
            ("curve", [1]), ("curve", [[1, 2, 3]]), ("curve", [["1", 2, 1.5, 0.5, None, 0.25]]),
            ("curve", [[1, 2, None, 0.5, None, 0.25]]), ("curve", [[1 << 60, 2, 1.5, 0, 0, 0]]),
            ("curve", [[1, 2, 1.5, math.nan, None, 0.25], [2, 2, 1.5, 0.5, None, 0.25]]),
            ("curve", [[2, 2, 1.5, 0.5, None, 0.25], [3, 2, 1.5, 0.5, None, 0.25]]),
            ("curve", []), ("optimizer_steps", {"weight": 3, "bias": 3}),
            ("optimizer_steps", None), ("optimizer_steps", []), ("optimizer_steps", {"weight": 2}),
            ("optimizer_steps", {"weight": 2, "bias": "2"}), ("optimizer_steps", {"other": 2}),
            ("optimizer_steps", {"weight": 2, "bias": -1}),
            ("optimizer_steps", {"weight": 2, "bias": True}),
            ("optimizer_steps", {"weight": 2, "bias": 1e400}),
        ],
    )  # fmt: skip
    def test_manifest_of_wrong_types_is_one_line(self, key: str, value: Any, folder: Path) -> None:
        file = folder / "checkpoint" / MANIFEST
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
        seal(folder / "checkpoint")
        refused(folder)

    def test_loss_may_have_diverged(self, folder: Path) -> None:
        file = folder / "checkpoint" / MANIFEST
        text = json.loads(file.read_text())
        text["curve"][1][2] = math.nan
        file.write_text(json.dumps(text))
        seal(folder / "checkpoint")
        assert len(resumed(folder)[0]) == 2

    def test_endless_sums_are_one_line(self, folder: Path) -> None:
        os.truncate(folder / "checkpoint" / SUMS, 1 << 40)  # it takes no room on the disk
        assert "more than 134217728 bytes" in refused(folder)

    def test_tensor_in_two_files_is_refused(self, folder: Path) -> None:
        shutil.copy(folder / "checkpoint" / PART, folder / "checkpoint" / "part-1.safetensors")
        seal(folder / "checkpoint")
        assert "a tensor is in two files" in refused(folder)

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, "9" * 5000, "\udcff"])
    def test_manifest_that_is_none_is_one_line(self, text: str, folder: Path) -> None:
        (folder / "checkpoint" / MANIFEST).write_bytes(text.encode(errors="surrogateescape"))
        seal(folder / "checkpoint")
        refused(folder)

    @pytest.mark.parametrize(
        "edit",
        [
            lambda header: header | {"model.weight": header["model.weight"] | {"dtype": "I64"}},
            lambda header: header | {"model.weight": header["model.weight"] | {"shape": [2, 3]}},
            lambda header: header | {"model.weight": header["model.weight"] | {"shape": []}},
            lambda header: {n: x for n, x in header.items() if n != "exp_avg.bias"},
            lambda header: header | {"model.x\ny": header["model.weight"]},
        ],
        ids=["dtype", "shape", "no axis", "missing", "more"],
    )
    def test_other_tensors_are_refused(
        self, edit: Callable[[dict[str, Any]], dict[str, Any]], folder: Path
    ) -> None:
        file = folder / "checkpoint" / PART
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        text = json.dumps(edit(json.loads(content[8 : 8 + length]))).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
        seal(folder / "checkpoint")
        refused(folder)

    @pytest.mark.parametrize(
        "rounds", [pytest.param(400, id="few"), pytest.param(4000, marks=pytest.mark.slow)]
    )
    def test_random_changes_are_one_line_at_most(self, rounds: int, folder: Path) -> None:
        rng = random.Random(1)
        for n in range(rounds):
            file = folder / "checkpoint" / (PART, MANIFEST, SUMS)[n % 3]
            right = file.read_bytes()
            file.write_bytes(changed(right, rng))
            if file.name != SUMS:
                seal(folder / "checkpoint")
            assert len(outcome(folder).splitlines()) == 1
            file.write_bytes(right)
            seal(folder / "checkpoint")

    @pytest.mark.parametrize("name", [PART, MANIFEST, SUMS])
    def test_code_does_not_run(self, name: str, folder: Path, tmp_path: Path) -> None:
        bomb = Bomb(tmp_path / "ran")
        (folder / "checkpoint" / name).write_bytes(pickle.dumps(bomb))
        if name != SUMS:
            seal(folder / "checkpoint")
        refused(folder)
        assert not bomb.mark.exists()

    def test_former_format_does_not_run(self, tmp_path: Path) -> None:
        """It was that of `torch.distributed.checkpoint`."""
        bomb, former = Bomb(tmp_path / "ran"), tmp_path / "run" / "checkpoint"
        former.mkdir(parents=True)
        (former / ".metadata").write_bytes(pickle.dumps(bomb))
        assert SUMS in refused(tmp_path / "run")
        assert not bomb.mark.exists()


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def changed(content: bytes, rng: random.Random) -> bytes:
    """Change, take out, put in or repeat a few bytes."""
    text = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(text) + 1)
        end = min(len(text), at + rng.choice([0, 1, 1, 2, 8]))
        few = bytes(rng.choice(b'09-.eE"[]{},:nt\n\0\xff') for _ in range(rng.randint(0, 2)))
        text[at:end] = few if rng.random() < 0.8 else text[at:end] * 3
    return bytes(text)


class TestFolder:
    def test_second_training_is_refused(self, folder: Path, capsys: Any, monkeypatch: Any) -> None:
        monkeypatch.setattr(checkpoint, "load", None)
        with run_folder(folder, ALONE, resume=True):
            assert run_training(options(folder, "--resume")) == 2
        assert capsys.readouterr().err == (
            f"lvxattn train: error: --output: cannot write {folder}: another training is in there, "
            f"process {os.getpid()} on {os.uname().nodename} (on rank 0 of 1)\n"
        )
        with run_folder(folder, ALONE, resume=True):  # the first has ended
            pass

    def test_file_system_without_locks_is_warned_of(
        self, tmp_path: Path, capsys: Any, monkeypatch: Any
    ) -> None:
        def refuse(*_: Any) -> None:
            raise OSError(error, os.strerror(error))

        monkeypatch.setattr(module.fcntl, "flock", refuse)
        for error in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            with run_folder(tmp_path, ALONE, resume=False):
                assert capsys.readouterr().err == (
                    f"lvxattn train: warning: --output: {tmp_path} cannot be locked "
                    f"({os.strerror(error)}): start no other training in it\n"
                )
        error = errno.EIO
        with (
            pytest.raises(InputError, match="it cannot be locked"),
            run_folder(tmp_path, ALONE, resume=False),
        ):
            pass

    def test_lock_ends_with_an_error(self, tmp_path: Path) -> None:
        for _ in range(2):
            with pytest.raises(KeyError), run_folder(tmp_path / "run", ALONE, resume=False):
                raise KeyError

    @pytest.mark.parametrize(
        ("name", "what"),
        [
            ("lock", "link"),
            ("lock", "FIFO"),
            ("lock", "folder"),
            ("lock", "text"),
            ("curve.csv", "FIFO"),
        ],
    )
    def test_planted_file_is_refused(self, name: str, what: str, tmp_path: Path) -> None:
        other, path = tmp_path / "other", tmp_path / "run" / name
        other.write_text("not yours")
        path.parent.mkdir()
        if what == "link":
            path.symlink_to(other)
        elif what == "FIFO":
            os.mkfifo(path)
        elif what == "text":
            path.write_text("mine")
        else:
            path.mkdir()
        with (
            pytest.raises(InputError, match="run: lock: " if name == "lock" else "FIFO"),
            run_folder(path.parent, ALONE, resume=False),
        ):
            pass
        assert other.read_text() == "not yours"
        assert what != "text" or path.read_text() == "mine"

    @pytest.mark.parametrize("name", ["checkpoint", "checkpoint.old"])
    def test_training_is_not_begun_over_another(self, name: str, folder: Path, capsys: Any) -> None:
        for other in {"checkpoint", "checkpoint.old"} - {name}:
            shutil.rmtree(folder / other)
        assert run_training(options(folder)) == 2
        assert capsys.readouterr().err == (
            f"lvxattn train: error: --output: {folder} holds a training: continue it with "
            "--resume, or give another folder (on rank 0 of 1)\n"
        )
        assert len(resumed(folder)[0]) in (1, 2)

    def test_checkpoint_may_be_a_link(self, folder: Path, tmp_path: Path) -> None:
        (folder / "checkpoint").rename(tmp_path / "elsewhere")
        (folder / "checkpoint").symlink_to(tmp_path / "elsewhere")
        for steps in (3, 4, 5):
            taken(folder, steps)
            assert len(resumed(folder)[0]) == steps
        assert (tmp_path / "elsewhere" / PART).exists()

    def test_leftovers_are_removed(self, folder: Path) -> None:
        left, other = folder / "checkpoint.new-0123456789abcdef", folder / "checkpoint.newest"
        left.mkdir()
        other.mkdir()
        (left / PART).write_bytes(b"cut sh")
        with run_folder(folder, ALONE, resume=True):
            assert not left.exists()
        assert other.exists()

    @pytest.mark.slow
    def test_kill_at_any_moment(self, tmp_path: Path) -> None:
        """Killed before any of its accesses to files, a process leaves a checkpoint, unlocked."""
        ended = forked(1, PROGRAMS / "killed_checkpoint.py", tmp_path / "run")
        assert (ended.status, ended.left) == (0, ()), ended.err
        *killed, last = json.loads(ended.out)
        assert len(killed) > 20
        assert set(killed) == {1, 2}
        assert last == 2
        assert sorted(os.listdir(tmp_path / "run")) == ["checkpoint", "checkpoint.old", "lock"]


UNPICKLING = (
    *("pickle", "dill", "joblib", "shelve", "marshal", "allow_pickle", "weights_only"),
    *("torch.load", "torch.distributed.checkpoint"),
)


def modules() -> Iterator[Path]:
    for folder in ("reference", "mpi_impl", "torch_impl", "src/lvxattn", "benchmarks"):
        yield from (path for path in (ROOT / folder).rglob("*.py") if path.resolve() == path)


def test_these_modules_alone_unpickle() -> None:
    """They read a folder of their own, what their own ranks sent, and what they have written."""
    readers = set()
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Call):
                names = [ast.unparse(node.func)]
                names += [str(word.arg) for word in node.keywords]
            if any(f"{name}.".startswith(f"{risky}.") for name in names for risky in UNPICKLING):
                readers.add(str(path.relative_to(ROOT)))
    assert readers == {
        "mpi_impl/jupyter/cell_files.py",
        "src/lvxattn/check/ranks/torch_processes.py",
        "src/lvxattn/common/rules.py",
        "torch_impl/examples/fully_sharded.py",
        "torch_impl/layout.py",  # which only pickles, for a digest
    }
