"""What the README and the pages in docs/ show is what happens."""

import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lvxattn.reference import full_attention, full_attention_backward, run_ranks
from lvxattn.reference.virtual_ranks import VirtualComm
from tests.cases import Case
from tests.judge import worst_ratios
from tests.launch import ROOT, mpiexec
from tests.torch_ranks import forked

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    (page, block)
    for page in PAGES
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
]
LINKS = sorted(
    {
        (page, target)
        for page in PAGES
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text())
    }
)
# What each test below knows its block by.
MERGE, RING = "def merge(", "queries.send(q)"
MPI, ATTEND, TRAIN = "# example.py, run as: mpiexec", "# attend.py, run as: torchrun", "# train.py"
KERNEL, ORACLE, MODEL = "import check", "run_ranks(5, on_a_rank)", "import distribute"
PACKED = "Segments(texts, images)"
COMPILED, BOTH_KINDS = "fullgraph=True", "k_text, v_text"
DECODED = "def decode(comm)"


def name_of(x: Path | str) -> str:
    """Return what names a page, or what is on it, in a test's id."""
    return x.stem if isinstance(x, Path) else x.splitlines()[0][:30]


def the_block(mark: str) -> str:
    (found,) = [block for _, block in BLOCKS if mark in block]
    return found


@pytest.mark.parametrize(("page", "block"), BLOCKS, ids=name_of)
def test_every_block_is_run_by_one_of_the_tests_below(page: Path, block: str) -> None:
    marks = MERGE, RING, MPI, ATTEND, TRAIN, KERNEL, ORACLE, MODEL, COMPILED, PACKED
    marks = *marks, BOTH_KINDS, DECODED
    assert sum(mark in block for mark in marks) == 1, f"{page}: {block}"


class Rotation:
    """One kind of block on its way round a ring of virtual ranks."""

    def __init__(self, comm: VirtualComm, tag: int) -> None:
        self.comm, self.tag = comm, tag

    def send(self, *arrays: np.ndarray) -> None:
        self.comm.send(arrays, (self.comm.rank + 1) % self.comm.size, self.tag)

    def pass_on(self) -> None:
        self.send(*self.block)

    def receive(self) -> list[np.ndarray]:
        self.block = self.comm.recv((self.comm.rank - 1) % self.comm.size, self.tag)
        return self.block


@pytest.mark.parametrize("P", [2, 3, 5])
def test_the_merge_and_the_loop_are_attention(P: int) -> None:
    problem = Case("readme", H=4, H_KV=2).make()

    def on_a_rank(comm: VirtualComm) -> tuple[np.ndarray, np.ndarray]:
        part = problem.part(comm.rank, P)
        names = {name: part[name] for name in "qkv"} | {"np": np, "P": P}
        names["k1"], names["k2"] = np.array_split(part["k"], 2, axis=2)
        names["v1"], names["v2"] = np.array_split(part["v"], 2, axis=2)
        names |= {"queries": Rotation(comm, 1), "partials": Rotation(comm, 2)}
        names["attend"] = partial(full_attention, scale=problem.scale)
        exec(the_block(MERGE) + the_block(RING), names)
        return names["out"], names["lse"]

    outs, lses = zip(*run_ranks(P, on_a_rank), strict=True)
    whole = {"out": np.concatenate(outs, axis=2), "lse": np.concatenate(lses, axis=2)}
    assert max(worst_ratios(problem, whole).values()) <= 1


@pytest.mark.mpi
def test_the_ten_lines_for_a_cluster_run_as_shown(tmp_path: Path) -> None:
    checks = """
assert out.shape == (1, 32, 16, 64) and lse.shape == (1, 32, 16)
assert dq.shape == q.shape and dk.shape == k.shape and dv.shape == v.shape
assert abs(dv).max() > 0
print("done")
"""
    (tmp_path / "example.py").write_text(the_block(MPI) + checks)
    ended = mpiexec(4, tmp_path / "example.py")
    assert (ended.status, ended.out.count("done")) == (0, 4), ended.err


@pytest.mark.mpi
def test_the_ten_lines_in_pytorch_run_as_shown(tmp_path: Path) -> None:
    checks = """
assert out.shape == (1, 32, 16, 64)
assert all(x.grad.shape == x.shape and x.grad.abs().max() > 0 for x in (q, k, v))
print("done")
"""
    (tmp_path / "attend.py").write_text(the_block(ATTEND) + checks)
    ended = forked(2, tmp_path / "attend.py")
    assert (ended.status, ended.out.count("done")) == (0, 2), ended.err


@pytest.mark.mpi
def test_the_training_loop_runs_as_shown(tmp_path: Path) -> None:
    program = the_block(TRAIN)
    before = "optimizer.zero_grad()"
    shown = [
        "import sys",
        "whole = loss.detach().clone()",
        "dist.all_reduce(whole)",
        'sys.stdout.write(f"step {step} loss {float(whole)}" + chr(10))',  # ranks share a pipe
    ]
    program = program.replace(before, "; ".join([*shown, before]))
    end = "dist.destroy_process_group()"
    weights = "sum(float(p.detach().double().abs().sum()) for p in layers.parameters())"
    shown = ["\n", f'sys.stdout.write(f"weights {{{weights}}}" + chr(10))', "\n", end]
    (tmp_path / "train.py").write_text(program.replace(end, "".join(shown)))
    ended = forked(2, tmp_path / "train.py")
    assert ended.status == 0, ended.err
    found = re.findall(r"^step (\d) loss (\S+)$", ended.out, re.MULTILINE)
    losses = [{float(loss) for at, loss in found if int(at) == step} for step in range(3)]
    assert len(found) == 6
    assert all(len(loss) == 1 for loss in losses)  # the same whole loss on both ranks
    assert max(losses[0]) > max(losses[1]) > max(losses[2])
    weights = re.findall(r"^weights (\S+)$", ended.out, re.MULTILINE)
    assert len(weights) == 2
    assert weights[0] == weights[1]  # ranks that are alike in the end


