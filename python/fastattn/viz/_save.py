"""Pictures as files."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from fastattn.viz._style import DPI

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SUFFIXES = (".png", ".svg")


def save(figure: Figure, path: str | PathLike[str], *, dpi: float = DPI) -> Path:
    """Write a picture to a file; the same picture gives the same bytes.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
        What the functions of this module return, or any other.
    path : path-like
        Ends in ``.png`` or ``.svg``. Folders that are missing are made.
    dpi : float
        Dots an inch of a PNG.

    Returns
    -------
    pathlib.Path
        Where it was written.

    Raises
    ------
    ValueError
        Where `path` ends in anything else.
    """
    import matplotlib

    path = Path(path)
    if path.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"path: expected a name that ends in .png or .svg, got {path.name!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    svg = path.suffix.lower() == ".svg"
    with matplotlib.rc_context({"svg.hashsalt": "fastattn"}):  # names of clips, otherwise drawn at random
        figure.savefig(path, dpi=dpi, metadata={"Date": None} if svg else None)
    return path
