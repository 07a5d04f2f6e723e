"""The training run: clips, curves on any number of ranks, checkpoints, the command."""

import csv
import json
import os
import re
import shutil
import signal
from argparse import ArgumentParser, Namespace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lvxattn.torch_impl.commands.train import add_options, checkpoint, program, run_training
from lvxattn.torch_impl.commands.train import training as training_module
from lvxattn.torch_impl.commands.train.data import (
    BITS,
    TEST,
    TRAIN,
    WATCH,
    Clips,
    Images,
    load_images,
    make_clips,
)
from lvxattn.torch_impl.commands.train.draw import draw_curve
from lvxattn.torch_impl.commands.train.model import find_needles
from lvxattn.torch_impl.commands.train.options import GROW, Curriculum, InputError, Settings
from lvxattn.torch_impl.commands.train.training import Run, make_model
from lvxattn.torch_impl.commands.train.training_report import Curve, Reporter
from lvxattn.torch_impl.commands.train.training_report import Test as Answers
from lvxattn.torch_impl.group import Group
from tests.errors import says
from tests.launch import PROGRAMS
from tests.torch_ranks import forked

# Clips of 3 frames, then 6: on 4 ranks the last holds none, then the first two hold one more.
SETTINGS = Settings(frames=10, first_frames=3, batch=3, dtype="float64", seed=3)
STEPS = 48
SMALL = ["--frames=9", "--first-frames=3", "--batch=2", "--dtype=float64", "--steps=8"]
SMALL_SETTINGS = Settings(9, first_frames=3, batch=2, dtype="float64", seed=0)

# On 3 ranks: frames are uneven, and one has none of the two questions about a clip.
LLAMA = Settings(5, 4, batch=2, dtype="float64", seed=3, model="llama3v")
LLAMA_STEPS = 3
LLAMA_SMALL = ["--model=llama3v", "--frames=5", "--first-frames=4", "--batch=2", "--seed=3"]

parts = cache(load_images)


def clips(key=(0, TRAIN, 0), shape=(3, 11, 7), rank=0, size=1) -> Clips:
    return make_clips(parts()[key[1]], key, shape, rank, size)


def options(folder: Path, *more: str) -> Namespace:
    parser = ArgumentParser()
    add_options(parser)
    return parser.parse_args([*SMALL, "--quiet", "--output", str(folder), *more])


def curve(folder: Path) -> list[dict[str, str]]:
    with (folder / "curve.csv").open() as file:
        return list(csv.DictReader(file))


def losses(folder: Path) -> list[float]:
    return [float(row["loss"]) for row in curve(folder)]


def small_run() -> Run:
    return Run.begin(SMALL_SETTINGS, parts(), Group(None))


def make_exact(settings: Settings, group: Group, schedule: str) -> Any:
    """Make a Mllama whose norms and loss are in its own dtype: those of transformers in float32."""
    from transformers.models.mllama.modeling_mllama import MllamaTextRMSNorm

    from tests.zoo import causal_loss, in_its_own_dtype

    model: Any = make_model(settings, group, schedule)
    model.llama.loss_function = causal_loss
    in_its_own_dtype(MllamaTextRMSNorm)
    return model


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Use one thread: the tensors are too small for two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _undrawn(straight, monkeypatch):
    """Draw the pictures of one run only: they take longer than the rest."""
    monkeypatch.setattr(program, "_draw", lambda *_: None)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps, not interrupted, with all its files."""
    folder = tmp_path_factory.mktemp("straight")
    assert run_training(options(folder)) == 0
    return folder


@pytest.fixture(scope="module")
def half_way(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run after 5 steps.  Copy it before going on."""
    folder = tmp_path_factory.mktemp("half_way")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "_draw", lambda *_: None)
        assert run_training(options(folder, "--steps", "5")) == 0
    return folder


