"""The course: the notebooks in order, their reading times, paths through them, ways to open them.

    python tutorials/course.py      write the tables into docs/learn.md

Titles and times are those of the notebooks' first cells.  `build.py` fills in the first notebook.
The address of the repository is `Repository` of [project.urls] in pyproject.toml, and nowhere else;
without one there are no buttons.
"""

import re
import tomllib
from os.path import relpath
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PAGE = ROOT / "docs" / "learn.md"
START = "tutorials/00_in_ten_minutes.ipynb"
BRANCH = "main"

CONTENTS = (
    "the problem, the whole algorithm in forty lines of NumPy, a glossary",
    "attention computed in pieces, and the operator that merges them",
    "what each schedule sends, and when Ring Attention is faster",
    "which rank holds which block at every hop",
    "`%%mpi 4` in a notebook: messages, overlap, a deadlock, a video search",
    "the gradients, and how they return to their owners",
    "activation checkpointing: what layers store, and how many more frames fit with recomputation",
    "four processes train as one does, and how to detect a wrong shard",
    "how to find a kernel's bug, choose a schedule and read a trace",
    "a whole vision-language model on two ranks: logits, gradients, generation, and the traps",
)

# What a reader wants, the notebooks for it, and the pages to go on with.
PATHS = (
    ("just use it", (0, 2), ("README.md", "docs/arguments.md", "docs/training.md")),
    ("learn MPI", (0, 1, 2, 3, 4), ("docs/clusters.md", "mpi_impl/lv_xattn.py")),
    ("train a model", (0, 1, 5, 6, 7, 9), ("docs/training.md",)),
    ("check a kernel", (0, 1, 8), ("docs/check.md",)),
)


class Notebook(NamedTuple):
    """A notebook's number, file, title and reading time in minutes."""

    number: int
    path: Path
    title: str
    minutes: int


def notebooks() -> dict[int, Notebook]:
    """Return the notebooks by number, in order."""
    found = {}
    for source in sorted(HERE.glob("[0-9][0-9]_*.py")):
        text = source.read_text()
        title = re.search(r"^# # \d+\. (.+)$", text, re.MULTILINE)
        minutes = re.search(r"\bTime\W+about\W+(\d+)\W+minutes", text, re.IGNORECASE)
        assert title, f"{source.name} has no title"
        assert minutes, f"{source.name} has no reading time"
        number = int(source.name[:2])
        path = source.with_suffix(".ipynb")
        found[number] = Notebook(number, path, title[1], int(minutes[1]))
    return found


def course(folder: Path) -> str:
    """Return the table of all notebooks in Markdown, with links from a folder."""
    rows = ["| notebook | minutes | contents |", "|---|---|---|"]
    for book in notebooks().values():
        link = f"[{book.number}. {book.title}]({relpath(book.path, folder)})"
        rows.append(f"| {link} | {book.minutes} | {CONTENTS[book.number]} |")
    return "\n".join(rows)


def paths(folder: Path) -> str:
    """Return the table of the paths in Markdown, with links from a folder."""
    rows, books = ["| you want to | notebooks | minutes | then |", "|---|---|---|---|"], notebooks()
    for want, numbers, pages in PATHS:
        on_it = [books[n] for n in numbers if n in books]
        links = ", ".join(f"[{book.number}]({relpath(book.path, folder)})" for book in on_it)
        then = ", ".join(f"[{_name(page)}]({relpath(ROOT / page, folder)})" for page in pages)
        rows.append(f"| {want} | {links} | {sum(book.minutes for book in on_it)} | {then} |")
    everything = sum(book.minutes for book in books.values())
    code = f"[the code]({relpath(PAGE, folder)}#the-code-in-reading-order)"
    rows.append(f"| understand all of it | all, in order | {everything} | {code} |")
    return "\n".join(rows)


def _name(page: str) -> str:
    return page if page.endswith(".py") else Path(page).stem


def repository() -> str:
    """Return the address of the repository, or an empty string while it has none."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return str(project.get("urls", {}).get("Repository", "")).removesuffix(".git").rstrip("/")


def buttons(address: str, notebook: str = START) -> str:
    """Return the buttons, in Markdown, that open a notebook in a browser."""
    if not address:
        return ""
    _, _, on_github = address.partition("https://github.com/")
    where = f"gh/{on_github}" if on_github else f"git/{quote(address, safe='')}"
    binder = f"https://mybinder.org/v2/{where}/{BRANCH}?labpath={quote(notebook, safe='')}"
    found = [f"[![Open in Binder](https://mybinder.org/badge_logo.svg)]({binder})"]
    if on_github:
        colab = f"https://colab.research.google.com/github/{on_github}/blob/{BRANCH}/{notebook}"
        badge = "https://colab.research.google.com/assets/colab-badge.svg"
        found.append(f"[![Open in Colab]({badge})]({colab})")
    return " ".join(found)


def filled(text: str) -> str:
    """Return a cell's text with the paths, the buttons and the repository's address filled in."""
    address = repository()
    text = text.replace("{{ repository }}", address)
    text = text.replace("{{ paths }}", paths(HERE))
    return text.replace("{{ buttons }}\n\n", f"{buttons(address)}\n\n".lstrip())


def page() -> str:
    """Return docs/learn.md with its tables written anew."""
    text = PAGE.read_text()
    for name, table in (("course", course(PAGE.parent)), ("paths", paths(PAGE.parent))):
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = f"{before}{begin}\n{table}\n\n{end}{after}"
    return text


if __name__ == "__main__":
    PAGE.write_text(page())
