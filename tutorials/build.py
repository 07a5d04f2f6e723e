"""Make the notebooks from their sources: run each ``NN_name.py``, write ``NN_name.ipynb``.

    python tutorials/build.py [NAME ...]

The sources are what is edited.  A notebook holds what running its source showed, and nothing of
when or where that was.
"""

import sys
from pathlib import Path
from time import perf_counter

import jupytext
import nbclient
import nbformat

HERE = Path(__file__).parent
SECONDS = 300  # that a cell may take
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def main() -> None:
    """Make the notebooks that are named, or all."""
    names = sys.argv[1:] or [path.stem for path in sources()]
    for name in names:
        start = perf_counter()
        notebook = run(read(HERE / f"{name}.py"))
        nbformat.write(notebook, HERE / f"{name}.ipynb")
        size = (HERE / f"{name}.ipynb").stat().st_size
        print(f"{name}  {perf_counter() - start:.0f} s, {size / 1e6:.2f} MB", flush=True)


def sources() -> list[Path]:
    """Return the sources, in their order."""
    return sorted(HERE.glob("[0-9][0-9]_*.py"))


def read(path: Path) -> nbformat.NotebookNode:
    """Return a source as a notebook that has not been run."""
    notebook = jupytext.read(path)
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # jupytext draws them by lot
    return notebook


def run(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Run a notebook in the folder of the tutorials, from top to bottom.

    Raises
    ------
    nbclient.exceptions.CellExecutionError
        A cell without the tag ``raises-exception`` has raised.
    """
    where = {"metadata": {"path": str(HERE)}}
    nbclient.NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name="python3",
        resources=where,
        record_timing=False,
        coalesce_streams=True,  # what is printed comes in as many pieces as the kernel likes
    ).execute()
    return notebook


if __name__ == "__main__":
    main()