@pytest.mark.filterwarnings("ignore")  # Dynamo trips over its own
def test_the_compiled_lines_compile_once() -> None:
    import torch

    torch.compiler.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    space: dict[str, Any] = {}
    exec(the_block(COMPILED), space)
    assert graphs["unique_graphs"] == before + 1
    assert all(p.grad is not None for p in space["model"].parameters())
    torch.compiler.reset()


def test_the_lines_for_a_model_run_as_shown() -> None:
    pytest.importorskip("transformers")
    import torch

    from tests.zoo import make_model

    model, batch, _ = make_model("whisper", torch.float32)
    exec(the_block(MODEL), {"model": model, "batch": batch, "group": None})
    assert all(p.grad is not None for p in model.model.decoder.parameters())


def test_gradients_of_keys_of_both_kinds_are_those_of_one_softmax() -> None:
    space: dict[str, Any] = {}
    exec(the_block(BOTH_KINDS), space)
    k, v = (np.concatenate([space[f"{x}_text"], space[f"{x}_video"]], axis=2) for x in "kv")
    mask = np.ones((12, 312), bool)
    mask[:, :12] = np.tri(12, dtype=bool)
    given = space["q"], k, v
    out, lse = full_attention(*given, mask=mask)
    dq, dk, dv = full_attention_backward(space["dout"], *given, out, lse, mask=mask)
    found = list(zip(*space["gradients"], strict=True))
    got_dq, dk_video, dv_video = (np.concatenate(found[i], axis=2) for i in (0, 3, 4))
    np.testing.assert_allclose(got_dq, dq, atol=1e-12)
    for texts, video, want in ((found[1], dk_video, dk), (found[2], dv_video, dv)):
        for text in texts:
            np.testing.assert_allclose(np.concatenate([text, video], axis=2), want, atol=1e-12)


@pytest.mark.parametrize("mark", [ORACLE, PACKED, DECODED])
def test_the_oracle_runs_as_shown(mark: str, tmp_path: Path) -> None:
    (tmp_path / "oracle.py").write_text(the_block(mark))
    subprocess.run([sys.executable, tmp_path / "oracle.py"], check=True, timeout=300)


def test_the_report_is_what_the_kernel_gets(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "check.md").read_text()
    (shown,) = re.findall(r"```text\n(LV-XAttn check.*?)```", page, re.DOTALL)
    (tmp_path / "mine.py").write_text(the_block(KERNEL))
    done = subprocess.run(
        [sys.executable, tmp_path / "mine.py"],
        check=True,
        timeout=300,
        capture_output=True,
        text=True,
    )

    def two_digits(line: str) -> str:  # the others are this machine's, and all of those that pass
        line = re.sub(r" 0\.\d\d$", "", line)
        return re.sub(r"\d+\.\d+(e[-+]\d+)?", lambda x: f"{float(x[0]):.2g}", line)

    printed = [two_digits(line) for line in done.stdout.splitlines()]
    for line in shown.splitlines():
        found = any(text.startswith(two_digits(line)) for text in printed)
        assert found or line == "  ...", f"{line}\n{done.stdout}"


@pytest.mark.parametrize(("page", "target"), LINKS, ids=name_of)
def test_links_lead_somewhere(page: Path, target: str) -> None:
    name, _, heading = target.partition("#")
    there = (page.parent / name).resolve() if name else page
    assert there.exists()
    if heading:
        titles = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
        assert heading in {re.sub(r"[^\w -]", "", x.lower()).replace(" ", "-") for x in titles}


@pytest.mark.parametrize("target", sorted(set(re.findall(r"^\$ make ([a-z-]+)", "\n".join(
    page.read_text() for page in PAGES), re.MULTILINE))))  # fmt: skip
def test_make_knows_what_is_to_be_made(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES[1:], ids=name_of)
def test_every_page_is_listed(page: Path) -> None:
    if page.stem == "index":
        return
    listed = (ROOT / "docs" / "index.md").read_text().splitlines()
    assert listed.count(page.stem) == 1
    shown = page.read_text().startswith("```{include}")  # CONTRIBUTING and CHANGELOG
    assert shown or f"](docs/{page.name})" in README.read_text()


def test_the_readme_is_read_to_its_end() -> None:
    assert len(README.read_text().splitlines()) <= 200


def test_promises_have_their_tests() -> None:
    """Each row of the page names modules, and tests in them."""
    page = (ROOT / "docs" / "faults.md").read_text()
    rows = re.findall(r"^\|.*\| (`test_\w+\.py::.*) \|$", page, re.MULTILINE)
    assert len(rows) == page.count("\n|") - 2 * page.count("\n|---")
    for row in rows:
        text = ""
        for name in re.findall(r"test_\w+(?:\.py)?", row):
            if name.endswith(".py"):
                text = (ROOT / "tests" / name).read_text()
            else:
                assert f"def {name}(" in text, row