@pytest.fixture(scope="module")
def on_4_ranks(half_way: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """48 steps on 4 ranks, and then the run of 5 steps, of one rank, resumed on 4."""
    folder = tmp_path_factory.mktemp("ranks") / "resumed"
    shutil.copytree(half_way, folder)
    args = str(STEPS), *SMALL, "--resume", "--schedule", "gather", "--output", str(folder)
    ended = forked(4, PROGRAMS / "train.py", *args)
    assert ended.status == 0, ended.out + ended.err
    assert not ended.left
    return {"folder": folder, **json.loads(ended.out)}


class TestData:
    def test_splits_are_disjoint(self):
        numbers = [set(part.numbers.tolist()) for part in parts()]
        assert sum(map(len, numbers)) == len(set().union(*numbers)) == 1797
        # No picture has two numbers either.
        pictures = [{x.tobytes() for x in part.pixels} for part in parts()]
        assert sum(map(len, pictures)) == len(set().union(*pictures))

    @pytest.mark.parametrize("purpose", [TRAIN, WATCH, TEST])
    def test_clips_use_images_of_their_split(self, purpose):
        run = small_run()
        shown = run.clips(purpose, 4, (5, 300, 40))
        known = {x.astype(np.float64).tobytes() for x in parts()[purpose].pixels}
        assert {x.numpy().tobytes() for x in shown.pictures.flatten(0, 1)} <= known
        assert set(shown.images.flatten().tolist()) <= set(parts()[purpose].numbers.tolist())

    def test_clips_follow_from_seed_purpose_and_step(self):
        same, again = clips((1, TRAIN, 2)), clips((1, TRAIN, 2))
        assert torch.equal(same.pictures, again.pictures)
        assert torch.equal(same.questions, again.questions)
        for other in ((2, TRAIN, 2), (1, WATCH, 2), (1, TRAIN, 3)):
            assert not torch.equal(same.markers, clips(other).markers)

    @pytest.mark.parametrize("size", [2, 3, 4, 13])
    def test_shards_of_a_clip_join(self, size):
        whole = clips()
        shares = [clips(rank=rank, size=size) for rank in range(size)]
        for name in ("pictures", "markers", "questions", "answers", "asked", "images"):
            joined = torch.cat([getattr(share, name) for share in shares], dim=1)
            assert torch.equal(joined, getattr(whole, name)), name
        assert {share.shape for share in shares} == {whole.shape}

    def test_marker_points_to_the_answer(self):
        batch = clips(shape=(2, 1300, 50))
        train = parts()[TRAIN]
        digits = {x.tobytes(): d for x, d in zip(train.pixels, train.digits, strict=True)}
        for clip in range(2):
            assert len(batch.markers[clip].unique(dim=0)) == 1300
            for question, answer in zip(batch.questions[clip], batch.answers[clip], strict=True):
                (frame,) = (batch.markers[clip] == question).all(dim=-1).nonzero().flatten()
                assert digits[batch.pictures[clip, frame].numpy().tobytes()] == answer

    def test_clip_with_all_markers(self):
        few = Images(np.zeros((1, 8, 8), np.float32), np.zeros(1, np.int64), np.zeros(1, np.int64))
        batch = make_clips(few, (0, 0, 0), (1, 1 << BITS, 1), 0, 1)
        assert len(batch.markers[0].unique(dim=0)) == 1 << BITS


class TestCurriculum:
    def test_clips_double_until_they_are_long_enough(self):
        curriculum = Curriculum(start=2, frames=1200, batch=4)
        lengths = [curriculum.shape(step)[1] for step in range(0, 400, GROW)]
        assert lengths[:11] == [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 1200]
        assert set(lengths[11:]) == {1200}
        assert curriculum.grown == 10 * GROW
        assert curriculum.shape(10**9) == curriculum.final == (4, 1200, 64)

    def test_first_clips_wait(self):
        curriculum = Curriculum(start=2, frames=1200, batch=4, wait=75)
        lengths = [curriculum.shape(step)[1] for step in (0, 99, 100, 124, 125, 324, 325)]
        assert lengths == [2, 2, 4, 4, 8, 1024, 1200]
        assert curriculum.grown == 325

    def test_number_of_questions_is_constant(self):
        curriculum = Curriculum(start=2, frames=1200, batch=4)
        shapes = [curriculum.shape(step) for step in range(400)]
        assert {B * S_Q for B, _, S_Q in shapes} == {256}

    def test_learning_rate_schedule(self):
        curriculum = Curriculum(start=2, frames=64, batch=4)
        rates = [curriculum.rate(step) for step in range(400)]
        assert 0 < rates[0] < rates[10] < rates[50] == rates[curriculum.grown]
        assert rates[-1] < rates[curriculum.grown + 100] < rates[curriculum.grown]


class TestRanks:
    def test_four_ranks_learn_like_one(self, on_4_ranks):
        run = Run.begin(SETTINGS, parts(), Group(None))
        for _ in range(STEPS):
            run.step()
        alone = run.curve.column("loss")
        assert len(on_4_ranks["losses"]) == STEPS
        np.testing.assert_allclose(on_4_ranks["losses"], alone, rtol=1e-5, atol=0)
        assert min(alone) < 0.8 * alone[0]  # it did learn something

    @pytest.mark.parametrize("schedule", ["ring", "ulysses", "gather", "auto"])
    def test_schedules_learn_alike(self, schedule, on_4_ranks):
        found = on_4_ranks["other ways"][schedule]
        assert len(found) == 3
        np.testing.assert_allclose(found, on_4_ranks["losses"][:3], rtol=1e-9, atol=0)

    def test_unusable_ulysses_is_refused_before_training(self, on_4_ranks):
        first, *others, not_asked = on_4_ranks["refusals"]
        error = first[2].removeprefix("lvxattn train: error: ")
        assert re.search(says("schedule", "'ulysses'", "H_KV", 3, 4, rank=0, of=3), error)
        assert error.count("\n") == 1
        assert [first[:2], *others] == [[2, ""], [2, "", ""], [2, "", ""]]
        assert not_asked is None

    def test_all_ranks_have_the_same_weights(self, on_4_ranks):
        assert len({weights for weights, *_ in on_4_ranks["by_rank"]}) == 1

    def test_only_rank_0_prints(self, on_4_ranks):
        first, *others = on_4_ranks["by_rank"]
        assert {status for _, status, *_ in on_4_ranks["by_rank"]} == {0}
        assert not any(out or err for _, _, out, err in others)
        assert "resumed after step 5" in first[2]
        for schedule in ("LV-XAttn", "Ring Attention", "gather"):
            assert f"sent in a step by {schedule}" in first[2]
        assert not first[3]  # no warnings of PyTorch either

    def test_one_rank_checkpoint_resumes_on_four(self, on_4_ranks, straight):
        resumed = losses(on_4_ranks["folder"])
        np.testing.assert_allclose(resumed, losses(straight), rtol=1e-9, atol=0)

    def test_checkpoint_of_four_ranks_is_read_by_one(self, on_4_ranks, straight):
        folder, weights = on_4_ranks["folder"], []
        assert len([*(folder / "checkpoint").glob("part-*.safetensors")]) == 4
        for where in (folder, straight):
            run = small_run()
            loaded = checkpoint.load(where, run.model, run.optimizer, SMALL_SETTINGS, Group(None))
            assert len(loaded) == 8
            weights.append([*run.model.parameters()])
        for found, expected in zip(*weights, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)

    def test_diverged_ranks_raise(self):
        class Torn(Group):
            def allgather(self, sendobj):
                return [sendobj, "another"]

        with pytest.raises(
            RuntimeError, match=r"weights: expected those of rank 0, got others \(on rank 1 of 2\)"
        ):
            checkpoint._check_equal(small_run().model, Torn(None))


class TestCheckpoint:
    def test_resumed_run_equals_uninterrupted(self, half_way, straight, tmp_path, recwarn):
        folder = shutil.copytree(half_way, tmp_path / "run")
        assert len(curve(folder)) == 5
        assert run_training(options(folder, "--resume")) == 0
        assert losses(folder) == losses(straight)
        assert not recwarn.list  # PyTorch would warn of saving in one process
        weights = []
        for where in (folder, straight):
            run = small_run()
            checkpoint.load(where, run.model, run.optimizer, SMALL_SETTINGS, Group(None))
            weights.append([*run.model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))

    @pytest.mark.parametrize("moment", ["while writing", "between the renames"])
    def test_checkpoint_survives_kill(self, moment, half_way, straight, tmp_path):
        folder = shutil.copytree(half_way, tmp_path / "run")
        last, new, old = (
            folder / f"checkpoint{end}" for end in ("", ".new-0123456789abcdef", ".old")
        )
        if moment == "while writing":
            new.mkdir()
            (new / "part-0.safetensors").write_bytes(b"cut sh")
        else:
            shutil.copytree(last, new)
            last.rename(old)
        assert run_training(options(folder, "--resume")) == 0
        assert losses(folder) == losses(straight)
        assert {*folder.glob("checkpoint*")} <= {last, old}

    def test_failed_write_keeps_old_checkpoint(self, half_way, tmp_path, monkeypatch, capsys):
        folder = shutil.copytree(half_way, tmp_path / "run")

        def full(path, tensors):
            path.write_bytes(b"cut sh")
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "_write", full)
            assert run_training(options(folder, "--resume")) == 2
        assert "No space left on device" in capsys.readouterr().err
        assert [*folder.glob("checkpoint*")] == [folder / "checkpoint"]
        run = small_run()
        loaded = checkpoint.load(folder, run.model, run.optimizer, SMALL_SETTINGS, Group(None))
        assert len(loaded) == 5

    def test_damaged_checkpoint_prints_one_line(self, half_way, tmp_path, capsys):
        folder = shutil.copytree(half_way, tmp_path / "run")
        for file in (folder / "checkpoint").glob("*.safetensors"):
            file.write_bytes(file.read_bytes()[:1000])
        assert run_training(options(folder, "--resume")) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "cannot read" in said

    @pytest.mark.parametrize(
        "more",
        [["--seed", "1"], ["--frames", "10"], ["--first-frames", "2"], ["--batch", "3"],
         ["--dtype", "float32"], pytest.param(["--model", "llama3v"], marks=pytest.mark.slow)],
    )  # fmt: skip
    def test_resume_with_other_settings_is_refused(self, more, half_way, tmp_path, capsys):
        folder = shutil.copytree(half_way, tmp_path / "run")
        assert run_training(options(folder, "--resume", *more)) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert more[0] in said
        assert len(curve(folder)) == 5

    def test_signal_writes_checkpoint(self, straight, tmp_path, monkeypatch, capsys):
        before = signal.getsignal(signal.SIGTERM)
        with monkeypatch.context() as patch:
            patch.setattr(training_module, "LOOK_EVERY", 3)
            patch.setattr(Run, "look", lambda _: os.kill(os.getpid(), signal.SIGTERM))
            patch.setattr(Reporter, "step", lambda *_: None)
            assert run_training(options(tmp_path)) == 1
        assert signal.getsignal(signal.SIGTERM) is before
        # Ranks agree on a signal during a step, so that one more was taken.
        assert len(curve(tmp_path)) == 4
        assert run_training(options(tmp_path, "--resume")) == 0
        assert losses(tmp_path) == losses(straight)

    def test_minutes_limit_the_run(self, tmp_path):
        assert run_training(options(tmp_path, "--minutes", "1e-9")) == 0
        assert len(curve(tmp_path)) == 1


