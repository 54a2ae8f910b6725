"""Pictures of attention weights. Needs matplotlib: ``pip install 'fastattn[viz]'``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastattn.viz.recording import Layer, Recording, record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

__all__ = ["Layer", "Recording", "plot_attention", "plot_heads", "record"]

Weights: TypeAlias = Any  # numpy.ndarray or torch.Tensor; torch is not imported for an annotation
FloatArray: TypeAlias = NDArray[np.float64]

# One row of text at this font size, with the air it needs: what makes every token legible.
_INCHES_PER_TOKEN = 0.27
_FONT_POINTS = 9.0
_COLOURS = ("#f7f5f0", "#f2c57c", "#e07a3f", "#a32a4c", "#3b0f45")  # paper to plum, darker = more
# Attention is often a few large weights over many small ones; the square root keeps the small ones visible.
_GAMMA = 0.5


def plot_attention(
    weights: Weights,
    tokens_q: Sequence[str],
    tokens_k: Sequence[str] | None = None,
    *,
    ax: Axes | None = None,
    title: str | None = None,
) -> Axes:
    """Draw one attention matrix, a row a query, with the tokens on both axes.

    Parameters
    ----------
    weights : numpy.ndarray or torch.Tensor
        (Lq, Lk) probabilities, such as one head of ``attention(..., return_weights=True)``.
    tokens_q : sequence of str
        The Lq queries. Marks that tokenizers put for a space are not shown.
    tokens_k : sequence of str, optional
        The Lk keys; the queries by default.
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure large enough to read every token by default.
    title : str, optional
        Written above.

    Returns
    -------
    matplotlib.axes.Axes
        Save the picture with ``.figure.savefig(path)``.

    Raises
    ------
    ImportError
        Without matplotlib.
    ValueError
        Where the shapes do not fit.
    """
    plt = _pyplot()
    tokens_k = tokens_q if tokens_k is None else tokens_k
    matrix = _matrix(weights, 2, tokens_q, tokens_k)
    if ax is None:
        width = max(4.0, 1.6 + _INCHES_PER_TOKEN * len(tokens_k))
        height = max(3.4, 1.4 + _INCHES_PER_TOKEN * len(tokens_q))
        _, ax = plt.subplots(figsize=(width, height), dpi=160, layout="constrained")
    image = _draw(ax, matrix)
    _name_queries(ax, tokens_q)
    _name_keys(ax, tokens_k)
    ax.tick_params(length=0, labelsize=_FONT_POINTS, labeltop=True, labelbottom=False, pad=2)
    ax.set_ylabel("query")
    ax.set_xlabel("key")
    ax.xaxis.set_label_position("bottom")
    if title is not None:
        ax.set_title(title, loc="left", fontweight="bold", pad=10)
    _colour_bar(image, ax)
    return ax


def plot_heads(
    weights: Weights,
    tokens_q: Sequence[str],
    tokens_k: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    title: str | None = None,
) -> Figure:
    """Draw every head of one layer as a small picture in a grid, on one scale of colours.

    Parameters
    ----------
    weights : numpy.ndarray or torch.Tensor
        (H, Lq, Lk) probabilities.
    tokens_q : sequence of str
        The Lq queries.
    tokens_k : sequence of str, optional
        The Lk keys; the queries by default.
    columns : int, optional
        Pictures in a row; as square a grid as H allows by default.
    title : str, optional
        Written above the grid.

    Returns
    -------
    matplotlib.figure.Figure
        One axes a head. The outermost pictures carry the tokens.

    Raises
    ------
    ImportError
        Without matplotlib.
    ValueError
        Where the shapes do not fit, or there is no head.
    """
    tokens_k = tokens_q if tokens_k is None else tokens_k
    heads = _matrix(weights, 3, tokens_q, tokens_k)
    if not len(heads):
        raise ValueError("weights: expected at least one head, got 0")
    figure, grid = _grid(len(heads), columns, len(tokens_q), len(tokens_k))
    top = float(heads.max(initial=0.0))
    for head, (axes, matrix) in enumerate(zip(grid.flat, heads, strict=False)):
        image = _draw(axes, matrix, top)
        axes.set_title(f"head {head}", fontsize=_FONT_POINTS, pad=3)
        axes.tick_params(length=0, labelsize=0.6 * _FONT_POINTS, pad=1, labelbottom=False)
    for axes in grid[:, 0]:
        _name_queries(axes, tokens_q)
    columns = grid.shape[1]
    for column in range(columns):
        lowest = grid[(len(heads) - 1 - column) // columns, column]
        _name_keys(lowest, tokens_k)
        lowest.tick_params(labelbottom=True)
    if title is not None:
        figure.suptitle(title, fontweight="bold")
    _colour_bar(image, grid.ravel().tolist())
    return figure


def _pyplot() -> Any:
    """matplotlib.pyplot, imported when a picture is asked for."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("fastattn.viz needs matplotlib: pip install 'fastattn[viz]'") from error
    return plt


