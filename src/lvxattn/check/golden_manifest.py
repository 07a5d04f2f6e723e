"""The manifest of golden files: every entry that is used later is validated when it is read."""

import json
from pathlib import Path
from sys import float_info
from typing import Any

from lvxattn.cli.tensors import InputError
from lvxattn.common.regular_file import open_regular, printable

FORMAT = 1
MANIFEST = "manifest.json"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a folder.

    Parameters
    ----------
    folder : pathlib.Path

    Returns
    -------
    dict
        As `golden_data` describes it.

    Raises
    ------
    InputError
        There is none, or it is damaged.
    """
    file = folder / MANIFEST
    try:
        with open_regular(file) as opened:
            manifest: dict[str, Any] = json.load(opened)
        if manifest["format"] != FORMAT:
            raise InputError(f"{file}: expected format {FORMAT}, got {manifest['format']!r:.40}")
        for name, entry in manifest["cases"].items():
            _check(name, entry)
    except FileNotFoundError:
        raise InputError(f"{folder}: no golden files: there is no {MANIFEST}") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    except _Damaged as error:
        raise InputError(f"{file}: damaged: {error}") from None
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        text = printable(f"{type(error).__name__} {error}")
        raise InputError(f"{file}: damaged: {text}") from None
    return manifest


def format_manifest(manifest: dict[str, Any]) -> str:
    """Format as JSON, with a line for each case."""
    lines = [f'  "{name}": {json.dumps(entry)}' for name, entry in manifest["cases"].items()]
    rest = json.dumps({**manifest, "cases": None}, indent=1)
    return rest.replace('"cases": null', '"cases": {\n' + ",\n".join(lines) + "\n }") + "\n"


class _Damaged(Exception):  # noqa: N818 - becomes an InputError, which names the file
    pass


def _check(name: str, entry: dict[str, Any]) -> None:
    """Raise unless the entry of a case has what it needs, in the right types."""
    file = entry["file"]
    plain = isinstance(file, str) and printable(file) == file and Path(file).name == file
    if not plain or file in ("", "..", MANIFEST):
        raise _Damaged(f"expected a file's name, got {file!r:.80}")
    if printable(name) != name:
        raise _Damaged(f"expected a case's name, got {name!r:.80}")
    for key, (valid, expected) in _ENTRIES.items():
        if key not in entry:
            raise _Damaged(f"{file} has no {key}")
        if not valid(entry[key]):
            raise _Damaged(f"{file}: expected {expected} as {key}, got {entry[key]!r:.80}")


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) <= float_info.max


def _is_count(x: Any) -> bool:
    return type(x) is int and x >= 0


def _is_text(x: Any) -> bool:
    return isinstance(x, str)


def _are_kinds(x: Any) -> bool:
    """Return whether x may be the kinds of rows: small numbers, as each is judged on its own."""
    return isinstance(x, list) and all(_is_count(kind) and kind < max(len(x), 1) for kind in x)


_ENTRIES = {
    "bytes": (_is_count, "a count"),
    "sha256": (_is_text, "a text"),
    "group": (_is_text, "a text"),
    "reason": (_is_text, "a text"),
    "scale": (_is_number, "a finite number"),
    "q_kinds": (_are_kinds, "kinds of rows"),
    "kv_kinds": (_are_kinds, "kinds of rows"),
    "tensors": (lambda x: isinstance(x, dict), "a table"),
}
