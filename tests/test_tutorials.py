"""The tutorials: notebooks are their sources executed, and have the parts that readers rely on.

`test_exercises` runs them.
"""

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.launch import ROOT
from tests.test_exercises import printed
from tutorials.build import keep, read, run, sources, tagged
from tutorials.slides import SLIDES, picture

SOURCES = sources()
BOX = re.compile(r'<div class="alert alert-info">\n\n\*\*Takeaways?\.\*\* .+?\n\n</div>', re.DOTALL)
VISIBLE = 12  # lines of a cell that is not what the notebook is about


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
class TestTutorial:
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

    def test_cells_that_assert_print_what_they_prove(self, source: Path) -> None:
        for cell in nbformat.read(source.with_suffix(".ipynb"), as_version=4).cells:
            if cell.cell_type == "code" and "assert " in cell.source:
                assert printed(cell), cell.source

    def test_begins_with_why_what_and_how_long(self, source: Path) -> None:
        first = read(source).cells[0].source
        title, why, *_ = first.split("\n\n")
        assert title.startswith("# ")
        assert re.search(r"[.?]$", why)
        assert "**You will be able to**" in first
        assert re.search(r"\*\*Time\.\*\* About \d+ minutes", first)

    def test_takeaways_are_boxed(self, source: Path) -> None:
        cells = [cell.source for cell in read(source).cells]
        boxes = [n for n, cell in enumerate(cells) if BOX.search(cell)]
        assert len(boxes) >= 2
        assert min(boxes) < len(cells) * 2 // 3
        assert max(boxes) >= len(cells) - 4

    def test_cells_are_short(self, source: Path) -> None:
        for cell in read(source).cells:
            if cell.cell_type == "code" and not {"hide-input", "subject"} & set(
                cell.metadata.get("tags", [])
            ):
                lines = [line for line in cell.source.splitlines() if line.strip()]
                assert len(lines) <= VISIBLE, cell.source

    def test_checks_are_folded(self, source: Path) -> None:
        for cell in read(source).cells:
            assert tagged(cell, "hide-input") or not tagged(cell, "check"), cell.source

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


def test_ten_paired_notebooks() -> None:
    assert [path.stem[:2] for path in SOURCES] == [f"{n:02}" for n in range(10)]
    assert sorted(path.stem for path in SOURCES) == sorted(
        path.stem for path in SOURCES[0].parent.glob("*.ipynb")
    )


def test_slides_are_pictures_of_the_notebooks() -> None:
    assert len(SLIDES) == 20
    assert [slide.notebook for slide in SLIDES] == sorted(slide.notebook for slide in SLIDES)
    for slide in SLIDES:
        with picture(slide) as image:
            assert min(image.size) > 100
    with pytest.raises(LookupError, match=r"01_merging_softmax\.ipynb has no picture of a cell"):
        picture(SLIDES[1]._replace(cell="no such cell"))


def test_printed_text_is_one_output() -> None:
    code = "import time\nfor n in range(3):\n    print(n, flush=True)\n    time.sleep(0.3)"
    cell = nbformat.v4.new_code_cell(code, id="prints")
    (found,) = run(nbformat.v4.new_notebook(cells=[cell])).cells
    assert [out.text for out in found.outputs] == ["0\n1\n2\n"]


def test_cleared_display_is_not_stored() -> None:
    code = """from IPython.display import display
handle = display({"text/plain": "half done"}, raw=True, display_id=True)
handle.update({"text/plain": ""}, raw=True)
print("done")"""
    cell = nbformat.v4.new_code_cell(code, id="clears")
    (found,) = run(nbformat.v4.new_notebook(cells=[cell])).cells
    assert [out.output_type for out in found.outputs] == ["stream"]


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
