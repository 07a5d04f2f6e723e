"""Golden files: the shipped ones are correct, and defects of files are found."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from lvxattn.check import case_of, draw, golden, golden_names, suite_of
from lvxattn.check.command import main
from lvxattn.check.golden_data import (
    SHIPPED,
    inputs_of,
    read_tensors,
    verify_golden,
    write_golden,
    write_tensors,
)
from lvxattn.check.golden_manifest import MANIFEST
from lvxattn.cli.tensors import InputError
from tests.errors import says

AGAIN = "python -m lvxattn.check golden --out src/lvxattn/check/golden_files"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the shipped files."""
    return Path(shutil.copytree(SHIPPED, tmp_path / "golden"))


def manifest_of(folder: Path) -> Any:
    return json.loads((folder / MANIFEST).read_text())


def test_golden_files_are_correct_and_small(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_golden() == []
    assert main(["golden", "--verify"]) == 0
    assert f"{len(golden_names())} cases" in capsys.readouterr().out
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 1_500_000


def test_golden_files_match_quick_suite() -> None:
    manifest = manifest_of(SHIPPED)
    listed = set(manifest["cases"]) | set(manifest["left_out"])
    assert listed == {case.name for case in suite_of("quick")}, AGAIN
    for name, entry in manifest["cases"].items():
        today = draw(case_of(name), "float32")
        inputs, stored = inputs_of(today), golden(name)
        assert (entry["reason"], entry["group"]) == (today.case.reason, today.case.group), AGAIN
        assert set(inputs) | {"scale", "out", "lse", "dq", "dk", "dv"} == set(stored), AGAIN
        assert entry["scale"] == stored["scale"] == today.scale, AGAIN
        for key, x in inputs.items():
            assert x.dtype == stored[key].dtype
            # A library's sqrt, log and exp are behind these numbers: a rounding may differ.
            assert np.allclose(x, stored[key], rtol=1e-6, atol=1e-6), f"{name} {key}: {AGAIN}"


def test_other_libraries_read_golden_files() -> None:
    for name in golden_names():
        x = golden(name)
        del x["scale"]
        read = load_file(SHIPPED / f"{name}.safetensors")
        assert set(read) == set(x)
        assert all(np.array_equal(read[key], x[key]) for key in x)
        entry = manifest_of(SHIPPED)["cases"][name]
        for key, tensor in entry["tensors"].items():
            assert (list(x[key].shape), x[key].dtype.name) == (tensor["shape"], tensor["dtype"])


def test_unknown_golden_case_raises() -> None:
    with pytest.raises(ValueError, match=r"^name: expected one of gaussian, .*, got 'easy'"):
        golden("easy")


def test_damaged_missing_and_extra_files_are_reported(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = copy / "gaussian.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    (copy / "one-key.safetensors").unlink()
    (copy / "more.txt").write_text("")
    assert main(["golden", "--verify", str(copy)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    lines = [line.removeprefix("lvxattn check golden: ") for line in said.err.splitlines()]
    assert lines[0] == "more.txt: not in the manifest"
    assert lines[1].startswith("gaussian.safetensors: damaged: ")
    assert lines[2] == "one-key.safetensors: is not there"
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"format": 1}', "damaged: KeyError 'cases'"),
        ('{"format": 99, "cases": {}}', "expected format 1, got 99"),
        ('{"format": 1, "cases": {"x": {"file": "../x"}}}', "expected a file's name"),
        ('{"format": 1, "cases": {"x": {"file": ".."}}}', "expected a file's name"),
        ('{"format": 1, "cases": {"x": {"file": 5}}}', "expected a file's name, got 5"),
        ('{"format": 1, "cases": {"a\\nb": {"file": "x"}}}', "expected a case's name, got 'a\\nb'"),
        ('{"format": 1, "cases": {"x": {"file": "x"}}}', "damaged: x has no bytes"),
        ("[" * 100_000, "damaged: RecursionError"),
    ],
)
def test_bad_manifest_raises(copy: Path, text: str, words: str) -> None:
    (copy / MANIFEST).write_text(text)
    with pytest.raises(InputError, match=MANIFEST) as told:
        verify_golden(copy)
    assert words in str(told.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bytes", "62832"),
        ("sha256", None),
        ("scale", "0.35"),
        ("scale", float("nan")),
        pytest.param("scale", 10**400, id="scale-huge"),
        ("scale", True),
        ("q_kinds", {}),
        ("q_kinds", [10**9] * 32),
        ("kv_kinds", ["0"] * 128),
        ("tensors", []),
        ("group", 1),
    ],
)
def test_entry_of_wrong_type_raises(copy: Path, key: str, value: Any) -> None:
    manifest = manifest_of(copy)
    manifest["cases"]["gaussian"][key] = value
    (copy / MANIFEST).write_text(json.dumps(manifest))
    for read in (verify_golden, golden_names):
        with pytest.raises(InputError, match=rf"damaged: gaussian\.\w+: expected .* as {key}, got"):
            read(copy)


def test_tensor_of_unknown_dtype_is_reported(copy: Path) -> None:
    file = copy / "gaussian.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"dtype": "F32"', b'"dtype": "I32"', 1))
    manifest = manifest_of(copy)
    manifest["cases"]["gaussian"]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"gaussian.*: \w+: expected F64, F32.*, got I32"):
        golden("gaussian", copy)
    (line,) = verify_golden(copy)
    assert re.search(r"^gaussian\.safetensors: \w+: expected F64, F32, .*, got I32", line)


