"""Draws every picture of the site: ``python docs/pictures.py``, and `conf.py` before each build.

A picture is a function that returns a matplotlib Figure; its name is that of the file. Whatever it shows of
attention is computed by fastattn when it is drawn.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

FOLDER = Path(__file__).resolve().parent / "_pictures"
_LOOKS = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "svg.hashsalt": "fastattn",  # the same picture is the same file
}


def all_pictures() -> dict[str, Callable[[], Figure]]:
    """Every picture by its name."""
    import concept_pictures
    import internal_pictures
    import viz_pictures

    modules = concept_pictures, internal_pictures, viz_pictures
    return {name: getattr(module, name) for module in modules for name in module.__all__}


def draw_all(folder: Path = FOLDER) -> list[Path]:
    """Draw all of them as SVG files in `folder`."""
    folder.mkdir(exist_ok=True)
    drawn = []
    with matplotlib.rc_context(_LOOKS):
        for name, picture in all_pictures().items():
            path = folder / f"{name}.svg"
            picture().savefig(path, metadata={"Date": None})
            drawn.append(path)
    return drawn


if __name__ == "__main__":
    sys.path.insert(0, str(FOLDER.parent))
    for path in draw_all():
        print(path)