class TestLlama3v:
    def test_batch_shows_what_it_asks_about(self):
        model: Any = Run.begin(LLAMA, parts(), Group(None)).model
        whole = make_clips(parts()[TRAIN], (0, TRAIN, 0), (2, 30, 7), 0, 1, torch.float64)
        batch = model.make_batch(whole)
        pixels = batch["pixel_values"]
        assert torch.equal(pixels[:, :, 0, 0], whole.pictures)
        for row, column in ((a, b) for a in (0, 1) for b in (0, 1)):
            drawn = pixels[:, :, 0, 1, row::2, column::2].flatten(2)
            asked = torch.take_along_dim(drawn, whole.asked[..., None], dim=1)
            assert torch.equal(asked, whole.questions)
        assert not pixels[:, :, :, 2].any()
        assert torch.equal(batch["shift_labels"], whole.answers)

    def test_run_writes_its_files(self, tmp_path, capsys):
        small = [*SMALL, *LLAMA_SMALL, "--steps=2", "--output", str(tmp_path)]
        parser = ArgumentParser()
        add_options(parser)
        assert run_training(parser.parse_args(small)) == 0
        said = capsys.readouterr()
        assert "wrote checkpoint, curve.csv, curve.png in" in said.out
        assert "5 visual tokens per frame" in said.out
        assert not said.err
        assert len(losses(tmp_path)) == 2

    def test_missing_transformers_is_reported(self, tmp_path, capsys, monkeypatch):
        def without(module):
            if module == "transformers":
                raise ModuleNotFoundError("No module named 'transformers'")

        monkeypatch.setattr(program, "import_module", without)
        assert run_training(options(tmp_path, "--model", "llama3v")) == 2
        assert capsys.readouterr().err == (
            "lvxattn train: error: No module named 'transformers'; --model llama3v needs "
            "pip install '.[models]' (on rank 0 of 1)\n"
        )

    @pytest.mark.slow
    def test_three_ranks_learn_like_one(self, tmp_path, monkeypatch):
        from transformers.models.mllama.modeling_mllama import MllamaTextRMSNorm

        monkeypatch.setattr(MllamaTextRMSNorm, "forward", MllamaTextRMSNorm.forward)  # put back
        monkeypatch.setattr(training_module, "make_model", make_exact)
        # 1. A few steps, and some of them as a run of the command.
        alone = Run.begin(LLAMA, parts(), Group(None))
        for _ in range(LLAMA_STEPS):
            alone.step()
        small = *LLAMA_SMALL, "--steps", str(LLAMA_STEPS - 2)
        assert run_training(options(tmp_path, *small)) == 0
        # 2. The same on 3 ranks, which resume the run.
        small = *SMALL, *LLAMA_SMALL, "--steps", str(LLAMA_STEPS), "--resume"
        program_of_ranks = PROGRAMS / "train_llama3v.py"
        ended = forked(3, program_of_ranks, str(LLAMA_STEPS), *small, "--output", str(tmp_path))
        assert ended.status == 0, ended.out + ended.err
        told = json.loads(ended.out)
        (status, said, error), *others = told["by_rank"]
        assert (status, error) == (0, ""), error
        assert others == [[0, "", ""]] * 2
        assert f"resumed after step {LLAMA_STEPS - 2}" in said
        assert "sent in a step by Ring Attention" in said
        for found in (told["loss"], losses(tmp_path)):
            np.testing.assert_allclose(found, alone.curve.column("loss"), rtol=1e-9, atol=0)
        assert told["accuracy"] == alone.curve.column("accuracy")


