"""Links to files of the repository lead to pages of the site that show them.

README, notebooks and the pages in docs/ name files as they lie in the repository, so that links
work where it is hosted.  On the site such a link leads to the page that is made of the file, if
there is one, or else to a page that shows its text.

Where a page has the comment ``<!-- buttons -->``, the site has the buttons that open the notebooks
in a browser, if the repository has an address.
"""

from collections.abc import Iterator
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from pygments.lexers import get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx import addnodes
from sphinx.application import Sphinx

from tutorials.course import buttons, repository

ROOT = Path(__file__).resolve().parent.parent

# Files elsewhere that pages are made of, beside notebooks, and folders that have a page.
PAGES = {
    "README.md": "readme",
    "CONTRIBUTING.md": "contributing",
    "CHANGELOG.md": "changelog",
    "reference": "api/reference",
    "src/lvxattn/check": "api/check",
    "src/lvxattn/check/README.md": "api/check",
    "src/lvxattn/plan": "api/plan",
    "mpi_impl": "api/mpi_impl",
    "torch_impl": "api/torch_impl",
}
# Folders that the links of a page start from. Otherwise it is docs/ or, where the page is made of a
# file elsewhere, the repository's own.
FOLDERS = {"tutorials/": "tutorials", "api/check": "src/lvxattn/check"}


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension; Sphinx calls this."""
    app.connect("source-read", _put_buttons)
    app.connect("doctree-read", _point_to_pages)
    app.connect("html-collect-pages", _pages)
    app.connect("env-purge-doc", _forget)
    return {"parallel_read_safe": False, "parallel_write_safe": True}


def _put_buttons(_: Sphinx, __: str, source: list[str]) -> None:
    """Put the buttons where the page has their comment."""
    source[0] = source[0].replace("<!-- buttons -->", buttons(repository()))


def _point_to_pages(app: Sphinx, doctree: nodes.document) -> None:
    """Let what names a file or a folder of the repository lead to its page."""
    docname = app.env.current_document.docname
    usual = "" if docname in PAGES.values() else "docs"
    folder = next((to for page, to in FOLDERS.items() if docname.startswith(page)), usual)
    for kind in (addnodes.download_reference, addnodes.pending_xref):
        for node in list(doctree.findall(kind)):
            if node.get("refdomain") not in (None, "", "doc"):
                continue
            target, _, fragment = node["reftarget"].partition("#")
            name = _in_repository(ROOT / folder / target)
            if name is None:
                continue
            fragment = node.get("reftargetid") or fragment
            link = nodes.reference("", "", internal=True)
            link["refuri"] = app.builder.get_relative_uri(docname, _page(app, docname, name))
            link["refuri"] += f"#{fragment}" if fragment else ""
            link += [child.deepcopy() for child in node.children]
            node.replace_self(link)


def _in_repository(path: Path) -> str | None:
    """Return the name of a file or a folder in the repository, if it can be shown.

    MyST has taken the ending away from what it takes for a page.
    """
    for ending in ("", ".md", ".ipynb"):
        found = path.with_name(path.name + ending).resolve()
        if found.exists() and found != ROOT and found.is_relative_to(ROOT):
            binary = found.is_file() and b"\0" in found.read_bytes()
            return None if binary else found.relative_to(ROOT).as_posix()
    return None


def _page(app: Sphinx, docname: str, name: str) -> str:
    """Return the page of a file or a folder; if there is none, see to it that one is made."""
    if name in PAGES:
        return PAGES[name]
    if name.endswith(".ipynb"):
        return name.removesuffix(".ipynb")
    if name.startswith("docs/") and name.endswith(".md"):
        return name.removeprefix("docs/").removesuffix(".md")
    _linked(app).setdefault(docname, set()).add(name)
    return f"files/{name}"


def _pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Make a page for every file and every folder that is linked and has none."""
    for name in sorted(set().union(*_linked(app).values())):
        path, lexer = ROOT / name, "text"
        if path.is_dir():
            text = "\n".join(sorted(inside.name for inside in path.iterdir()))
        else:
            text = path.read_text()
            with suppress(ClassNotFound):
                lexer = get_lexer_for_filename(name).aliases[0]
        shown = app.builder.highlighter.highlight_block(text, lexer)
        body = f"<h1>{escape(name)}</h1>\n{shown}"
        yield f"files/{name}", {"title": escape(name), "body": body}, "page.html"


def _linked(app: Sphinx) -> dict[str, set[str]]:
    """Return what is linked and has no page, by the page that links it.

    Sphinx stores it, so that a build that reads few pages again knows what the others link.
    """
    if not hasattr(app.env, "linked_files"):
        app.env.linked_files = {}
    linked: dict[str, set[str]] = app.env.linked_files
    return linked


def _forget(_: Sphinx, env: Any, docname: str) -> None:
    if hasattr(env, "linked_files"):
        env.linked_files.pop(docname, None)
