"""Attention over an image."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from fastattn.viz import _arrays, _style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fastattn.viz._arrays import ArrayLike, FloatArray, Head


_OPACITY = 0.85  # where attention is highest; none leaves the image as it is
_SIDE = 1.9  # inches of one picture


def overlay(
    image: ArrayLike,
    weights: ArrayLike,
    grid: tuple[int, int] | None = None,
    *,
    head: Head | None = None,
    columns: int | None = None,
    title: str | None = None,
) -> Figure:
    """Draw what is looked at in an image: the image, and over it, in grey, the attention to its patches.

    Parameters
    ----------
    image : numpy.ndarray or torch.Tensor
        (height, width), or (height, width, channels) with 1, 3 or 4 channels, the fourth ignored. Numbers
        from 0, black, to any, the largest white.
    weights : numpy.ndarray or torch.Tensor
        Attention of one query to the patches, row by row: (patches,), (H, patches) or (1, H, patches). A
        class token is no patch: leave it out (``weights[..., 1:]``).
    grid : (int, int), optional
        Rows and columns of patches; a square by default.
    head : int or "mean", optional
        One head, or the average of all. By default every head is drawn.
    columns : int, optional
        Pictures in a row, the image itself among them; as square a grid as possible by default.
    title : str, optional
        Written above.

    Returns
    -------
    matplotlib.figure.Figure
        The image, and one picture a head, all on one scale of colours. Between the middles of patches the
        colours are interpolated.

    Raises
    ------
    ImportError
        Without matplotlib.
    TypeError
        Where an argument is no array or no head.
    ValueError
        Where shapes do not fit, or numbers are negative.
    """
    grey = _grey(image)
    heads = _arrays.with_heads("weights", weights, "patches")
    maps = heads.reshape(len(heads), *_grid(heads.shape[1], grid))
    names = [f"head {place}" for place in range(len(maps))]
    if head is not None:
        names = ["average of the heads" if head == "mean" else f"head {head}"]
        maps = _arrays.one_head("weights", maps, head)[None]
    elif len(maps) == 1:
        names = ["attention"]
    return _draw(grey, maps, names, columns, title)


def _grey(image: ArrayLike) -> FloatArray:
    values = _arrays.numbers("image", image)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    elif values.ndim == 3 and values.shape[2] in (3, 4):
        values = values[..., :3] @ np.array(_style.LUMA)
    if values.ndim != 2 or not values.size:
        raise ValueError(
            f"image: expected shape (height, width) or (height, width, 1, 3 or 4), got {values.shape}"
        )
    return values


def _grid(patches: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    if grid is None:
        side = math.isqrt(patches)
        if side * side != patches or not patches:
            raise ValueError(
                f"weights: {patches} patches are no square; leave out what is no patch, such as a class "
                f"token, or say grid=(rows, columns)"
            )
        return side, side
    rows, columns = grid
    if rows < 1 or columns < 1 or rows * columns != patches:
        raise ValueError(f"grid: expected rows and columns of {patches} patches, got {rows} x {columns}")
    return rows, columns


def _draw(
    grey: FloatArray, maps: FloatArray, names: list[str], columns: int | None, title: str | None
) -> Figure:
    from matplotlib.colors import LinearSegmentedColormap

    count = 1 + len(maps)
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    if columns < 1:
        raise ValueError(f"columns: expected at least 1, got {columns}")
    rows = math.ceil(count / columns)
    height, width = grey.shape
    scale = _SIDE / max(height, width)
    size = (0.4 + columns * (0.15 + width * scale), 0.75 + rows * (0.35 + height * scale))
    figure = _style.new_figure(max(size[0], 3.0), size[1])
    axes = figure.subplots(rows, columns, squeeze=False)
    top = float(maps.max(initial=0.0))
    glow = LinearSegmentedColormap.from_list("glow", [(_style.VERMILION, 0.0), (_style.VERMILION, _OPACITY)])
    for place, ax in enumerate(axes.flat):
        ax.set_axis_off()
        if place >= count:
            continue
        ax.imshow(grey, cmap="gray", vmin=0, vmax=grey.max() or 1.0, interpolation="nearest")
        if place:
            extent = (-0.5, width - 0.5, height - 0.5, -0.5)
            shown = ax.imshow(
                maps[place - 1], cmap=glow, vmin=0, vmax=top or 1.0, extent=extent,
                interpolation="bilinear",
            )  # fmt: skip
        ax.set_title(names[place - 1] if place else "image", fontsize=_style.FONT_POINTS, pad=3)
    _style.write_title(axes[0, 0], title)
    _style.colour_bar(shown, axes.ravel().tolist(), "attention weight of a patch", "bottom")
    return figure