def test_damaged_file_is_not_loaded(copy: Path) -> None:
    file = copy / "gaussian.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"gaussian\.safetensors: damaged: .* another checksum"):
        golden("gaussian", copy)


@pytest.mark.parametrize("name", [MANIFEST, "gaussian.safetensors"])
def test_fifo_is_refused_at_once(name: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / name).unlink()
    os.mkfifo(copy / name)
    assert main(["golden", "--verify", str(copy)]) in (1, 2)
    said = capsys.readouterr()
    assert f"{name}: cannot be read: expected a regular file, got a FIFO\n" in said.err
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("key", ["out", "lse", "dq", "dk", "dv"])
@pytest.mark.parametrize("name", ["gaussian", "dead-rows", "lse-high", "offset-values"])
def test_results_are_recomputed_and_compared_within_limits(
    tmp_path: Path, name: str, key: str
) -> None:
    def verify(change: Any) -> list[str]:
        x = read_tensors(SHIPPED / f"{name}.safetensors")
        change(x[key])
        rewrite(tmp_path, name, key, x[key])
        return verify_golden(tmp_path)

    def step(x: Any) -> None:
        # What is 0 because a row sees nothing is exactly 0.
        x[...] = np.where(np.isfinite(x) & (x != 0), np.nextafter(x, 1.0), x)

    def spoil(x: Any) -> None:
        x[...] = np.where(np.isfinite(x), x * (1 + 1e-7), x)  # dq of lse-high may be 4e-8 off

    def hole(x: Any) -> None:
        x.flat[5] = np.nan

    assert verify(step) == []
    (line,) = verify(spoil)
    assert line.startswith(f"{name}.safetensors: {key}: relative error ")
    (line,) = verify(hole)
    assert line.startswith(f"{name}.safetensors: {key}: 1 NaN of")


def rewrite(folder: Path, name: str, key: str, x: Any) -> None:
    """Write the files of one case, with another tensor and the checksum that belongs to that."""
    manifest = manifest_of(SHIPPED)
    content = bytearray((SHIPPED / f"{name}.safetensors").read_bytes())
    length = int.from_bytes(content[:8], "little")
    start, end = json.loads(content[8 : 8 + length])[key]["data_offsets"]
    content[8 + length + start : 8 + length + end] = x.tobytes()
    (folder / f"{name}.safetensors").write_bytes(content)
    entry = {**manifest["cases"][name], "sha256": hashlib.sha256(content).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps({**manifest, "cases": {name: entry}}))


def test_row_kinds_are_judged_separately(tmp_path: Path) -> None:
    """Gradients of the last keys are e^-24 times as large as those of the first."""
    x = read_tensors(SHIPPED / "gaps-between-shards.safetensors")["dv"]
    x[:, :, -5:] *= 1 + 1e-7
    rewrite(tmp_path, "gaps-between-shards", "dv", x)
    (line,) = verify_golden(tmp_path)
    assert line.startswith("gaps-between-shards.safetensors: dv: relative error")


def test_only_golden_files_are_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "golden"
    assert main(["golden", "--out", str(folder)]) == 0
    said = capsys.readouterr().out
    assert f"{len(golden_names())} cases, " in said
    assert "left out: stride-0: its point is how" in said
    first = golden("gaussian", folder)
    manifest = manifest_of(folder)
    manifest["cases"]["old"] = {**manifest["cases"]["gaussian"], "file": "old.safetensors"}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    (folder / "old.safetensors").write_text("of a case that there is no more")
    assert main(["golden", "--out", str(folder), "--seed", "1"]) == 0
    assert verify_golden(folder) == []
    assert not np.array_equal(golden("gaussian", folder)["q"], first["q"])

    (folder / "mine.txt").write_text("keep me")
    assert main(["golden", "--out", str(folder)]) == 2
    assert "mine.txt" in capsys.readouterr().err
    assert (folder / "mine.txt").read_text() == "keep me"
    assert (folder / "gaussian.safetensors").exists()


def test_unwritable_folder_raises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["golden", "--out", str(tmp_path / "file" / "golden")]) == 2
    assert ": Not a directory" in capsys.readouterr().err


def test_removed_case_is_still_verified(tmp_path: Path) -> None:
    folder = tmp_path / "golden"
    write_golden(folder)
    manifest = manifest_of(folder)
    manifest["cases"]["of-yesterday"] = manifest["cases"].pop("value-size")
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert verify_golden(folder) == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dq": None}, says("dq", "'float64'", [1, 2, 32, 8], None)),
        ({"q": "float64"}, says("q", "'float32'", "'float64'", [1, 2, 32, 8])),
        ({"more": "float32"}, r"^more: expected None as in the manifest, got {'dtype': 'float32'"),
    ],
    ids=["missing", "another dtype", "one too many"],
)
def test_file_must_match_its_manifest(copy: Path, change: dict[str, Any], text: str) -> None:
    file = copy / "gaussian.safetensors"
    arrays = read_tensors(file)
    for key, dtype in change.items():
        x = arrays.pop(key, arrays["q"])
        if dtype is not None:
            arrays[key] = x.astype(dtype)
    write_tensors(file, arrays, {})
    manifest = manifest_of(copy)
    manifest["cases"]["gaussian"]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (copy / MANIFEST).write_text(json.dumps(manifest))
    (line,) = verify_golden(copy)
    file_name, _, message = line.partition(": ")
    assert file_name == "gaussian.safetensors"
    assert re.search(text, message)
