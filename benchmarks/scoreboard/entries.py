"""The published packages and how each is run, as `packages.toml` pins and names them."""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PINNED = HERE / "packages.toml"


@dataclass(frozen=True)
class Entry:
    """One attention function of a package.

    Attributes
    ----------
    name : str
        Of the entry, as on the command line.
    package : str
        The distribution whose version is shown; empty: this project.
    what : str
        The function, for readers.
    environment : str
        Its virtual environment.
    requires : tuple of str
        What is installed there, each pinned.
    adapter : str
        ``"module:function"`` in ``benchmarks.scoreboard.adapters``, or with the module's full name.
    framework : str
        As in ``python -m lvxattn.check --framework``.
    ranks : tuple of int
        Numbers of gloo ranks; empty: one process.
    cuts : tuple of str
        As in ``--cuts``; empty: all.
    options : tuple of str
        More options of the check, such as ``--no-backward``.
    variables : tuple of (str, str)
        Environment variables of the process.
    """

    name: str
    package: str
    what: str
    environment: str
    requires: tuple[str, ...]
    adapter: str
    framework: str
    ranks: tuple[int, ...] = ()
    cuts: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()

    @property
    def version(self) -> str:
        """The pinned version of the package; empty for this project."""
        pins = dict(pin.split("==") for pin in self.requires)
        return pins.get(self.package, "")

    @property
    def target(self) -> str:
        """The adapter's function, as the check takes it."""
        known = f"benchmarks.scoreboard.adapters.{self.adapter}"
        return self.adapter if "." in self.adapter else known


def entries(path: Path = PINNED) -> list[Entry]:
    """Return all entries of a file.

    Raises
    ------
    ValueError
        Naming the entry, what was expected and what was given.
    """
    known = environments(path)
    found = tomllib.loads(path.read_text()).get("entry", {})
    return [_entry(name, fields, known, path) for name, fields in found.items()]


def environments(path: Path = PINNED) -> dict[str, tuple[str, ...]]:
    """Return what each environment of a file requires; raises as `entries`."""
    found = tomllib.loads(path.read_text()).get("environment", {})
    for name, requires in found.items():
        for pin in requires:
            if pin.count("==") != 1:
                raise ValueError(
                    f"{path.name}: environment {name}: expected NAME==VERSION, got {pin!r}"
                )
    return {name: tuple(requires) for name, requires in found.items()}


def _entry(
    name: str, fields: dict[str, Any], known: dict[str, tuple[str, ...]], path: Path
) -> Entry:
    for needed in ("what", "environment", "adapter", "framework"):
        if needed not in fields:
            raise ValueError(f"{path.name}: {name}: expected {needed!r}, got {sorted(fields)}")
    where = fields["environment"]
    if where not in known:
        raise ValueError(
            f"{path.name}: {name}: expected an environment of {', '.join(known)}, got {where!r}"
        )
    lists = {key: tuple(fields.get(key, ())) for key in ("ranks", "cuts", "options")}
    variables = tuple(fields.get("variables", {}).items())
    rest = {key: fields[key] for key in ("what", "adapter", "framework")}
    return Entry(
        name,
        fields.get("package", ""),
        environment=where,
        requires=known[where],
        variables=variables,
        **rest,
        **lists,
    )


def chosen(names: list[str], every: list[Entry]) -> list[Entry]:
    """Return the entries of these names, or whose names begin so; all without names.

    Raises
    ------
    ValueError
        No entry has that name.
    """
    if not names:
        return every
    known = [entry.name for entry in every]
    found: set[str] = set()
    for name in names:
        alike = [name] if name in known else [other for other in known if other.startswith(name)]
        if not alike:
            raise ValueError(
                f"NAME: expected one of {', '.join(known)}, or how some begin; got {name!r}"
            )
        found.update(alike)
    return [entry for entry in every if entry.name in found]