class TestCommand:
    def test_output_files_are_written(self, straight):
        found = {file.name for file in straight.iterdir()}
        assert found == {"checkpoint", "curve.csv", "curve.png", "lock", "needles.png"}
        rows = curve(straight)
        assert [*rows[0]] == ["step", "frames", "loss", "accuracy", "held_out", "seconds"]
        assert [int(row["step"]) for row in rows] == list(range(1, 9))
        assert rows[-1]["held_out"]

    def test_training_stops_after_two_good_evaluations(self):
        run = small_run()
        for _ in range(run.settings.curriculum.grown + 4):
            run.curve.rows.append([0, 3, 1.0, 0.5, None, 0.0])
        run.curve.rows[0][4] = run.curve.rows[1][4] = run.curve.rows[-3][4] = 0.98
        assert not run.done(1000, 0.975)
        run.curve.rows[-1][4] = 0.98
        assert run.done(1000, 0.975)
        run.curve.rows[-1][4] = 0.97
        assert not run.done(1000, 0.975)
        assert run.done(len(run.curve), 0.975)

    def test_missed_target_fails_only_if_given(self, tmp_path, capsys):
        assert run_training(options(tmp_path, "--steps", "1")) == 0
        assert not capsys.readouterr().err
        assert run_training(options(tmp_path / "again", "--steps", "1", "--target", "0.9")) == 1
        assert "of the answers are right" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "more",
        [["--steps", "0"], ["--frames", "65537"], ["--batch", "x"], ["--minutes", "0"],
         ["--minutes", "nan"], ["--target", "1"], ["--target", "nan"], ["--seed", "-1"],
         ["--checkpoint-every", "0"], ["--dtype", "float16"], ["--schedule", "none"],
         ["--model", "llama"]],
    )  # fmt: skip
    def test_bad_arguments_are_refused(self, more, tmp_path, capsys):
        with pytest.raises(SystemExit):
            options(tmp_path, *more)
        assert f"argument {more[0]}: " in capsys.readouterr().err

    def test_first_frames_above_frames_raises(self, tmp_path):
        with pytest.raises(InputError, match="--first-frames"):
            Settings.of(options(tmp_path, "--first-frames", "10"))

    @pytest.mark.parametrize("resume", [False, True])
    def test_bad_folder_is_refused_at_once(self, resume, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(Run, "step", None)
        # A file in place of the folder; or nothing to resume from.
        folder = tmp_path / "run"
        if not resume:
            folder.write_text("a file")
        assert run_training(options(folder, *["--resume"] * resume)) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert str(folder) in said

    def test_interval_counts_images(self):
        low, high = Answers(right=1940, questions=2000, images=200).interval
        # Wilson's, by its defining equation: |p - x| = z sqrt(x (1 - x) / n).
        for x in (low, high):
            assert abs(0.97 - x) == pytest.approx(1.96 * np.sqrt(x * (1 - x) / 200))
        assert low < 0.97 < high

    def test_attention_maps_show_needles(self):
        run = small_run()
        batch = run.clips(TEST, 0, (2, 9, 5))
        layer, needles = find_needles(run.model, batch)
        assert 1 <= layer <= 2
        assert [needle.frame for needle in needles] == batch.asked[0].tolist()
        for needle in needles:
            assert needle.weights.sum() == pytest.approx(1)
            assert np.array_equal(batch.markers[0, needle.frame].numpy(), needle.marker)
            assert np.array_equal(batch.pictures[0, needle.frame].numpy(), needle.picture)

    @pytest.mark.parametrize("wrong", [np.nan, np.inf])
    def test_curve_that_diverges_is_drawn(self, wrong, tmp_path):
        curve = Curve([[1, 2, 2.5, 0.1, 0.2, 1.0], [2, 2, wrong, 0.1, None, 2.0]])
        draw_curve(tmp_path / "curve.png", curve, 0.9, "a title")
        assert (tmp_path / "curve.png").stat().st_size > 1000
