"""Every function and class that a module of the API pages exports has an example, which runs."""

import doctest
import importlib
import inspect
import re
from typing import Any

import pytest

from tests.launch import ROOT

MODULES = sorted({
    name
    for page in (ROOT / "docs" / "api").glob("*.md")
    for name in re.findall(r"automodule:: (\S+)", page.read_text())
})  # fmt: skip
# Objects without an example of their own, and why.
WITHOUT = {
    "lvxattn.check.Case": "case_of returns them",
    "lvxattn.check.Problem": "draw returns them",
    "lvxattn.check.Report": "check returns them",
    "lvxattn.check.Row": "a Report has them",
    "lvxattn.check.Verdict": "a Row has them",
    "lvxattn.common.timeline.Post": "a Timeline has them",
    "lvxattn.common.timeline.Span": "a Timeline has them",
    "lvxattn.plan.Candidate": "candidates returns them",
    "lvxattn.plan.Link": "a Machine has them",
    "lvxattn.plan.Memory": "memory returns them",
    "lvxattn.plan.Played": "play returns them",
    "lvxattn.torch_impl.models.Spread": "distribute returns them",
}
# Objects whose examples are shown but not run, and why.
SKIPPED = {
    "lvxattn.mpi_impl.announce_death": "starts a process that ends with this one",
    "lvxattn.mpi_impl.limit_blas_threads": "changes the threads of all that follows",
    "lvxattn.mpi_impl.measure": "takes seconds",
    "lvxattn.mpi_impl.use_device": "needs a GPU",
    "lvxattn.torch_impl.measure": "takes seconds",
    "lvxattn.torch_impl.models.distribute": "needs a model and ranks",
}


def exports() -> dict[str, Any]:
    """Every function and class that a module exports, by the name that it has there."""
    found = {}
    for name in MODULES:
        module = importlib.import_module(name)
        own = [x for x, thing in vars(module).items() if getattr(thing, "__module__", "") == name]
        for x in getattr(module, "__all__", [x for x in own if not x.startswith("_")]):
            thing = getattr(module, x)
            if inspect.isfunction(thing) or inspect.isclass(thing):
                found[f"{name}.{x}"] = thing
    return found


EXPORTS = exports()


@pytest.mark.parametrize("name", EXPORTS)
def test_examples(name: str) -> None:
    thing = EXPORTS[name]
    tests = [t for t in doctest.DocTestFinder().find(thing, name) if t.examples]
    if not tests and name in WITHOUT:
        pytest.skip(WITHOUT[name])
    assert tests, "it has no example"
    lines: list[str] = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in tests:
        runner.run(test, out=lines.append)
    assert not runner.failures, "".join(lines)
    skipped = all(doctest.SKIP in x.options for test in tests for x in test.examples[-1:])
    assert skipped == (name in SKIPPED)


def test_exceptions_are_exports() -> None:
    assert set(SKIPPED) | set(WITHOUT) <= set(EXPORTS)
