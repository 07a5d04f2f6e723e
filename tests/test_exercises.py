"""The notebooks run: each exercise refuses its stub and wrong answers, and takes its answer.

The wrong answers are in ``wrong_answers/NN.md``, each with a phrase of the message that it gets::

    ## 1: subtracts the mean
    > scores near 1000
    (a fenced block of Python: all of the exercise's cell)
"""

import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import pytest

from tutorials import exercise
from tutorials.build import read, run, sources, tagged

SOURCES = sources()
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
WRONG = re.compile(r"^## (\d): (.+)\n+> (.+)\n+```python\n((?s:.*?))```$", re.MULTILINE)


class Answer(NamedTuple):
    """A wrong answer to the exercise of that number, and a phrase of what the check says of it."""

    exercise: int
    what: str
    phrase: str
    code: str


def wrong_answers(source: Path) -> list[Answer]:
    """Return the wrong answers to a notebook's exercises."""
    text = (Path(__file__).parent / "wrong_answers" / f"{source.stem[:2]}.md").read_text()
    found = [Answer(int(number), *rest) for number, *rest in WRONG.findall(text)]
    assert len(found) == f"\n{text}".count("\n## "), "a wrong answer is not of this form"
    return found


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


def with_answers(notebook: Any, wrong: list[Answer]) -> Any:
    """Return a notebook in which each check comes again after each wrong answer, then the answer.

    The cells' names say what the check follows.
    """
    cells = notebook.cells
    follows: dict[int, list[Any]] = {}
    for number, (_, check, answer) in enumerate(exercises(cells), 1):
        (code,) = CODE.findall(cells[answer].source)
        tried = [(f"wrong-{n}", given.code) for n, given in enumerate(wrong)
                 if given.exercise == number]  # fmt: skip
        follows[check] = [
            cell
            for name, text in (*tried, (f"answer-{number}", code))
            for cell in (
                nbformat.v4.new_code_cell(text, id=f"{name}-code"),
                nbformat.v4.new_code_cell(cells[check].source, id=name),
            )
        ]
    notebook.cells = [x for n, cell in enumerate(cells) for x in (cell, *follows.get(n, []))]
    return notebook


def printed(cell: Any) -> str:
    """Return what a cell has printed and, if it has raised, the error."""
    return "".join(out.get("text", "") + out.get("evalue", "") for out in cell.outputs)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
class TestNotebook:
    @pytest.mark.timeout(900)
    def test_checks_cannot_be_fooled(self, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # Figures are made and not rendered, which nobody looks at and takes half of the time.
        monkeypatch.setenv("MPLBACKEND", "template")
        # Two threads on a busy machine wait for one another.
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        # Nor do ranks of MPI that wait take their neighbours' core, or compile the package anew.
        monkeypatch.setenv("MPIR_CVAR_ENABLE_HEAVY_YIELD", "1")
        monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        wrong = wrong_answers(source)
        notebook = run(with_answers(read(source), wrong))
        found = {cell.id: cell for cell in notebook.cells}
        for cell in notebook.cells:
            if tagged(cell, "check"):
                assert printed(cell).startswith("not yet: "), cell.source
            if re.fullmatch(r"answer-\d", cell.id):
                assert printed(cell).startswith("right: "), cell.source + printed(cell)
        fooled = [
            f"{given.exercise}: {given.what}: {printed(found[f'wrong-{n}'])}"
            for n, given in enumerate(wrong)
            if not printed(found[f"wrong-{n}"]).startswith("not yet: ")
            or given.phrase not in printed(found[f"wrong-{n}"])
        ]
        assert not fooled, "\n".join(fooled)
        for stored in nbformat.read(source.with_suffix(".ipynb"), as_version=4).cells:
            cell = found[stored.id]
            if cell.cell_type == "code" and not tagged(cell, "varies"):
                assert printed(cell) == printed(stored), cell.source

    def test_each_exercise_has_four_wrong_answers(self, source: Path) -> None:
        numbers = [given.exercise for given in wrong_answers(source)]
        for number, _ in enumerate(exercises(read(source).cells), 1):
            assert numbers.count(number) >= 4, number
        assert sorted(numbers) == numbers
        assert len(set(wrong_answers(source))) == len(numbers)


def test_skipped_cells_are_named_and_nothing_is_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "defined", 1, raising=False)
    with exercise.check("no matter", hide="defined skipped"):
        raise AssertionError
    assert capsys.readouterr().out == "not yet: run the cells above first; there is no skipped\n"
    assert vars(main)["defined"] == 1


def test_hidden_packages_come_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = sys.modules["__main__"]
    for name, value in (("module", nbformat.v4), ("function", nbformat.read), ("other", 1)):
        monkeypatch.setattr(main, name, value, raising=False)
    before = dict(sys.modules), dict(vars(main))
    with exercise.check("no matter", hide_packages="nbformat"):
        assert not {"module", "function"} & set(vars(main))
        assert vars(main)["other"] == 1
        from nbformat import v4  # noqa: F401
    assert capsys.readouterr().out.endswith("The check hides nbformat: use the arguments alone.\n")
    assert (dict(sys.modules), dict(vars(main))) == before
