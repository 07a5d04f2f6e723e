"""The mirrored files can be laid side by side: names, signatures, steps and schedules agree."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MIRRORED = [
    "merge",
    "block_attention",
    "exchange",
    "lv_xattn",
    "ring_attention",
    "cross_attention",
    "recompute",
]

# What mpi_impl has and the reference has not, and why.
ONLY_IN_MPI = {
    "exchange": {
        "Exchange.progress": "MPI moves large messages only while it is called",
        "Exchange.finish": "a send over MPI is a request, and none may outlive the pass",
        "Rotation.requests": "what `progress` tests",
        "Rotation.wait_sent": "a buffer is not free before its send is done",
        "Field": "MPI must know how much will come; virtual ranks take what comes",
        "Fields": "MPI must know how much will come; virtual ranks take what comes",
    },
    "block_attention": {"At": "a tile of the blocked kernel"},
    "cross_attention": {"check_comm": "MPI has communicators of other kinds"},
    "recompute": {"widen": "the reference is wide already"},
    "ring_attention": {"block_fields": "MPI must know how much will come"},
}
# Parameters that mpi_impl's function has beside the reference's, and why.
EXTRA_PARAMETERS = {
    "block_attention": {"progress": "lets MPI work between tiles"},
    "block_attention_backward": {"progress": "lets MPI work between tiles"},
    "Exchange.__init__": {"xp": "NumPy or CuPy decides about the buffers"},
    "Exchange.rotation": {"fields": "MPI must know how much will come", "hop": "whose it will be"},
    "Rotation.__init__": {"fields": "MPI must know how much will come", "hop": "whose it will be"},
}
# What the reference has and mpi_impl has not, and why.
ONLY_IN_REFERENCE = {
    "block_attention": {"TILE_SCORES": "mpi_impl's tiles depend on the kind of array"},
    "lv_xattn": {"AnyArray": "the reference turns any dtype into fp64"},
    "ring_attention": {"AnyArray": "the reference turns any dtype into fp64"},
    "cross_attention": {"AnyArray": "the reference turns any dtype into fp64"},
    "recompute": {"AnyArray": "the reference turns any dtype into fp64"},
}
MODULES = pytest.mark.parametrize("module", MIRRORED)


def source(package: str, module: str) -> str:
    return (ROOT / package / f"{module}.py").read_text()


def names(tree: ast.Module) -> list[str]:
    """Public names that the module defines, methods and properties among them, in order."""
    found = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.append(node.name)
        if isinstance(node, ast.ClassDef):
            found += [
                f"{node.name}.{x.target.id if isinstance(x, ast.AnnAssign) else x.name}"  # type: ignore[union-attr]
                for x in node.body
                if isinstance(x, ast.FunctionDef | ast.AnnAssign)
            ]
        if isinstance(node, ast.Assign):
            for target in node.targets:
                found += [n.id for n in ast.walk(target) if isinstance(n, ast.Name)]
    return [name for name in found if not re.search(r"(^|\.)_[^_]|^_", name)]


def signatures(tree: ast.Module) -> dict[str, list[tuple[str, str, str]]]:
    """Name, kind and default of every parameter of every public function and method."""
    functions = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            functions[node.name] = node
        if isinstance(node, ast.ClassDef):
            for x in node.body:
                if isinstance(x, ast.FunctionDef):
                    functions[f"{node.name}.{x.name}"] = x
    return {
        name: parameters(node.args)
        for name, node in functions.items()
        if not re.search(r"(^|\.)_[^_]|^_", name)
    }


def parameters(args: ast.arguments) -> list[tuple[str, str, str]]:
    positional = args.posonlyargs + args.args
    defaults = ["" for _ in positional[len(args.defaults) :]] + [
        ast.unparse(d) for d in args.defaults
    ]
    found = [
        (a.arg, "only" if a in args.posonlyargs else "positional", d)
        for a, d in zip(positional, defaults, strict=True)
    ]
    if args.vararg:
        found.append((args.vararg.arg, "rest", ""))
    found += [
        (a.arg, "keyword", "" if d is None else ast.unparse(d))
        for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True)
    ]
    if args.kwarg:
        found.append((args.kwarg.arg, "options", ""))
    return found


def steps(text: str) -> list[str]:
    """The numbered comments, in order, each to the end of its last line."""
    found: list[str] = []
    last = -2
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT:
            continue
        row = token.start[0]
        if re.match(r"# \d+\. ", token.string):
            found.append(token.string)
            last = row
        elif row == last + 1 and found and token.line.lstrip().startswith("#"):
            found[-1] += token.string[1:]
            last = row
    return found


def schedule(text: str) -> list[str]:
    """The indented lines of the module's docstring: equations, schedules and drawings."""
    doc = ast.get_docstring(ast.parse(text)) or ""
    return [line.rstrip() for line in doc.splitlines() if line.startswith("    ")]


@MODULES
def test_public_names_agree_in_order(module: str) -> None:
    ours, theirs = (names(ast.parse(source(p, module))) for p in ("reference", "mpi_impl"))
    only_mpi, only_reference = ONLY_IN_MPI.get(module, {}), ONLY_IN_REFERENCE.get(module, {})
    assert set(only_mpi) <= set(theirs) - set(ours)  # no exception outlives its reason
    assert set(only_reference) <= set(ours) - set(theirs)
    assert [n for n in theirs if n not in only_mpi] == [n for n in ours if n not in only_reference]


@MODULES
def test_signatures_agree_but_for_the_listed_parameters(module: str) -> None:
    ours, theirs = (signatures(ast.parse(source(p, module))) for p in ("reference", "mpi_impl"))
    assert ours
    for name, wanted in ours.items():
        extra = EXTRA_PARAMETERS.get(name, {})
        assert set(extra) <= {parameter for parameter, _, _ in theirs[name]}
        assert [p for p in theirs[name] if p[0] not in extra] == wanted, name


@MODULES
def test_numbered_steps_agree(module: str) -> None:
    ours, theirs = (steps(source(p, module)) for p in ("reference", "mpi_impl"))
    assert ours == theirs
    if module in ("block_attention", "lv_xattn", "ring_attention", "recompute"):
        assert len(ours) >= 3


@MODULES
def test_equations_and_schedules_agree(module: str) -> None:
    ours, theirs = (schedule(source(p, module)) for p in ("reference", "mpi_impl"))
    assert ours == theirs


def test_every_file_of_mpi_impl_is_mirrored_or_its_own() -> None:
    own = {
        "__init__",
        "__main__",
        "arguments",
        "device",
        "jupyter",
        "launcher",
        "last_words",
        "watchdog",
    }
    files = {path.stem for path in (ROOT / "mpi_impl").glob("*.py")} - own
    assert set(MIRRORED) <= files
    assert files <= {path.stem for path in (ROOT / "reference").glob("*.py")}


@pytest.mark.parametrize("path", sorted((ROOT / "mpi_impl").rglob("*.py")), ids=lambda p: p.stem)
def test_mpi_impl_imports_neither_algorithms_of_the_reference_nor_plans(path: Path) -> None:
    shared = {"layout", "masks", "meter", "validation"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lvxattn.reference"):
            module = (node.module or "").removeprefix("lvxattn.reference").strip(".")
            assert (
                module in shared or path.parent.name in ("demo", "run") or path.stem == "__main__"
            )
        if isinstance(node, ast.ImportFrom):
            assert not (node.module or "").startswith("lvxattn.torch_impl")
