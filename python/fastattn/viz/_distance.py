"""Distance: how far away, in tokens, the keys are that a head attends to."""

from __future__ import annotations

import itertools
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
    edges: Sequence[float] | None = None,
    query_offset: int | None = None,
    title: str | None = None,
) -> Figure:
    """Draw attention against distance, a row a head: how far each head looks.

    Parameters
    ----------
    weights_or_mass : numpy.ndarray, torch.Tensor or fastattn.Insight
        Probabilities (Lq, Lk), (H, Lq, Lk) or (1, H, Lq, Lk). With `edges`: the mass in each bin of
        distances, (bins,), (H, bins) or (1, H, bins), or what ``fastattn.insight(..., distances=edges)``
        returns.
    edges : increasing sequence of numbers, optional
        Where bins begin, but for the first, which begins at 0: ``len(edges) + 1`` bins. By default 1, 2, 4,
        8, ... to the longest distance.
    query_offset : int, optional
        Position of the first query among the keys, if weights are given; Lk - Lq by default, as ever.
    title : str, optional
        Written above.

    Returns
    -------
    matplotlib.figure.Figure
        Rows are heads, columns are bins of ``abs(query_offset + i - j)``, doubling by default. Colours, and
        numbers in the cells, are shares of all attention of the head, in per cent.

    Raises
    ------
    ImportError
        Without matplotlib.
    TypeError
        Where an argument is no array.
    ValueError
        Where shapes do not fit, numbers are negative, or edges do not increase.
    """
    if edges is None:
        heads = _arrays.with_heads("weights", weights_or_mass, "queries, keys")
        bounds = _doubling(heads.shape[1], heads.shape[2], query_offset)
        binned = _binned(heads, bounds, query_offset)
    else:
        bounds = np.asarray(edges, dtype=np.float64)
        if bounds.ndim != 1 or (np.diff(bounds) <= 0).any() or (bounds <= 0).any():
            raise ValueError(f"edges: expected increasing numbers above 0, got {list(edges)}")
        given = getattr(weights_or_mass, "distance_mass", weights_or_mass)
        binned = _arrays.with_heads("mass", given, "bins")
        if binned.shape[1] != len(bounds) + 1:
            raise ValueError(
                f"mass: expected {len(bounds) + 1} bins for {len(bounds)} edges, got {binned.shape[1]}"
            )
    total = binned.sum(axis=1, keepdims=True)
    return _draw(np.divide(100 * binned, total, out=np.zeros_like(binned), where=total > 0), bounds, title)


def _first(queries: int, keys: int, query_offset: int | None) -> int:
    return keys - queries if query_offset is None else query_offset


def _doubling(queries: int, keys: int, query_offset: int | None) -> FloatArray:
    """1, 2, 4, ... up to the longest distance."""
    first = _first(queries, keys, query_offset)
    longest = max(abs(first + queries - 1), abs(first - keys + 1), 1)
    return np.exp2(np.arange(int(np.log2(longest)) + 1, dtype=np.float64))


def _binned(heads: FloatArray, bounds: FloatArray, query_offset: int | None) -> FloatArray:
    """Weights of (heads, queries, keys) added up by distance: (heads, bins)."""
    _, queries, keys = heads.shape
    places = _first(queries, keys, query_offset) + np.arange(queries)[:, None] - np.arange(keys)
    bins = np.searchsorted(bounds, np.abs(places), side="right").ravel()
    sums = [np.bincount(bins, head.ravel(), len(bounds) + 1) for head in heads]
    return np.stack(sums).astype(np.float64)


def _draw(shares: FloatArray, bounds: FloatArray, title: str | None) -> Figure:
    heads, bins = shares.shape
    width, height = max(2.4, 0.52 * bins), _style.inches(heads, least=0.6)
    figure = _style.new_figure(width + 1.9, height + 1.2)
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
    ax.set_xticks(
        range(bins), _names(bounds), rotation=0 if bins <= 8 else 45, ha="center" if bins <= 8 else "right"
    )
    ax.tick_params(length=0, labelsize=_style.FONT_POINTS)
    ax.set_xlabel("distance from query to key, in tokens", fontsize=_style.FONT_POINTS)
    ax.set_ylabel("head", fontsize=_style.FONT_POINTS)
    _style.write_title(ax, title)
    _style.colour_bar(image, ax, "share of the head's attention, %")
    return figure


def _names(bounds: FloatArray) -> list[str]:
    """Names of the bins: "0", "1", "2–3", ..., "64–"; bounds that are no integers as they are."""
    starts = [0.0, *bounds]
    names = []
    for start, end in itertools.pairwise(starts):
        whole = float(start).is_integer() and float(end).is_integer()
        if whole:
            names.append(f"{start:.0f}" if end - start == 1 else f"{start:.0f}–{end - 1:.0f}")
        else:
            names.append(f"{start:g} to {end:g}")
    return [*names, f"{starts[-1]:g}–"]
