"""The ways into the course: its page, its first notebook, and the machines of others.

The environments of Binder and Colab are built here, as those do it, in folders of their own.
"""

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import nbformat
import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.launch import ROOT
from tutorials.build import read, tagged
from tutorials.course import PAGE, PATHS, START, buttons, notebooks, page, repository

FIRST = (ROOT / START).with_suffix(".py")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BINDER = ROOT / ".binder"
ADDRESS = "https://github.com/someone/something"
OPENS = re.compile(r"https://(?:mybinder\.org/v2|colab\.research\.google\.com/github)/[^)\s\"\\]+")
WORDS = ("rank", "hop", "lse", "online softmax", "GQA", "sequence parallelism",
         "context parallelism", "checkpointing", "all-to-all")  # fmt: skip


def code_cells() -> list[nbformat.NotebookNode]:
    """Return the code cells of the first notebook."""
    return [cell for cell in read(FIRST).cells if cell.cell_type == "code"]


def algorithm() -> str:
    """Return the cell of the first notebook that is the algorithm."""
    (found,) = [cell.source for cell in code_cells() if tagged(cell, "subject")]
    return found


def installer() -> str:
    """Return the cell of the first notebook that installs what is missing."""
    return code_cells()[0].source


def test_page_has_the_titles_and_times_of_the_notebooks() -> None:
    assert page() == PAGE.read_text(), "run python tutorials/course.py"


def test_paths_begin_with_the_first_notebook_and_go_in_order() -> None:
    assert [want for want, *_ in PATHS] == [
        "just use it", "learn MPI", "train a model", "check a kernel"
    ]  # fmt: skip
    for _, numbers, pages in PATHS:
        assert numbers[0] == 0
        assert list(numbers) == sorted(set(numbers))
        assert all((ROOT / name).exists() for name in pages)


def test_everything_leads_to_the_first_notebook_first() -> None:
    for name in ("README.md", "docs/learn.md", "docs/index.md"):
        found = re.search(r"tutorials/(\d\d_\w+)\.ipynb", (ROOT / name).read_text())
        assert found, name
        assert found[1] == FIRST.stem, name
    assert f"{START} $(ARGS)" in (ROOT / "Makefile").read_text()


def test_glossary_has_the_words() -> None:
    text = FIRST.read_text()
    for word in WORDS:
        assert f"# | {word} | " in text, word


def test_algorithm_is_forty_lines_of_numpy() -> None:
    code = algorithm()
    assert len([line for line in code.splitlines() if line.strip()]) <= 40
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(code))
        for name in (
            [x.name for x in node.names] if isinstance(node, ast.Import)
            else [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        )
    }  # fmt: skip
    assert imported == {"numpy", "queue", "threading"}


@pytest.mark.parametrize("P", [1, 2, 5])
def test_algorithm_is_exact_alone(P: int) -> None:
    names: dict[str, object] = {}
    exec(algorithm(), names)
    rng = np.random.default_rng(P)
    q, k, v = (rng.standard_normal((rows, 6)) for rows in (11, 40, 40))
    cut = [np.array_split(x, P) for x in (q, k, v)]
    results, sent = names["ring"](names["lv_xattn"], *cut)  # type: ignore[operator]
    scores = q @ k.T / 6**0.5
    weights = np.exp(scores - np.log(np.exp(scores).sum(axis=1, keepdims=True)))
    out = np.concatenate([out for out, _ in results])
    assert np.allclose(out, weights @ v, rtol=0, atol=1e-13)
    rows = [len(x) for x in cut[0]]
    for r in range(P):
        with_q = sum(rows[(r - hop) % P] for hop in range(P - 1))
        assert sent[r] == 8 * (with_q * 13 + rows[(r + 1) % P] * 7)


def test_buttons_open_the_first_notebook() -> None:
    assert buttons("") == ""
    assert len(OPENS.findall(buttons(ADDRESS))) == 2
    assert buttons(ADDRESS) == (
        "[![Open in Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/"
        "someone/something/main?labpath=tutorials%2F00_in_ten_minutes.ipynb) "
        "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
        "(https://colab.research.google.com/github/someone/something/blob/main/"
        "tutorials/00_in_ten_minutes.ipynb)"
    )
    elsewhere = buttons("https://git.example.org/something")
    assert "/v2/git/https%3A%2F%2Fgit.example.org%2Fsomething/main?" in elsewhere
    assert "colab" not in elsewhere


def test_readme_has_the_buttons() -> None:
    if not repository():
        pytest.skip("the project has no address")
    assert buttons(repository()) in (ROOT / "README.md").read_text()


def test_buttons_have_the_address_of_the_project_and_no_other() -> None:
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / START):
        for link in OPENS.findall(path.read_text()):
            assert f"({link})" in buttons(repository()), path


def test_first_notebook_has_buttons_once_there_is_an_address() -> None:
    with patch("tutorials.course.repository", lambda: ADDRESS):
        cells = read(FIRST).cells
    assert buttons(ADDRESS) in cells[1].source
    assert f'REPOSITORY = "{ADDRESS}"' in cells[2].source
    assert all("{{ " not in cell.source for cell in [*cells, *read(FIRST).cells])


