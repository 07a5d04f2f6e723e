"""Build the notebooks from their sources: run each ``NN_name.py`` and write ``NN_name.ipynb``.

    python tutorials/build.py [--fresh] [NAME ...]

Edit the sources only.  A notebook contains the output of its source, and no times or paths.

The output of some cells differs between runs or machines: times, the size of rounding errors, the
MPI library.  They are tagged ``varies``, and keep their stored output as long as the code of the
notebook is unchanged, so that a second build changes no file; ``--fresh`` takes the new output.
"""

import argparse
from pathlib import Path
from time import perf_counter

import jupytext
import nbclient
import nbformat

try:
    from tutorials.course import filled
except ModuleNotFoundError:  # started as a program, from its own folder
    from course import filled

HERE = Path(__file__).parent
SECONDS = 300  # time limit of a cell
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def main() -> None:
    """Build the notebooks named on the command line, or all."""
    parser = argparse.ArgumentParser(description="Run the tutorials' sources.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="NN_name (default: all)")
    parser.add_argument("--fresh", action="store_true", help="keep no stored output")
    options = parser.parse_args()
    for name in options.names or [path.stem for path in sources()]:
        start, path = perf_counter(), HERE / f"{name}.ipynb"
        notebook, kept = run(read(path.with_suffix(".py"))), 0
        if path.exists() and not options.fresh:
            kept = keep(notebook, nbformat.read(path, as_version=4))
        nbformat.write(notebook, path)
        note = f", {kept} stored outputs kept (--fresh replaces them)" if kept else ""
        size = path.stat().st_size / 1e6
        print(f"{name}  {perf_counter() - start:.0f} s, {size:.2f} MB{note}", flush=True)


def sources() -> list[Path]:
    """Return the sources in order."""
    return sorted(HERE.glob("[0-9][0-9]_*.py"))


def read(path: Path) -> nbformat.NotebookNode:
    """Return a source as a notebook without outputs."""
    notebook = jupytext.read(path)
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # jupytext's ids are random
        if tagged(cell, "filled"):
            cell.source = filled(cell.source)
        if tagged(cell, "hide-input"):  # the tag folds code on the site, the metadata in JupyterLab
            cell.metadata["jupyter"] = {"source_hidden": True}
    return notebook


def tagged(cell: nbformat.NotebookNode, tag: str) -> bool:
    """Return whether a cell has a tag."""
    return tag in cell.metadata.get("tags", [])


def run(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Run a notebook from top to bottom, in the folder of the tutorials.

    Raises
    ------
    nbclient.exceptions.CellExecutionError
        If a cell without the tag ``raises-exception`` raises.
    """
    where = {"metadata": {"path": str(HERE)}}
    nbclient.NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name="python3",
        resources=where,
        record_timing=False,
        coalesce_streams=True,  # the kernel splits printed output arbitrarily
    ).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not cleared(output)]
    return notebook


def cleared(output: nbformat.NotebookNode) -> bool:
    """Return whether an output is a display of empty text, as a line of progress in the end."""
    return output.output_type == "display_data" and dict(output.data) == {"text/plain": ""}


def keep(notebook: nbformat.NotebookNode, stored: nbformat.NotebookNode) -> int:
    """Copy the outputs of ``varies`` cells from a stored notebook with the same code, in place.

    Returns
    -------
    int
        The number of cells that keep their stored output.
    """
    new, old = ([c for c in book.cells if c.cell_type == "code"] for book in (notebook, stored))
    if [cell.source for cell in new] != [cell.source for cell in old]:
        return 0
    kept = 0
    for cell, before in zip(new, old, strict=True):
        if tagged(cell, "varies"):
            cell.outputs = before.outputs
            kept += 1
    return kept


if __name__ == "__main__":
    main()
