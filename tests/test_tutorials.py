"""The tutorials: cells run and show what is stored, stubs fail their checks, answers pass them."""

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.launch import ROOT
from tutorials.build import keep, read, run, sources, tagged

SOURCES = sources()
ANSWER = re.compile(r"```python\n(.*?)```", re.DOTALL)


def exercises(cells: list[Any]) -> list[tuple[int, int, int]]:
    """Return where each exercise's stub, check and answer are."""
    places = [
        (n, tag)
        for n, cell in enumerate(cells)
        for tag in ("exercise", "check", "answer")
        if tagged(cell, tag)
    ]
    assert [tag for _, tag in places] == ["exercise", "check", "answer"] * (len(places) // 3)
    numbers = [n for n, _ in places]
    return list(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))


def answered(notebook: Any) -> Any:
    """Return a notebook in which every check comes twice: after the stub, and after the answer."""
    cells = notebook.cells
    follows: dict[int, list[Any]] = {}
    for stub, check, answer in exercises(cells):
        (code,) = ANSWER.findall(cells[answer].source)
        again = nbformat.from_dict(cells[check])
        again.id, again.metadata = f"again-{check}", {"tags": ["again"]}
        solved = nbformat.v4.new_code_cell(code, id=f"answer-{stub}")
        follows[check] = [solved, again]
    notebook.cells = [x for n, cell in enumerate(cells) for x in (cell, *follows.get(n, []))]
    return notebook


def printed(cell: Any) -> str:
    """Return what a cell has printed and, if it has raised, the error."""
    return "".join(out.get("text", "") + out.get("evalue", "") for out in cell.outputs)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
class TestTutorial:
    @pytest.mark.timeout(900)
    def test_cells_and_exercises_run(self, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # Figures are made and not rendered, which nobody looks at and takes half of the time.
        monkeypatch.setenv("MPLBACKEND", "template")
        # Two threads on a busy machine wait for one another.
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        # Nor do ranks of MPI that wait take their neighbours' core, or compile the package anew.
        monkeypatch.setenv("MPIR_CVAR_ENABLE_HEAVY_YIELD", "1")
        monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        notebook = run(answered(read(source)))
        checks = [cell for cell in notebook.cells if tagged(cell, "check")]
        again = [cell for cell in notebook.cells if tagged(cell, "again")]
        assert 2 <= len(checks) == len(again) <= 4
        for cell in checks:
            assert printed(cell).startswith("not yet: "), cell.source
        for cell in again:
            assert printed(cell).startswith("right: "), cell.source + printed(cell)
        found = {cell.id: cell for cell in notebook.cells}
        for stored in nbformat.read(source.with_suffix(".ipynb"), as_version=4).cells:
            cell = found[stored.id]
            if cell.cell_type == "code" and not tagged(cell, "varies"):
                assert printed(cell) == printed(stored), cell.source

    def test_notebook_is_its_source_executed(self, source: Path) -> None:
        notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
        nbformat.validate(notebook)
        cells = read(source).cells
        assert [cell.source for cell in notebook.cells] == [cell.source for cell in cells]
        assert [cell.metadata for cell in notebook.cells] == [cell.metadata for cell in cells]
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
        for cell in code:
            failed = any(out.output_type == "error" for out in cell.outputs)
            assert failed == tagged(cell, "raises-exception"), cell.source
        assert any("image/png" in out.get("data", {}) for cell in code for out in cell.outputs)

    def test_claims_are_asserted(self, source: Path) -> None:
        code = [cell.source for cell in read(source).cells if cell.cell_type == "code"]
        assert sum("assert " in cell for cell in code) >= 5

    def test_folds_are_rendered(self, source: Path) -> None:
        cells = read(source).cells
        text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        # Without the empty lines Markdown shows a fold's text as it is written.
        folds = re.findall(r"\n\n<details><summary>\w+</summary>\n\n", f"\n\n{text}")
        assert len(folds) == text.count("<details") == f"{text}\n\n".count("\n\n</details>\n\n")

    def test_links_resolve(self, source: Path) -> None:
        text = "\n".join(c.source for c in read(source).cells if c.cell_type == "markdown")
        targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
        inside = [target for target in targets if "://" not in target]
        assert inside
        for target in inside:
            assert (source.parent / target).exists(), target

    def test_no_machine_paths(self, source: Path) -> None:
        text = source.with_suffix(".ipynb").read_text()
        for word in (str(ROOT), str(Path.home()), "/tmp/"):
            assert word not in text, word


def test_eight_paired_notebooks() -> None:
    assert [path.stem[:2] for path in SOURCES] == [f"{n:02}" for n in range(1, 9)]
    assert sorted(path.stem for path in SOURCES) == sorted(
        path.stem for path in SOURCES[0].parent.glob("*.ipynb")
    )


def test_printed_text_is_one_output() -> None:
    code = "import time\nfor n in range(3):\n    print(n, flush=True)\n    time.sleep(0.3)"
    cell = nbformat.v4.new_code_cell(code, id="prints")
    (found,) = run(nbformat.v4.new_notebook(cells=[cell])).cells
    assert [out.text for out in found.outputs] == ["0\n1\n2\n"]


def test_varying_output_is_kept_for_unchanged_code() -> None:
    def notebook(code: str, shown: str) -> Any:
        cells = [
            nbformat.v4.new_code_cell(code, metadata={"tags": tags}) for tags in ([], ["varies"])
        ]
        for cell in cells:
            cell.outputs = [nbformat.v4.new_output("stream", text=shown)]
        return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(shown), *cells])

    for code, kept, shown in (("x", 1, ["new", "stored"]), ("y", 0, ["new", "new"])):
        found = notebook(code, "new")
        assert keep(found, notebook("x", "stored")) == kept
        assert [printed(cell) for cell in found.cells[1:]] == shown
