"""Links: tokens in two columns, and lines between them as strong as the attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastattn.viz import _arrays, _edges, _style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fastattn.viz._arrays import ArrayLike, Head
    from fastattn.viz._edges import Edges

_THINNEST, _WIDEST = 0.6, 4.0  # points, of a line of weight 0, and what is added for weight 1
_FAINTEST = 0.01  # lines weaker than this share of the strongest are not seen
_LINE = _style.LINE_INCHES
_NAMED = 8  # how many keys of a single query get a number


def links(
    weights: ArrayLike,
    query_tokens: Sequence[str] | None = None,
    key_tokens: Sequence[str] | None = None,
    *,
    head: Head = "mean",
    query: int | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw who attends to whom: queries on the left, keys on the right, a line a pair.

    Parameters
    ----------
    weights : numpy.ndarray, torch.Tensor or fastattn.Insight
        Probabilities (Lq, Lk), (H, Lq, Lk) or (1, H, Lq, Lk); or what ``fastattn.insight`` returns, or
        anything else that has `keys` (-1 for none) and `weights`, both (H, Lq, top_k) or (1, H, Lq, top_k).
    query_tokens : sequence of str, optional
        The Lq queries; their positions by default.
    key_tokens : sequence of str, optional
        The Lk keys; the queries by default, if there are as many.
    head : int or "mean"
        One head, or the average of all. Of an insight, a pair counts 0 in heads where it is not among the
        strongest.
    query : int, optional
        Draw the lines of this query alone, and write the weights of its strongest keys; from the end
        if negative.
    title : str, optional
        Written above.
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    matplotlib.figure.Figure
        Opacity and width of a line grow with its weight; pairs below a hundredth of the strongest have none.
        Below stands which of several heads is drawn.

    Raises
    ------
    ImportError
        Without matplotlib.
    TypeError
        Where an argument is no array, no sequence of strings or no head.
    ValueError
        Where shapes do not fit, or there is no such head, query or key.
    """
    given = key_tokens if key_tokens is not None else query_tokens
    heads, queries, keys = _edges.sizes(weights, len(given or ()))
    names_q = _arrays.check_tokens("query_tokens", query_tokens, queries)
    if key_tokens is None and keys == queries:
        key_tokens = query_tokens
    names_k = _arrays.check_tokens("key_tokens", key_tokens, keys)
    if query is not None:
        query = _checked_query(query, queries)
    pairs = _edges.edges(weights, head, keys)
    if query is not None:
        pairs = type(pairs)(*(part[pairs.query == query] for part in pairs))
    height = _style.inches(max(len(names_q), len(names_k)))
    alone = ax is None
    if ax is None:
        ax = _style.new_figure(5.0, height + (0.7 if heads == 1 else 0.9)).add_subplot()
    found = {} if query is None else _strongest(pairs)
    _write(ax, names_q, names_k, height, query, found)
    _draw(ax, pairs, len(names_q), len(names_k), 1.0 if query is None else 0.5)
    if heads > 1:
        of = "average of the heads" if head == "mean" else f"head {head}"
        ax.set_xlabel(of, fontsize=_style.FONT_POINTS)
    _style.write_title(ax, title, alone=alone)
    return _style.figure_of(ax)


def _checked_query(query: int, queries: int) -> int:
    if isinstance(query, bool) or not isinstance(query, int | np.integer):
        raise TypeError(f"query: expected the position of a query, an integer, got {query!r}")
    if not -queries <= query < queries:
        raise ValueError(f"query: expected a position from 0 to {queries - 1}, got {query}")
    return int(query) % queries


def _strongest(pairs: Edges) -> dict[int, float]:
    """Weights of the strongest keys, strongest first, as far as two digits show them."""
    order = np.argsort(-pairs.weight, kind="stable")[:_NAMED]
    return {
        int(pairs.key[place]): float(pairs.weight[place]) for place in order if pairs.weight[place] >= 0.005
    }


def _write(
    ax: Axes,
    names_q: list[str],
    names_k: list[str],
    height: float,
    query: int | None,
    found: dict[int, float],
) -> None:
    """Write the two columns of tokens, the heads of the columns, and nothing else."""
    ax.set(xlim=(0, 1), ylim=(1, 0), xticks=[0, 1])
    ax.set_xticklabels(["query", "key"], fontsize=_style.FONT_POINTS, color=_style.INK)
    ax.tick_params(length=0, labelbottom=False, labeltop=True, pad=8)
    ax.set_yticks([])
    _style.bare(ax)
    chosen = [] if query is None else [query]
    for names, x, side, first in ((names_q, -0.02, "right", chosen), (names_k, 1.02, "left", list(found))):
        places = _labelled(len(names), height, first)
        for position, text in zip(places, _style.labels(names, places), strict=True):
            bold = position in first
            if bold and side == "left":
                text += f"  {found[position]:.2f}"
            ax.text(
                x, (position + 0.5) / len(names), text, ha=side, va="center", fontsize=_style.FONT_POINTS,
                color=_style.VERMILION if bold and side == "right" else _style.INK,
                fontweight="bold" if bold else "normal", parse_math=False,
            )  # fmt: skip


def _labelled(count: int, height: float, first: list[int]) -> list[int]:
    """Which of `count` tokens are written in a column: those of `first`, and others while there is room."""
    places = _style.kept(count, height, _LINE)
    if len(places) == count:
        return list(places)
    room = _LINE * count / height
    chosen: list[int] = []
    for position in [*first, *places]:
        if all(abs(position - other) >= room for other in chosen):
            chosen.append(position)
    return chosen


def _draw(ax: Axes, pairs: Edges, queries: int, keys: int, gamma: float) -> None:
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgba

    top = float(pairs.weight.max(initial=0.0))
    seen = pairs.weight > _FAINTEST * top
    order = np.argsort(pairs.weight[seen], kind="stable")  # the strongest last, on top
    query, key, weight = (part[seen][order] for part in pairs)
    ends = np.zeros((len(weight), 2, 2))
    ends[:, 0, 1], ends[:, 1, 0], ends[:, 1, 1] = (
        (query + 0.5) / max(queries, 1),
        1,
        (key + 0.5) / max(keys, 1),
    )
    colours = np.tile(to_rgba(_style.BLUE), (len(weight), 1))
    colours[:, 3] = (weight / (top or 1.0)) ** gamma
    ax.add_collection(LineCollection(list(ends), colors=colours, linewidths=_THINNEST + _WIDEST * weight))
