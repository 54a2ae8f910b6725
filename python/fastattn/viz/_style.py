"""How every picture looks: figures, colours, labels. The one file that asks for matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

# One row of text at this font size, with the air it needs: what makes every token legible.
INCHES_PER_TOKEN = 0.27
FONT_POINTS = 9.0
DPI = 160.0
LINE_INCHES = 0.19  # the least that keeps two labels apart
# A side of a picture that names all its tokens, and of one that cannot and thins them out.
MOST_INCHES, THINNED_INCHES = 60 * INCHES_PER_TOKEN, 9.0
# Lightness falls all the way from paper to ink, so that all eyes, and a grey print, see the same order.
COLOUR_MAP = "YlGnBu"
LUMA = (0.299, 0.587, 0.114)  # brightness of red, green and blue: Rec. ITU-R BT.601
# Blue and vermilion of Okabe and Ito, "Color Universal Design", 2008.
BLUE, VERMILION = "#0072B2", "#D55E00"
INK = "#222222"
# Attention is often a few large weights over many small ones; the square root keeps the small ones visible.
_GAMMA = 0.5
_MARKS_APART = 0.25  # of a bar of colours, the least between two of its numbers
_LONGEST_LABEL = 20


def new_figure(width: float, height: float) -> Figure:
    """Return a figure in inches that belongs to the caller alone: pyplot does not hear of it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("fastattn.viz needs matplotlib: pip install 'fastattn[viz]'") from error
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def figure_of(ax: Axes) -> Figure:
    """Return the figure that `ax` is in, at the top."""
    figure: Figure = ax.get_figure(root=True)  # type: ignore[assignment]
    return figure


def inches(tokens: int, each: float = INCHES_PER_TOKEN, least: float = 1.2) -> float:
    """Length of a side with so many tokens."""
    return max(least, each * tokens) if each * tokens <= MOST_INCHES else THINNED_INCHES


def shown(token: str) -> str:
    """Return `token` as a reader knows it, in one line: without marks that tokenizers put for a space."""
    text = token.replace("Ġ", "").replace("▁", "").replace("Ċ", "↵").replace("\n", "↵").strip()
    text = "".join(letter if letter.isprintable() else "·" for letter in text)
    return text if len(text) <= _LONGEST_LABEL else text[: _LONGEST_LABEL - 1] + "…"


def label(token: str) -> str:
    """`token` as a label of an axis, where a blank would look like none."""
    return shown(token) or "␣"


def kept(count: int, room: float, each: float) -> range:
    """Every how many of `count` labels, `each` inches high, have place in `room` inches: a round step."""
    step = math.ceil(count * each / room - 1e-9) if count else 1
    if step > 1:
        magnitude = 10 ** math.floor(math.log10(step))
        step = next(nice * magnitude for nice in (1, 2, 5, 10) if nice * magnitude >= step)
    return range(0, count, max(1, step))


def labels(tokens: Sequence[str], places: Sequence[int]) -> list[str]:
    """Labels of the `tokens` at some `places`; with their positions if these are not all, nor the tokens."""
    numbered = len(places) < len(tokens) and list(tokens) != [str(place) for place in range(len(tokens))]
    return [f"{place}: {label(tokens[place])}" if numbered else label(tokens[place]) for place in places]


def name_tokens(axis: Any, tokens: Sequence[str], room: float, size: float = FONT_POINTS) -> None:
    """Write `tokens` along an axis `room` inches long: all, or with their positions every so many."""
    places = kept(len(tokens), room, size / FONT_POINTS * LINE_INCHES)
    # A token with two dollars is no mathematics.
    axis.set_ticks(list(places), labels(tokens, places), parse_math=False)
    if axis.axis_name == "x":
        axis.set_tick_params(labelrotation=90)
    axis.set_tick_params(length=0, labelsize=size, pad=2)


def norm(top: float) -> Any:
    """Colours from 0 to `top`, with more of them for the small weights."""
    from matplotlib.colors import PowerNorm

    return PowerNorm(_GAMMA, 0.0, top or 1.0)


def paint(ax: Axes, matrix: Any, top: float) -> AxesImage:
    """Colour the cells of `matrix`, from 0 to `top`; a hairline parts them where they are few."""
    image = ax.imshow(matrix, cmap=COLOUR_MAP, norm=norm(top), interpolation="nearest", aspect="auto")
    rows, columns = matrix.shape
    if max(rows, columns) <= MOST_INCHES / INCHES_PER_TOKEN:
        ax.set_xticks(np.arange(0.5, columns - 1), minor=True)
        ax.set_yticks(np.arange(0.5, rows - 1), minor=True)
        ax.grid(which="minor", color="white", linewidth=0.6)
        ax.tick_params(which="minor", length=0)
    bare(ax)
    return image


def bare(ax: Axes, *sides: str) -> None:
    """Take the frame of `ax` away, or the `sides` of it that are named."""
    for name, spine in ax.spines.items():
        if not sides or name in sides:
            spine.set_visible(False)


def colour_bar(mappable: Any, axes: Any, text: str, side: str = "right") -> None:
    """Say beside or below `axes`, one or several, which colour is which number."""
    from matplotlib.colors import PowerNorm

    figure = figure_of(axes[0] if isinstance(axes, list) else axes)
    aspect, pad = (18, 0.02) if side == "right" else (40, 0.04)
    bar = figure.colorbar(mappable, ax=axes, location=side, shrink=0.6, aspect=aspect, pad=pad)
    if isinstance(mappable.norm, PowerNorm) and (top := mappable.norm.vmax):
        marks = _marks(top)  # matplotlib's are in equal steps, which crowd at the upper end
        bar.set_ticks(marks, labels=[f"{mark:g}" for mark in marks])
    bar.set_label(text, fontsize=FONT_POINTS)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=2, labelsize=FONT_POINTS)


def _marks(top: float) -> list[float]:
    """0, the highest number of one digit up to `top`, and round ones that `norm` sets apart from these."""
    first = math.floor(math.log10(top))
    marks: list[float] = []
    last = 1 + _MARKS_APART
    for power, digit in product(range(first, first - 3, -1), range(9, 0, -1)):
        mark = float(f"{digit}e{power}")
        place = (mark / top) ** _GAMMA
        round_enough = digit <= 5 or not marks
        if round_enough and _MARKS_APART <= place <= last - _MARKS_APART:
            marks.append(mark)
            last = place
    return [0.0, *reversed(marks)]


def write_title(ax: Axes, title: str | None, *, alone: bool = True) -> None:
    """Write `title` over the figure of `ax`, which grows by it; over `ax` if that is not `alone` there."""
    if title is None:
        return
    # Dollars are dollars.
    looks: dict[str, Any] = {"fontweight": "bold", "fontsize": FONT_POINTS + 2, "parse_math": False}
    if not alone:
        ax.set_title(title, loc="left", pad=10, **looks)
        return
    # Over `ax` a long title would run out of the figure, and the layout would narrow `ax` for it.
    figure = figure_of(ax)
    text = figure.suptitle(title, x=0.01, ha="left", wrap=True, **looks)
    figure.set_figheight(figure.get_figheight() + text.get_window_extent().height / figure.dpi + 0.1)
