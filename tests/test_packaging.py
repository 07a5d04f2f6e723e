"""What gets installed: the wheel, the wheel made from the sdist, and the editable install.

The wheels are built from a copy, because setuptools leaves build products beside what it builds,
and installed into an environment that sees the NumPy of this one and nothing of the checkout.
No network is used.
"""

import importlib.metadata
import importlib.util
import json
import math
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lvxattn
from lvxattn.mpi_impl.kernels.build import SOURCES

ROOT = Path(__file__).resolve().parents[1]
# The folders that are to install as subpackages of lvxattn.
FOLDERS = sorted({init.parent.name for init in ROOT.glob("*/__init__.py")} - {"tests"})

# Run in the fresh environment, in an empty folder; what it prints is JSON.
PROBE = """
import importlib.metadata, importlib.util, json
import numpy as np
import lvxattn
from lvxattn.reference import full_attention

q, k = np.zeros((1, 1, 2, 4)), np.zeros((1, 1, 3, 4))
v = np.arange(15.0).reshape(1, 1, 3, 5)
out, lse = full_attention(q, k, v)
print(json.dumps({
    "file": full_attention.__code__.co_filename,
    "version": lvxattn.__version__,
    "metadata": importlib.metadata.version("lvxattn"),
    "top_level": [name for name in %r if importlib.util.find_spec(name)],
    "out": out.ravel().tolist(),
    "lse": lse.ravel().tolist(),
}))
"""


def run(*command: object, cwd: Path) -> str:
    """Run a command and return what it printed; a failure shows all of it."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def module_paths(tree: Path) -> set[str]:
    """Every module of the package under tree, as a wheel would name it."""
    package = tree / "src" / "lvxattn"
    paths = {f"lvxattn/{path.relative_to(package)}" for path in package.rglob("*.py")}
    for folder in FOLDERS:
        found = (path.relative_to(tree) for path in (tree / folder).rglob("*.py"))
        paths |= {f"lvxattn/{path.as_posix()}" for path in found}
    return paths


def members(wheel: Path) -> set[str]:
    """The names of the files in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


# What is missing from the sdist is missing from its wheel: that one finds more.
@pytest.fixture(
    scope="module", params=[pytest.param("wheel", marks=pytest.mark.slow), "wheel-from-sdist"]
)
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of this checkout, built as `request.param` says."""
    tree = tmp_path_factory.mktemp("tree")
    for file in [ROOT / "pyproject.toml", ROOT / "LICENSE", *ROOT.glob("*.md")]:
        shutil.copy(file, tree)
    for folder in ["src", *FOLDERS]:
        products = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=products)
    what = ["--wheel"] if request.param == "wheel" else []
    run(sys.executable, "-m", "build", "--no-isolation", *what, cwd=tree)
    (built,) = (tree / "dist").glob("*.whl")
    return built


def test_wheel_holds_the_sources_of_the_cuda_kernels(wheel: Path) -> None:
    sources = {f"lvxattn/mpi_impl/kernels/{name}" for name in SOURCES}
    assert sources == {name for name in members(wheel) if name.endswith((".cu", ".cuh"))}


def test_wheel_holds_every_module_and_the_typing_marker(wheel: Path) -> None:
    names = members(wheel)
    assert {name for name in names if name.endswith(".py")} == module_paths(ROOT)
    assert "lvxattn/py.typed" in names


def test_wheel_holds_the_golden_files_and_pytest_finds_the_plugin(wheel: Path) -> None:
    folder = Path("src/lvxattn/check/golden_files")
    shipped = {f"lvxattn/check/golden_files/{file.name}" for file in (ROOT / folder).iterdir()}
    assert "lvxattn/check/golden_files/manifest.json" in shipped
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        for name in shipped | {"lvxattn/check/README.md"}:
            assert archive.read(name) == (ROOT / "src" / name).read_bytes()
        (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
        assert b"[pytest11]" in archive.read(entry_points)
    assert {name for name in names if "golden_files" in name} == shipped


def test_wheel_installs_nothing_but_lvxattn(wheel: Path) -> None:
    top_level = {name.split("/")[0] for name in members(wheel)}
    assert top_level == {"lvxattn", f"lvxattn-{lvxattn.__version__}.dist-info"}


def test_installed_wheel_computes(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", "--without-pip", "fresh", cwd=tmp_path)
    paths = {"base": str(tmp_path / "fresh"), "platbase": str(tmp_path / "fresh")}
    packages = Path(sysconfig.get_path("purelib", scheme="venv", vars=paths))
    python = Path(sysconfig.get_path("scripts", scheme="venv", vars=paths)) / "python"
    # A path in a .pth file is searched, the .pth files in it are not: NumPy is found, the
    # editable install of this checkout is not.
    (packages / "numpy.pth").write_text(sysconfig.get_path("platlib") + "\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    run(*pip, "install", "--no-deps", "--no-index", "--no-compile", wheel, cwd=tmp_path)

    probe = json.loads(run(python, "-I", "-c", PROBE % (FOLDERS,), cwd=tmp_path))

    assert Path(probe["file"]).is_relative_to(packages)
    assert probe["version"] == probe["metadata"] == lvxattn.__version__
    assert probe["top_level"] == []
    # Equal scores: the mean of the values, and the log of three keys.
    assert probe["out"] == pytest.approx([5.0, 6.0, 7.0, 8.0, 9.0] * 2)
    assert probe["lse"] == pytest.approx([math.log(3.0)] * 2)


@pytest.mark.parametrize("folder", FOLDERS)
def test_editable_install_imports_this_checkout(folder: str) -> None:
    # Found, not imported: mpi4py would start MPI in the process that runs the tests.
    spec = importlib.util.find_spec(f"lvxattn.{folder}")
    assert spec is not None
    assert Path(str(spec.origin)).resolve() == ROOT / folder / "__init__.py"


def test_editable_install_has_the_version_of_the_source() -> None:
    assert importlib.metadata.version("lvxattn") == lvxattn.__version__


@pytest.mark.parametrize("extra", ["tutorials", "lab", "docs"])
def test_extras_are_pinned(extra: str) -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()[1:]
    pinned = {canonicalize_name(line.partition("==")[0]) for line in lines}
    waiting, brought = [Requirement(x) for x in listed["optional-dependencies"][extra]], set()
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        if (name, *wanted.extras) in brought:
            continue
        brought.add((name, *wanted.extras))
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{name} is not installed")
        for further in map(Requirement, requires):
            extras = wanted.extras or {""}
            if not further.marker or any(further.marker.evaluate({"extra": e}) for e in extras):
                waiting.append(further)
    assert {name for name, *_ in brought} <= pinned
