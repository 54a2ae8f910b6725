"""Heat maps: a row a query, a column a key."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastattn.viz import _arrays, _style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fastattn.viz._arrays import ArrayLike, FloatArray, Head

_SMALL = 0.6  # a picture in a grid, beside one that stands alone
_DOTS = 2  # of a side of a cell at least: one that is smaller may get lost
_LEGEND = "attention weight"


def heatmap(
    weights: ArrayLike,
    query_tokens: Sequence[str] | None = None,
    key_tokens: Sequence[str] | None = None,
    *,
    head: Head | None = None,
    columns: int | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw attention weights as a map of colours, one head or several.

    Parameters
    ----------
    weights : numpy.ndarray or torch.Tensor
        Probabilities (Lq, Lk), (H, Lq, Lk) or (1, H, Lq, Lk), such as the weights that ``attention(...,
        return_weights=True)`` returns.
    query_tokens : sequence of str, optional
        The Lq queries; their positions by default. Marks that tokenizers put for a space are not shown, and
        where a picture has no room for all tokens, every so many are written, with their positions.
    key_tokens : sequence of str, optional
        The Lk keys; the queries by default, if there are as many.
    head : int or "mean", optional
        One head, or the average of all. By default every head is drawn: a grid of small pictures, on one
        scale of colours.
    columns : int, optional
        Pictures in a row of the grid; as square a grid as H allows by default.
    title : str, optional
        Written above.
    ax : matplotlib.axes.Axes, optional
        Where to draw a single map; a new figure by default.

    Returns
    -------
    matplotlib.figure.Figure
        Of the size that its tokens need; `fastattn.viz.save` writes it. Of more than 720 queries or keys
        (fewer in a grid), a cell stands for several and has the largest of their weights; the legend says so.

    Raises
    ------
    ImportError
        Without matplotlib.
    TypeError
        Where an argument is no array, no sequence of strings or no head.
    ValueError
        Where shapes do not fit, `weights` are no probabilities, or `ax` is given for several maps.
    """
    heads = _arrays.with_heads("weights", weights, "queries, keys")
    queries, keys = heads.shape[1:]
    if key_tokens is None and queries == keys:
        key_tokens = query_tokens
    names_q = _arrays.check_tokens("query_tokens", query_tokens, queries)
    names_k = _arrays.check_tokens("key_tokens", key_tokens, keys)
    if head is not None or len(heads) == 1:
        matrix = _arrays.one_head("weights", heads, 0 if head is None else head)
        return _single(matrix, names_q, names_k, title, ax)
    if ax is not None:
        raise ValueError(f"ax: one axes holds one map, got {len(heads)} heads; say head=0, or head='mean'")
    return _grid(heads, names_q, names_k, columns, title)


def _single(
    matrix: FloatArray, names_q: list[str], names_k: list[str], title: str | None, ax: Axes | None
) -> Figure:
    width, height = _style.inches(len(names_k)), _style.inches(len(names_q))
    alone = ax is None
    if ax is None:
        ax = _style.new_figure(max(4.0, width + 1.9), max(2.8, height + 1.3)).add_subplot()
    else:
        box, dpi = ax.get_window_extent(), _style.figure_of(ax).dpi
        width, height = box.width / dpi, box.height / dpi
    cells, rows, columns = _arrays.pooled(matrix, _most_cells(_style.THINNED_INCHES))
    image = _style.paint(ax, cells, float(matrix.max(initial=0.0)))
    image.set_extent((-0.5, len(names_k) - 0.5, len(names_q) - 0.5, -0.5))
    _style.name_tokens(ax.yaxis, names_q, height)
    _style.name_tokens(ax.xaxis, names_k, width)
    ax.tick_params(labeltop=True, labelbottom=False)
    ax.set_ylabel("query", fontsize=_style.FONT_POINTS)
    ax.set_xlabel("key", fontsize=_style.FONT_POINTS)
    _style.write_title(ax, title, alone=alone)
    _style.colour_bar(image, ax, _legend(rows, columns))
    return _style.figure_of(ax)


def _grid(
    heads: FloatArray, names_q: list[str], names_k: list[str], columns: int | None, title: str | None
) -> Figure:
    count = len(heads)
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    if columns < 1:
        raise ValueError(f"columns: expected at least 1, got {columns}")
    rows = math.ceil(count / columns)
    each = _SMALL * _style.INCHES_PER_TOKEN
    room = _style.MOST_INCHES / max(columns, rows)  # a long text grows its pictures to this, and no further
    width, height = (max(1.0, min(each * len(names), max(room, 2.0))) for names in (names_k, names_q))
    figure = _style.new_figure(1.6 + columns * (0.25 + width), 1.1 + rows * (0.4 + height))
    axes = figure.subplots(rows, columns, squeeze=False)
    top, size = float(heads.max(initial=0.0)), _SMALL * _style.FONT_POINTS + 0.6
    for place, ax in enumerate(axes.flat):
        if place >= count:
            ax.set_axis_off()
            continue
        cells, steps_q, steps_k = _arrays.pooled(heads[place], _most_cells(room))
        image = _style.paint(ax, cells, top)
        image.set_extent((-0.5, len(names_k) - 0.5, len(names_q) - 0.5, -0.5))
        ax.set_title(f"head {place}", fontsize=_style.FONT_POINTS, pad=3)
        # The outermost pictures carry the tokens; those of the others are the same.
        _style.name_tokens(ax.yaxis, names_q, height, size)
        _style.name_tokens(ax.xaxis, names_k, width, size)
        ax.tick_params(labelleft=place % columns == 0, labelbottom=place + columns >= count)
    figure.supxlabel("key", fontsize=_style.FONT_POINTS)
    figure.supylabel("query", fontsize=_style.FONT_POINTS)
    _style.write_title(ax, title)
    _style.colour_bar(image, axes.ravel().tolist(), _legend(steps_q, steps_k))
    return figure


def _most_cells(inches: float) -> int:
    """How many cells a side of this length shows."""
    return max(60, int(inches * _style.DPI / _DOTS))


def _legend(rows: int, columns: int) -> str:
    """Name the colours, and say what a cell stands for if it is not one pair."""
    return _LEGEND if rows == columns == 1 else f"{_LEGEND},\nthe largest of {rows} x {columns} pairs"