def test_installing_does_nothing_where_lvxattn_is() -> None:
    with patch("subprocess.run", side_effect=AssertionError("it has installed something")):
        exec(installer(), {})


def test_restarted_runtime_goes_to_the_tutorials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lv-xattn" / "tutorials").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for _ in range(2):
        exec(installer(), {})
        assert Path.cwd() == tmp_path / "lv-xattn" / "tutorials"
    assert sys.path.count(str(Path.cwd())) == 1


def test_installing_says_what_it_lacks() -> None:
    with (
        patch("importlib.util.find_spec", lambda _: None),
        patch("subprocess.run", side_effect=AssertionError),
        pytest.raises(ValueError, match="set REPOSITORY to the address"),
    ):
        exec(installer().replace(repository() or "no address", ""), {})


def test_binder_has_a_python_and_extras_that_exist() -> None:
    version = (BINDER / "runtime.txt").read_text().strip().removeprefix("python-")
    assert SpecifierSet(PROJECT["requires-python"]).contains(version)
    lines = (BINDER / "requirements.txt").read_text().splitlines()
    (constraints,) = [line.split()[1] for line in lines if line.startswith("-c ")]
    assert (BINDER / constraints).resolve() == ROOT / "constraints.txt"
    (ours,) = [line.removeprefix("-e .") for line in lines if line.startswith("-e .")]
    assert Requirement(f"lvxattn{ours}").extras <= set(PROJECT["optional-dependencies"])


def run(*command: object, cwd: Path, limit: int = 900) -> str:
    """Run a command and return what it printed; a failure shows the end of it.

    Nothing of this checkout is on its path.
    """
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=limit,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture
def clone(tmp_path: Path) -> Iterator[Path]:
    """A clone of this repository with the files as they are now.  What is built goes at the end."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("needs git and a checkout")
    asked = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest"]
    reached = subprocess.run([*asked, tmp_path / "reached", "wheel"], check=False, timeout=120)
    if reached.returncode:
        pytest.skip("no package index is reached")
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():
            (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / "clone" / name, follow_symlinks=False)
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@example.org")
    for command in (("init", "-q"), ("add", "-A"), ("commit", "-q", "-m", "a copy")):
        run(*git, *command, cwd=tmp_path / "clone")
    yield tmp_path / "clone"
    shutil.rmtree(tmp_path / "env", ignore_errors=True)  # up to 2 GB


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_binder_builds_and_runs_notebooks(clone: Path, tmp_path: Path) -> None:
    """What repo2docker does with a requirements.txt in .binder/, and then two notebooks."""
    version = (BINDER / "runtime.txt").read_text().strip().removeprefix("python-")
    here = ".".join(map(str, sys.version_info[:2]))
    interpreter = sys.executable if version == here else shutil.which(f"python{version}")
    if interpreter is None:
        pytest.skip(f"needs Python {version}")
    assert {path.name for path in BINDER.iterdir()} == {"requirements.txt", "runtime.txt"}
    run(interpreter, "-m", "venv", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    pip = (python, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "install", "-r", ".binder/requirements.txt", cwd=clone)
    run(*pip, "check", cwd=clone)

    # All packages that the notebooks import are there.
    packages = importlib.metadata.packages_distributions()
    imported = {
        node.module if isinstance(node, ast.ImportFrom) else name.name
        for book in notebooks().values()
        for cell in read(book.path.with_suffix(".py")).cells
        if cell.cell_type == "code"
        for node in ast.walk(ast.parse(re.sub(r"^\s*[%!].*$", "", cell.source, flags=re.MULTILINE)))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
    }
    names = sorted(name for name in imported if name and name.split(".")[0] in packages)
    assert {"lvxattn.plan", "numpy", "torch"} <= set(names)
    run(python, "-c", "".join(f"import {name}\n" for name in names), cwd=clone)

    # One that only needs NumPy, and one that starts ranks of MPI.
    stems = FIRST.stem, "04_real_ranks_with_mpi"
    paths = [clone / "tutorials" / f"{stem}.ipynb" for stem in stems]
    for path in paths:
        path.unlink()
    run(python, "tutorials/build.py", *stems, cwd=clone)
    for path in paths:
        built = json.loads(path.read_text())
        assert any(cell.get("outputs") for cell in built["cells"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_first_notebook_installs_itself_elsewhere(clone: Path, tmp_path: Path) -> None:
    """What happens on Colab: the notebook is alone, and lvxattn is missing."""
    run(sys.executable, "-m", "venv", tmp_path / "env", cwd=tmp_path)
    known = f'REPOSITORY = "{repository()}"'
    code = [cell.source for cell in code_cells()]
    assert known in code[0]
    code[0] = code[0].replace(known, f"REPOSITORY = {str(clone)!r}")
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "notebook.py").write_text("\n\n".join(code))
    printed = run(
        "env", "MPLBACKEND=agg", tmp_path / "env/bin/python", "notebook.py", cwd=tmp_path / "alone"
    )
    assert "234.5 GiB" in printed
    assert "not yet: 3 ranks: rank 0 sent 3 messages, expected 2" in printed
