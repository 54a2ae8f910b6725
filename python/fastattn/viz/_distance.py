"""Distance: how far away, in tokens, the keys are that a head attends to."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastattn.viz import _arrays, _style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fastattn.viz._arrays import ArrayLike, FloatArray


def distance(
    weights_or_mass: ArrayLike,
    *,
    distances: Sequence[int] | None = None,
    query_offset: int | None = None,
    title: str | None = None,
) -> Figure:
    """Draw attention against distance, a row a head: how far each head looks.

    Parameters
    ----------
    weights_or_mass : numpy.ndarray, torch.Tensor or fastattn.Insight
        Probabilities (Lq, Lk), (H, Lq, Lk) or (1, H, Lq, Lk). With `distances`: what ``fastattn.insight``
        with the same `distances` returns, or its `distance_mass` (H, bins) or (1, H, bins).
    distances : sequence of int, optional
        Rising edges of the bins of what is given, as for ``fastattn.insight``: distances below the first,
        from the first to below the second, ..., from the last on. Keys behind a query have negative ones.
    query_offset : int, optional
        Position of the first query among the keys, if weights are given; Lk - Lq by default, as ever.
    title : str, optional
        Written above.

    Returns
    -------
    matplotlib.figure.Figure
        Rows are heads, columns are bins: of the distances ``abs(query_offset + i - j)`` 0, 1, 2 to 3, 4 to 7
        and so on, or as `distances` says. Colours, and the numbers in the cells, are shares of all attention
        of the head, in per cent.

    Raises
    ------
    ImportError
        Without matplotlib.
    TypeError
        Where an argument is no array.
    ValueError
        Where shapes do not fit, numbers are negative, or `distances` do not rise.
    """
    if distances is None:
        heads = _arrays.with_heads("weights", weights_or_mass, "queries, keys")
        bounds = _doubling(heads.shape[1], heads.shape[2], query_offset)
        binned = _binned(heads, bounds, query_offset)
        names = [_between(start, end) for start, end in itertools.pairwise([0, *bounds])]
    else:
        bounds = [operator.index(edge) for edge in distances]
        if not bounds or any(later <= edge for edge, later in itertools.pairwise(bounds)):
            raise ValueError(f"distances: expected rising integers, at least one, got {bounds}")
        given = getattr(weights_or_mass, "distance_mass", weights_or_mass)
        if given is None:
            raise ValueError("distance_mass: there is none; insight takes the same distances as this picture")
        binned = _arrays.with_heads("distance_mass", given, "bins")
        if binned.shape[1] != len(bounds) + 1:
            wanted = f"{len(bounds) + 1} bins for {len(bounds)} edges"
            raise ValueError(f"distance_mass: expected {wanted}, got {binned.shape[1]}")
        names = [f"< {bounds[0]}", *(_between(start, end) for start, end in itertools.pairwise(bounds))]
    total = binned.sum(axis=1, keepdims=True)
    shares = np.divide(100 * binned, total, out=np.zeros_like(binned), where=total > 0)
    return _draw(shares, [*names, f"≥ {bounds[-1]}"], title)


def _first(queries: int, keys: int, query_offset: int | None) -> int:
    return keys - queries if query_offset is None else query_offset


def _doubling(queries: int, keys: int, query_offset: int | None) -> list[int]:
    """1, 2, 4, ... up to the longest distance."""
    first = _first(queries, keys, query_offset)
    longest = max(abs(first + queries - 1), abs(first - keys + 1), 1)
    return [2**power for power in range(longest.bit_length())]


def _binned(heads: FloatArray, bounds: list[int], query_offset: int | None) -> FloatArray:
    """Weights of (heads, queries, keys) added up by distance: (heads, bins)."""
    _, queries, keys = heads.shape
    places = _first(queries, keys, query_offset) + np.arange(queries)[:, None] - np.arange(keys)
    bins = np.searchsorted(bounds, np.abs(places), side="right").ravel()
    sums = [np.bincount(bins, head.ravel(), len(bounds) + 1) for head in heads]
    return np.stack(sums).astype(np.float64)


def _draw(shares: FloatArray, names: list[str], title: str | None) -> Figure:
    heads, bins = shares.shape
    width, height = max(2.4, 0.52 * bins), _style.inches(heads, least=0.6)
    figure = _style.new_figure(max(3.4, width + 1.0), height + 1.4)
    ax = figure.add_subplot()
    top = float(shares.max(initial=0.0))
    image = _style.paint(ax, shares, top)
    for head, place in np.ndindex(*shares.shape):
        dark = shares[head, place] > 0.3 * top
        ax.text(
            place, head, f"{shares[head, place]:.0f}", ha="center", va="center",
            fontsize=_style.FONT_POINTS - 2, color="white" if dark else _style.INK,
        )  # fmt: skip
    _style.name_tokens(ax.yaxis, [str(head) for head in range(heads)], height)
    ax.set_xticks(range(bins), names, rotation=0 if bins <= 8 else 45, ha="center" if bins <= 8 else "right")
    ax.tick_params(length=0, labelsize=_style.FONT_POINTS)
    ax.set_xlabel("distance from query to key, in tokens", fontsize=_style.FONT_POINTS)
    ax.set_ylabel("head", fontsize=_style.FONT_POINTS)
    _style.write_title(ax, title)
    # Below, where the label has room: few heads are no higher than a word or two.
    _style.colour_bar(image, ax, "share of the head's attention, %", "bottom")
    return figure


def _between(start: int, end: int) -> str:
    """Name the distances from `start` to below `end`."""
    if end - start == 1:
        return str(start)
    return f"{start}–{end - 1}" if start >= 0 else f"{start} to {end - 1}"
