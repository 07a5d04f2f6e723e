"""What the packages offer, and that every parameter of it is documented."""

import importlib
import inspect
import re
from types import ModuleType
from typing import Any

import pytest

PACKAGES = [
    "lvxattn.reference",
    "lvxattn.plan",
    "lvxattn.cli",
    "lvxattn.mpi_impl",
]


def functions() -> dict[str, Any]:
    """Every exported function, by its full name."""
    found = {}
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isfunction(thing):
                found[f"{package}.{name}"] = thing
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_all_matches_public_names(package: str) -> None:
    module = importlib.import_module(package)
    public = {
        name
        for name, thing in vars(module).items()
        if not name.startswith("_") and not isinstance(thing, ModuleType)
    }
    assert sorted(module.__all__) == sorted(public)
    assert len(set(module.__all__)) == len(module.__all__)


@pytest.mark.parametrize("name", functions())
def test_docstrings_document_parameters_and_returns(name: str) -> None:
    function = functions()[name]
    doc = inspect.getdoc(function) or ""
    sections = dict(re.findall(r"^(\w+)\n-+\n(.*?)(?=\n\n\w+\n-+\n|\Z)", doc, re.M | re.S))
    parameters = list(inspect.signature(function).parameters)
    if parameters:
        lines = [line for line in sections["Parameters"].splitlines() if line[:1].strip()]
        named = [n.lstrip("*") for line in lines for n in line.split(" : ")[0].split(", ")]
        assert sorted(named) == sorted(parameters)
    returns = inspect.signature(function).return_annotation
    assert ("Returns" in sections) == (returns not in (None, "None"))


@pytest.mark.parametrize("name", functions())
def test_docstrings_say_whether_collective(name: str) -> None:
    function = functions()[name]
    if "comm" in inspect.signature(function).parameters:
        assert re.search(r"\bcollective\b", inspect.getdoc(function) or "", re.IGNORECASE)
