"""Mass: how much attention each key receives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fastattn.viz import _arrays, _style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fastattn.viz._arrays import ArrayLike, FloatArray, Head

_LEGEND = "attention received\n(sum over queries)"
_WIDTH = 8.0  # inches
_MOST_BARS = 800
_LETTER = 0.602  # width of a letter of DejaVu Sans Mono, of its size
_LINE = 0.24  # inches from line to line of shaded text
_MOST_LINES = 400


def mass(
    key_mass: ArrayLike,
    tokens: Sequence[str] | None = None,
    *,
    head: Head = "mean",
    style: Literal["bars", "text"] = "bars",
    title: str | None = None,
) -> Figure:
    """Draw which keys are looked at: the attention that each receives, over a text of any length.

    Parameters
    ----------
    key_mass : numpy.ndarray or torch.Tensor
        Attention received by each key, summed over queries: (Lk,), (H, Lk) or (1, H, Lk), such as the
        `key_mass` of ``fastattn.insight``, or weights summed over their queries.
    tokens : sequence of str, optional
        The Lk keys; their positions by default.
    head : int or "mean"
        One head, or the average of all.
    style : "bars" or "text"
        A bar a key, or the text itself, shaded. In a text, those tokens are set apart that begin with a space
        or the mark of a tokenizer for it; if none does, all but those that begin with ``##``.
    title : str, optional
        Written above.

    Returns
    -------
    matplotlib.figure.Figure
        Beyond 800 keys a bar stands for several and is as high as the highest of them; the axis says so.

    Raises
    ------
    ImportError
        Without matplotlib.
    TypeError
        Where an argument is no array, no sequence of strings or no head.
    ValueError
        Where shapes do not fit, numbers are negative, there is no such style, or a text fills more than 400
        lines.
    """
    received = _arrays.one_head("key_mass", _arrays.with_heads("key_mass", key_mass, "keys"), head)
    names = _arrays.check_tokens("tokens", tokens, len(received))
    if style == "bars":
        return _bars(received, names, tokens is not None, title)
    if style == "text":
        return _text(received, names, title)
    raise ValueError(f"style: expected 'bars' or 'text', got {style!r}")


def _bars(received: FloatArray, names: list[str], named: bool, title: str | None) -> Figure:
    width = _style.inches(len(names), least=3.0)
    figure = _style.new_figure(width + 1.0, 3.2)
    ax = figure.add_subplot()
    pooled, _, step = _arrays.pooled(received[None], _MOST_BARS)
    edges = np.minimum(np.arange(pooled.shape[1] + 1) * step, len(names)) - 0.5
    gap = 0.15 if len(names) * _style.INCHES_PER_TOKEN <= _style.MOST_INCHES else 0.0
    ax.bar(edges[:-1], pooled[0], np.diff(edges) * (1 - gap), align="edge", color=_style.BLUE)
    ax.set_xlim(-0.6, len(names) - 0.4)
    _style.name_tokens(ax.xaxis, names, width)
    ax.set_xlabel("key" if named else "position of the key", fontsize=_style.FONT_POINTS)
    ax.set_ylabel(
        _LEGEND if step == 1 else f"attention received\n(highest of {step} keys)",
        fontsize=_style.FONT_POINTS,
    )
    ax.tick_params(axis="y", labelsize=_style.FONT_POINTS)
    _style.bare(ax, "top", "right")
    _style.write_title(ax, title)
    return figure


def _text(received: FloatArray, names: list[str], title: str | None) -> Figure:
    from matplotlib.cm import ScalarMappable

    letters = int(_WIDTH * 72 / (_LETTER * _style.FONT_POINTS))
    places = _set(names, letters)
    lines = 1 + max((line for line, _, _ in places), default=0)
    if lines > _MOST_LINES:
        raise ValueError(
            f"tokens: they fill {lines} lines, and a picture has {_MOST_LINES}; style='bars' takes any"
        )
    figure = _style.new_figure(_WIDTH + 0.2, lines * _LINE + 0.9)
    ax = figure.add_subplot()
    ax.set(xlim=(0, letters), ylim=(lines, 0))
    ax.set_axis_off()
    colours = ScalarMappable(_style.norm(float(received.max(initial=0.0))), _style.COLOUR_MAP)
    for (line, start, text), weight in zip(places, received, strict=True):
        _write_shaded(ax, line, start, text, colours.to_rgba(weight))
    _style.write_title(ax, title)
    _style.colour_bar(colours, ax, _LEGEND.replace("\n", " "), "bottom")
    return figure


def _set(names: list[str], letters: int) -> list[tuple[int, int, str]]:
    """Line, column and text of each token, in lines of `letters` letters."""
    marked = any(name.startswith(("Ġ", "▁", " ")) for name in names)
    places, line, column = [], 0, 0
    for name in names:
        text = _style.shown(name) or ("↵" if "\n" in name else "␣")
        apart = name.startswith(("Ġ", "▁", " ")) if marked else not name.startswith("##")
        start = column + (apart and column > 0)
        if start + len(text) > letters:
            line, start = line + 1, 0
        places.append((line, start, text))
        column = start + len(text)
        if "\n" in name or "Ċ" in name:
            line, column = line + 1, 0
    return places


def _write_shaded(ax: Axes, line: int, start: int, text: str, colour: Any) -> None:
    """Write one token on its colour; in white where that is dark."""
    from matplotlib.patches import Rectangle

    ax.add_patch(Rectangle((start, line + 0.06), len(text), 0.88, facecolor=colour, edgecolor="none"))
    dark = float(np.dot(colour[:3], _style.LUMA)) < 0.45
    ax.text(
        start, line + 0.5, text, va="center_baseline", fontfamily="DejaVu Sans Mono",
        fontsize=_style.FONT_POINTS, color="white" if dark else _style.INK, parse_math=False,
    )  # fmt: skip