def _matrix(weights: Weights, ndim: int, tokens_q: Sequence[str], tokens_k: Sequence[str]) -> FloatArray:
    """`weights` as float64, once their shape is the one that the tokens say."""
    if hasattr(weights, "detach"):  # torch, whose bfloat16 NumPy does not know
        weights = weights.detach().double().cpu().numpy()
    matrix = np.asarray(weights).astype(np.float64)
    expected = (len(tokens_q), len(tokens_k))
    if matrix.ndim != ndim or matrix.shape[-2:] != expected:
        head = "(heads, " if ndim == 3 else "("
        raise ValueError(
            f"weights: expected shape {head}{expected[0]}, {expected[1]}) for {expected[0]} queries and "
            f"{expected[1]} keys, got {matrix.shape}"
        )
    return matrix


def _grid(heads: int, columns: int | None, queries: int, keys: int) -> tuple[Figure, NDArray[Any]]:
    """Return a figure with room for `heads` small pictures, and its axes by row and column."""
    plt = _pyplot()
    columns = columns or math.ceil(math.sqrt(heads))
    rows = math.ceil(heads / columns)
    inches = 0.6 * _INCHES_PER_TOKEN  # of a single picture's, as is the font
    size = (0.9 + columns * (0.2 + inches * keys), 0.9 + rows * (0.3 + inches * queries))
    figure, grid = plt.subplots(
        rows, columns, figsize=size, dpi=160, layout="constrained", squeeze=False, sharex=True, sharey=True
    )
    for axes in grid.flat[heads:]:
        axes.set_visible(False)
    return figure, grid


def _draw(ax: Axes, matrix: FloatArray, top: float | None = None) -> AxesImage:
    """Colour the cells of `matrix`, from 0 to `top`, with a hairline of paper between them."""
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    colours = LinearSegmentedColormap.from_list("fastattn", _COLOURS)
    top = float(matrix.max(initial=0.0)) if top is None else top
    image = ax.imshow(matrix, cmap=colours, norm=PowerNorm(_GAMMA, 0.0, top or 1.0), interpolation="nearest")
    ax.set_xticks(np.arange(0.5, matrix.shape[1] - 1), minor=True)
    ax.set_yticks(np.arange(0.5, matrix.shape[0] - 1), minor=True)
    ax.grid(which="minor", color="white", linewidth=0.6)
    ax.tick_params(which="minor", length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return image


def _name_queries(ax: Axes, tokens: Sequence[str]) -> None:
    ax.set_yticks(range(len(tokens)), [_label(token) for token in tokens])


def _name_keys(ax: Axes, tokens: Sequence[str]) -> None:
    ax.set_xticks(range(len(tokens)), [_label(token) for token in tokens], rotation=90)


def _colour_bar(image: AxesImage, where: Any) -> None:
    """Say beside `where` which colour is which weight."""
    axes = where if not isinstance(where, list) else where[0]
    bar = axes.figure.colorbar(image, ax=where, shrink=0.5, aspect=18, pad=0.02)
    bar.set_label("attention weight")
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=2, labelsize=_FONT_POINTS)


def _label(token: str) -> str:
    """`token` without the marks of byte-pair and SentencePiece tokenizers."""
    text = token.replace("Ġ", "").replace("▁", "").replace("Ċ", "↵").replace("\n", "↵").strip()
    # matplotlib reads a pair of dollars as mathematics.
    return text.replace("$", r"\$") or "␣"
