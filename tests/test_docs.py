"""The site: it is built without a warning, and whatever its pages show and link is there."""

import importlib.util
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from lvxattn import mpi_impl, reference, torch_impl
from tests.launch import ROOT

pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("furo", "myst_nb", "sphinx")),
    reason="needs what make docs installs",
)

NOTEBOOKS = sorted(path.stem for path in (ROOT / "tutorials").glob("*.ipynb"))


class Page(HTMLParser):
    """What a page shows and links, and where one can link to in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.images: list[str] = []
        self.places: set[str] = set()
        self.formulas = 0
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.places.add(given.get("id") or "")
        if "math" in (given.get("class") or "").split():
            self.formulas += 1
        if tag == "img":
            self.images.append(given["src"])
        self.targets += [given[name] for name in ("href", "src") if given.get(name)]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Path, Page]]:
    """Every page of the site, by its file."""
    folder = (tmp_path_factory.mktemp("site") / "html").resolve()
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "--quiet"]
    built = subprocess.run(
        [*command, ROOT / "docs", folder], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    return folder, {path: Page(path) for path in folder.rglob("*.html")}


@pytest.fixture(scope="module")
def site(built: tuple[Path, dict[Path, Page]]) -> dict[str, Page]:
    """Every page of the site, by its name."""
    folder, pages = built
    return {path.relative_to(folder).as_posix(): page for path, page in pages.items()}


def test_all_pages_exist(site):
    wanted = ["index", "contributing", "changelog", *(f"tutorials/{name}" for name in NOTEBOOKS)]
    wanted += [path.stem for path in (ROOT / "docs").glob("*.md")]
    wanted += [f"api/{name}" for name in ("reference", "mpi_impl", "torch_impl", "plan", "check")]
    assert {f"{name}.html" for name in wanted} <= set(site)


def test_notebooks_show_pictures_and_formulas(site):
    for name in NOTEBOOKS:
        page = site[f"tutorials/{name}.html"]
        assert any(image.startswith("../_images") for image in page.images), name
        assert page.formulas, name
        assert any("mathjax" in target for target in page.targets), name


@pytest.mark.parametrize("package", [reference, mpi_impl, torch_impl], ids=lambda p: p.__name__)
def test_all_public_names_are_in_the_api(site, package):
    name = package.__name__
    borrowed = {x for x in package.__all__ if x in reference.__all__ and package is not reference
                and getattr(package, x) is getattr(reference, x)}  # fmt: skip
    page = site[f"api/{name.removeprefix('lvxattn.')}.html"]
    assert {f"{name}.{public}" for public in set(package.__all__) - borrowed} <= page.places


def test_magic_is_in_the_api(site):
    names = {f"lvxattn.mpi_impl.jupyter.{name}" for name in ("magic.mpi", "run_cell", "CellError")}
    assert names <= site["api/mpi_impl.html"].places


def test_defaults_are_shown_as_written(built):
    folder, _ = built
    for path in (folder / "api").glob("*.html"):
        assert "&lt;function" not in path.read_text(), path


def test_links_resolve(built):
    _, pages = built
    for path, page in pages.items():
        for target in page.targets:
            url = urlsplit(target)
            if url.scheme or url.netloc:
                continue
            there = (path.parent / unquote(url.path)).resolve() if url.path else path
            assert there.is_file(), f"{path}: {target}"
            if url.fragment and there in pages:
                assert unquote(url.fragment) in pages[there].places, f"{path}: {target}"
