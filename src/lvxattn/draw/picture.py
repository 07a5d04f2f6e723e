"""Picture files: which can be drawn, and how they are written."""

from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvxattn.common.new_file import write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURES = (".png", ".pdf", ".svg")


def save_picture(figure: "Figure", path: str | Path, **style: Any) -> None:
    """Write a figure, in the format that the file's name ends in.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
    path : str
    **style
        Arguments of ``Figure.savefig``.

    Raises
    ------
    OSError
        The file cannot be written; it is as it was before.
    """
    drawn = BytesIO()
    figure.savefig(drawn, format=Path(path).suffix[1:].lower() or "png", **style)
    write_file(path, drawn.getvalue())


def cannot_draw(picture: Path) -> str:
    """Return why a picture cannot be drawn, before any work is done; empty if it can."""
    if picture.suffix.lower() not in PICTURES:
        return f"expected a name that ends in {', '.join(PICTURES)}, got {picture}"
    if find_spec("matplotlib") is None:
        return "needs matplotlib, which is not installed"
    return ""
