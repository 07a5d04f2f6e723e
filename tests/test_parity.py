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
    "ulysses",
    "gather",
    "grid",
    "replicated",
    "collectives",
    "cross_attention",
    "recompute",
]

PACKAGES = "mpi_impl", "torch_impl"
# Names that an implementation has and the reference lacks, and why.
_CHECKPOINT = "torch.utils.checkpoint recomputes what this saves"
_BUFFERED = "buffers are written once, in common/exchange_base.py"
_AWAITED = "the size of a message must be known; virtual ranks accept any"
ONLY_THERE: dict[str, dict[str, dict[str, str]]] = {
    "mpi_impl": {
        "exchange": {
            "Exchange.progress": "MPI progresses large messages only while it is called",
            "Exchange.begin": "a request starts when its buffers are ready",
            "Rotation.exchange": _BUFFERED,
            "Rotation.transfers": "what `progress` tests",
            "Rotation.start": "transfers run beside the work, begun in an order of all ranks",
            "Rotation.wait_sent": "a buffer is not free before its send is done",
            "Exchange.dtype_of": "blocks lie in buffers of bytes",
            "Exchange.buffer": "blocks lie in buffers of bytes, which the layout keeps",
        },
        "cross_attention": {"check_comm": "MPI has communicators of other kinds"},
        "recompute": {"widen": "the reference is wide already"},
    },
    "torch_impl": {
        "exchange": {
            **dict.fromkeys(("Exchange.layout", "Rotation.layout"), "numbers forwards"),
            "Rotation.exchange": _BUFFERED,
            "Exchange.check_stamp": "autograd's backwards may come in another order on some ranks",
            "Rotation.start": "transfers run beside the work, begun in an order of all ranks",
            "Rotation.wait_sent": "a buffer is not free before its send is done",
            "Exchange.dtype_of": "blocks lie in buffers of bytes",
            "Exchange.buffer": "blocks lie in buffers of bytes, which the layout keeps",
            "span": "names hop and block for the profiler",
        },
        "cross_attention": {
            "attend": "a program that is compiled attends by an operator",
            "attend_now": "a layer that recomputes keys and values attends too",
            "is_compiled": "a program that is compiled attends by an operator",
            "autocast_dtype": "autocast is PyTorch's",
            "cast": "autocast is PyTorch's",
            "call_of": "whether a backward follows must be agreed on",
            "gradients_of": "tensors say which gradients they require",
            "check_gradients": "tensors say which gradients they require",
        },
        "recompute": dict.fromkeys(
            ("Made", "Made.forward", "Made.backward", "node_of"), _CHECKPOINT
        ),
    },
}
# Parameters that the reference's functions lack, and why.
_PROGRESS = {"progress": "lets MPI work between tiles"}
_FIELDS = {"fields": _AWAITED}
_KERNEL = {"kernel": "there are several"}
_NEW = dict.fromkeys(("dk", "dv"), "may be left out: kernels return new ones")
EXTRA_PARAMETERS: dict[str, dict[str, dict[str, str]]] = {
    "mpi_impl": {
        "block_attention": _PROGRESS | _KERNEL,
        "partial_attention": _PROGRESS | _KERNEL,
        "block_attention_backward": _PROGRESS | _KERNEL,
        "Exchange.__init__": {"q": "its library and dtype decide about the buffers"},
        "all_to_all": _FIELDS,
        "joined": {"xp": "NumPy or CuPy makes the mask"},
    },
    "torch_impl": {
        "block_attention": _KERNEL,
        "partial_attention": _KERNEL,
        "block_attention_backward": _KERNEL | _NEW | {"dtype": "of new dk and dv"},
        "Exchange.__init__": {
            "q": "its device is where the buffers are",
            "wanted": "tensors say which gradients they require, on every rank for itself",
        },
        "all_to_all": _FIELDS,
        "joined": {"device": "where the mask is made"},
        "cross_attention": {"return_lse": "most callers want out alone"},
        "cross_attention_layer": {
            "make_q": "a module saves the features of the queries in any case",
            "recompute": "a module can save keys and values",
            "return_lse": "most callers want out alone",
        },
    },
}
# Parameters of the reference that its functions do not have, and why.
FEWER_PARAMETERS: dict[str, dict[str, dict[str, str]]] = {
    "mpi_impl": {},
    "torch_impl": {"block_attention_backward": _NEW},
}
# Names that the reference has and an implementation lacks, and why.
_FP64 = {"AnyArray": "the reference turns any dtype into fp64"}
_AUTOGRAD = "autograd saves, and calls the backward"
ONLY_IN_REFERENCE: dict[str, dict[str, dict[str, str]]] = {
    "mpi_impl": {
        "block_attention": {"TILE_SCORES": "mpi_impl's tiles depend on the kind of array"},
        "exchange": dict.fromkeys(("Rotation.send", "Rotation.pass_on"), _BUFFERED),
        **dict.fromkeys(("cross_attention", "recompute"), _FP64),
    },
    "torch_impl": {
        "block_attention": {"TILE_SCORES": "tiles are the kernels'"},
        "exchange": dict.fromkeys(("Rotation.send", "Rotation.pass_on"), _BUFFERED),
        "cross_attention": {
            **_FP64,
            **dict.fromkeys(("cross_attention_backward", "Schedule"), _AUTOGRAD),
            "LARGE_LSE": "the rounding error of lse is saved",
        },
        "recompute": {
            **_FP64,
            **dict.fromkeys(("Saved", "Saved.q", "Saved.y", "Saved.out", "Saved.lse"), _AUTOGRAD),
            "Saved.forms": _AUTOGRAD,
            "cross_attention_layer_backward": _AUTOGRAD,
            "project": "the caller's modules do",
            "project_backward": _AUTOGRAD,
        },
    },
}
# The files of numbered steps that are not in the mirrored file.
STEPS_IN = {("torch_impl", "block_attention"): "kernels/blocked"}
PACKAGE = pytest.mark.parametrize("package", PACKAGES)
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


