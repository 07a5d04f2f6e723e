"""The pytest plugin of the oracle: options, the fixture ``xattn_case``, and known failures.

pytest imports this in every run of an environment with lvxattn, before any conftest.py.  So it
imports no other package, not even NumPy, until options or tests need it.
"""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from lvxattn.check.pytest_cases import Choice, Chosen, JudgedCase, XattnCase

CONFORMANCE = "lvxattn.check.conformance"
FUNCTION = "package.module:function"
OPTIONS = {
    "impl": (FUNCTION, "the attention function to check"),
    "backward": (FUNCTION, "its backward, unless that is its attribute or autograd"),
    "suite": ("NAME", "quick (default) or full"),
    "dtypes": ("NAME,...", "of float64, float32, float16, bfloat16"),
    "framework": ("NAME", "its array library: numpy (default), torch, jax, cupy"),
    "device": ("NAME", "where the arrays are, such as cuda"),
    "seeds": ("N", "problems per case (default: 1)"),
    "xfails-file": ("FILE", "known failures, one per line: an id, case-dtype or a glob"),
}
_CHOSEN = pytest.StashKey["Chosen"]()
_NO_FUNCTION = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("lvxattn", "attention kernels (lvxattn)")
    for name, (metavar, text) in OPTIONS.items():
        group.addoption(f"--lvx-{name}", metavar=metavar, help=text)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Validate the options, if any, before collection."""
    if any(_option(session.config, name) is not None for name in OPTIONS if name != "xfails-file"):
        _chosen(session.config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize tests by problems."""
    if "xattn_judged" in metafunc.fixturenames:
        chosen = _chosen(metafunc.config)
        if chosen.caller is None:
            metafunc.config.stash[_NO_FUNCTION] = True
        choices: list[Choice] = list(chosen.choices)
        metafunc.parametrize("xattn_judged", choices, indirect=True, ids=lambda choice: choice.id)
    if "xattn_case" in metafunc.fixturenames:
        # Earlier calls are made by the check, not by tests of the user.
        choices = [choice for choice in _chosen(metafunc.config).choices if not choice.case.calls]
        metafunc.parametrize("xattn_case", choices, indirect=True, ids=lambda choice: choice.id)


@pytest.fixture
def xattn_case(request: pytest.FixtureRequest) -> "XattnCase":
    """Return a problem that breaks kernels, its truth, and ``check(out=..., dq=...)``."""
    from lvxattn.check.pytest_cases import xattn_case_of

    return xattn_case_of(_chosen(request.config), request.param)


@pytest.fixture
def xattn_judged(request: pytest.FixtureRequest) -> "JudgedCase":
    """Return a problem for the function of ``--lvx-impl``."""
    from lvxattn.check.pytest_cases import JudgedCase

    return JudgedCase(_chosen(request.config), request.param)


@pytest.fixture
def xattn_chosen(request: pytest.FixtureRequest) -> "Chosen":
    """Return the choice of the options, and the rows judged so far."""
    return _chosen(request.config)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the known failures, before -k and -m deselect tests."""
    if config.stash.get(_NO_FUNCTION, False):
        raise pytest.UsageError(f"{CONFORMANCE} needs --lvx-impl {FUNCTION}")
    path = _option(config, "xfails-file")
    if path is None:
        return
    ours = [item for item in items if _CASES & set(getattr(item, "fixturenames", ()))]
    narrowed = any("::" in arg for arg in config.args)
    for number, line in _lines(path):
        known = [item for item in ours if _names(line, item)]
        for item in known:
            item.add_marker(pytest.mark.xfail(reason=f"{path}:{number}"))
        if not known and not _elsewhere(line, ours, narrowed):
            raise pytest.UsageError(f"{path}:{number}: no test is called {line!r}")


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the process of the function."""
    chosen = config.stash.get(_CHOSEN, None)
    if chosen is not None and chosen.caller is not None:
        chosen.caller.close()


_CASES = {"xattn_case", "xattn_judged"}


def _option(config: pytest.Config, name: str) -> str | None:
    value: str | None = config.getoption(f"--lvx-{name}")
    return value


def _chosen(config: pytest.Config) -> "Chosen":
    if _CHOSEN not in config.stash:
        from lvxattn.check.pytest_cases import chosen_by

        options = {name: _option(config, name) for name in OPTIONS}
        try:
            config.stash[_CHOSEN] = chosen_by(options)
        except ValueError as error:
            raise pytest.UsageError(str(error)) from None
    return config.stash[_CHOSEN]


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """Yield lines that are neither empty nor comments, with their numbers."""
    from lvxattn.common.regular_file import open_regular

    try:
        with open_regular(path) as file:
            text = file.read().decode()
    except (OSError, UnicodeDecodeError) as error:
        what = getattr(error, "strerror", None) or error
        raise pytest.UsageError(f"--lvx-xfails-file: {path} cannot be read: {what}") from None
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].strip()
        if line:
            yield number, line


def _names(line: str, item: pytest.Item) -> bool:
    """Whether a line matches a test: its id, the id without the file, or the part in brackets."""
    names = (item.nodeid, item.nodeid.partition("::")[2], item.name, _bracketed(item.name))
    return any(_fits(line, name) for name in names)


def _elsewhere(line: str, ours: list[pytest.Item], narrowed: bool) -> bool:
    """Whether a line matches an existing test that this run does not collect."""
    from lvxattn.check.pytest_cases import possible_ids

    start, _, _ = line.partition("[")
    tests = {name.partition("[")[0] for item in ours for name in (item.nodeid, item.name)}
    if "[" in line and ours and not narrowed and start not in tests:
        return False
    wanted = _bracketed(line) if "[" in line else line
    wanted, _, seed = wanted.partition("-seed")
    return any(_fits(wanted, name) for name in possible_ids()) and (seed or "0").isdecimal()


def _bracketed(name: str) -> str:
    return name.partition("[")[2].removesuffix("]")


def _fits(line: str, name: str) -> bool:
    """Whether a name matches the line, in which only * and ? are wildcards."""
    return fnmatchcase(name, line.replace("[", "[[]"))
