"""Make the notebooks from their sources: run each ``NN_name.py``, write ``NN_name.ipynb``.

    python tutorials/build.py [--fresh] [NAME ...]

Edit the sources.  A notebook holds its source's outputs, without times and places of the run.

Outputs of some cells differ between runs or machines: times, rounding errors, the MPI.  Such cells
are tagged ``varies``, and keep the stored output while the code of their notebook stays the same,
so that running this again changes no file; ``--fresh`` stores the new output.
"""

import argparse
from pathlib import Path
from time import perf_counter

import jupytext
import nbclient
import nbformat

HERE = Path(__file__).parent
SECONDS = 300  # time limit of a cell
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def main() -> None:
    """Make the named notebooks, or all."""
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
        told = f", {kept} outputs that vary are the stored ones (--fresh: new ones)" if kept else ""
        size = path.stat().st_size / 1e6
        print(f"{name}  {perf_counter() - start:.0f} s, {size:.2f} MB{told}", flush=True)


def sources() -> list[Path]:
    """Return the sources in order."""
    return sorted(HERE.glob("[0-9][0-9]_*.py"))


def read(path: Path) -> nbformat.NotebookNode:
    """Return a source as a notebook without outputs."""
    notebook = jupytext.read(path)
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # jupytext's are random
        if tagged(cell, "hide-input"):  # the site's tag; this is JupyterLab's
            cell.metadata["jupyter"] = {"source_hidden": True}
    return notebook


def tagged(cell: nbformat.NotebookNode, tag: str) -> bool:
    """Return whether a cell has a tag."""
    return tag in cell.metadata.get("tags", [])


def run(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Run a notebook in the tutorials' folder.

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
        coalesce_streams=True,  # the kernel may split output anywhere
    ).execute()
    return notebook


def keep(notebook: nbformat.NotebookNode, stored: nbformat.NotebookNode) -> int:
    """Replace outputs that vary by a stored notebook's, in place, if its code is the same.

    Returns
    -------
    int
        Number of cells that keep a stored output.
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