def named(package: str, parameter: tuple[str, str, str]) -> tuple[str, str, str]:
    """A parameter as the reference names it: a group is a communicator."""
    name, kind, default = parameter
    if package == "torch_impl" and name == "group":  # there it may be left out
        return ("comm", kind, "")
    return name, kind, default


@PACKAGE
@MODULES
def test_public_names_agree_in_order(module: str, package: str) -> None:
    ours, theirs = (names(ast.parse(source(p, module))) for p in ("reference", package))
    theirs = [n for i, n in enumerate(theirs) if n not in theirs[:i]]  # overloads are one function
    ours, theirs = ([n for n in found if n != "Array"] for found in (ours, theirs))
    only_there = ONLY_THERE[package].get(module, {})
    only_reference = ONLY_IN_REFERENCE[package].get(module, {})
    assert set(only_there) <= set(theirs) - set(ours)  # no exception outlives its reason
    assert set(only_reference) <= set(ours) - set(theirs)
    assert [n for n in theirs if n not in only_there] == [
        n for n in ours if n not in only_reference
    ]


@PACKAGE
@MODULES
def test_signatures_agree_but_for_the_listed_parameters(module: str, package: str) -> None:
    ours, theirs = (signatures(ast.parse(source(p, module))) for p in ("reference", package))
    assert ours
    for name, wanted in ours.items():
        if name in ONLY_IN_REFERENCE[package].get(module, {}):
            continue
        extra = EXTRA_PARAMETERS[package].get(name, {})
        fewer = FEWER_PARAMETERS[package].get(name, {})
        assert set(extra) <= {parameter for parameter, _, _ in theirs[name]}
        assert set(fewer) <= {parameter for parameter, _, _ in wanted}
        given = [named(package, p) for p in theirs[name] if p[0] not in extra]
        assert given == [p for p in wanted if p[0] not in fewer], name


@PACKAGE
@MODULES
def test_numbered_steps_agree(module: str, package: str) -> None:
    there = STEPS_IN.get((package, module), module)
    ours, theirs = steps(source("reference", module)), steps(source(package, there))
    assert ours == theirs
    if module in ("block_attention", "lv_xattn", "ring_attention", "grid", "recompute"):
        assert len(ours) >= 3


@PACKAGE
@MODULES
def test_equations_and_schedules_agree(module: str, package: str) -> None:
    ours, theirs = (schedule(source(p, module)) for p in ("reference", package))
    assert ours == theirs


OWN = {
    "mpi_impl": {"measure", "tiles"},
    "torch_impl": {"autograd", "group", "layout", "measure", "module", "operators"},
}


@PACKAGE
def test_every_file_is_mirrored_or_listed(package: str) -> None:
    own = {"__init__", "__main__"} | OWN[package]
    files = {path.stem for path in (ROOT / package).glob("*.py")} - own
    assert set(MIRRORED) <= files
    assert files <= {path.stem for path in (ROOT / "reference").glob("*.py")}


# What the modules of a folder may import of this project.
MAY_IMPORT = {
    "reference": {"common", "plan"},
    "mpi_impl": {"common", "plan", "cli", "draw", "mpi_impl"},
    "torch_impl": {"common", "plan", "cli", "draw", "torch_impl"},
    "src/lvxattn/common": {"common"},
    "src/lvxattn/plan/__main__.py": {"cli"},
    "src/lvxattn/plan": {"common", "plan"},
    "src/lvxattn/draw": {"common", "plan", "reference", "draw"},
    "src/lvxattn/cli": {"common", "plan", "draw", "cli"},
    "src/lvxattn/check": {"common", "cli", "check"},
}


@pytest.mark.parametrize(
    "path",
    [path for folder in MAY_IMPORT for path in sorted((ROOT / folder).rglob("*.py"))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_imports_go_one_way(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    may = next(may for folder, may in MAY_IMPORT.items() if name.startswith(folder))
    if path.parts[-2] == "demo":  # it checks its answers by the unsharded reference
        may = may | {"reference"}
    # The oracle imports its truth only when it computes it.
    later = {"reference"} if name.startswith("src/lvxattn/check/") else set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lvxattn."):
            allowed = may if node in tree.body else may | later
            assert (node.module or "").split(".")[1] in allowed, node.module


@pytest.mark.parametrize("folder", ["reference", *(f"src/lvxattn/{x}" for x in ("common", "plan"))])
def test_needs_numpy_alone(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            found = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            for name in found:
                assert name.partition(".")[0] not in ("mpi4py", "torch", "cupy", "jax"), path
