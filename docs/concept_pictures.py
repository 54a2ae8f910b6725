"""Pictures of what attention is: of the pages under concepts/."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import fastattn as fa
from fastattn.nn import RotaryEmbedding, SinusoidalPositionalEncoding, alibi_slopes

__all__ = ["cost", "heads", "looking", "positions", "scale", "variants"]

BLACK, ORANGE, SKY, GREEN, BLUE, RED, PINK = (
    "#000000", "#e69f00", "#56b4e9", "#009e73", "#0072b2", "#d55e00", "#cc79a7",
)  # fmt: skip
GREY = "#8a8780"

# Where words might stand in two dimensions, one for how alive a thing is, one for how much of a place.
WORDS = {"animal": (2.4, 0.5), "street": (0.2, 2.3), "cross": (0.9, 1.6), "tired": (1.9, -0.7)}
IT = (1.9, 0.1)  # what "it" looks for


def looking() -> Figure:
    """A query among keys: the direction they share decides, and softmax makes weights of it."""
    keys = np.array(list(WORDS.values()), np.float32)
    query = np.array([IT], np.float32)
    _, weights = fa.attention(
        query[None, None], keys[None, None], keys[None, None], scale=1.0, return_weights=True
    )
    figure = Figure(figsize=(8.2, 3.2), layout="constrained")
    plane, bars = figure.subplots(1, 2, width_ratios=(1.1, 1))
    for (word, place), colour in zip(WORDS.items(), (BLUE, ORANGE, GREEN, PINK), strict=True):
        plane.annotate("", place, (0, 0), arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.6})
        plane.annotate(word, place, xytext=(6, 0), textcoords="offset points", color=colour, va="center")
    plane.annotate("", IT, (0, 0), arrowprops={"arrowstyle": "-|>", "color": BLACK, "lw": 2.6})
    plane.annotate('query of "it"', IT, xytext=(-14, -15), textcoords="offset points", weight="bold")
    plane.set(xlim=(-0.3, 3.3), ylim=(-1.1, 2.7), xlabel="one thing a word may be", ylabel="another")
    plane.set_title("keys point somewhere, and so does a query")
    bars.barh(list(WORDS), weights[0, 0, 0], color=(BLUE, ORANGE, GREEN, PINK))
    for row, weight in enumerate(weights[0, 0, 0]):
        bars.text(weight + 0.01, row, f"{weight:.2f}", va="center")
    bars.invert_yaxis()
    bars.set(xlim=(0, 1), xlabel="weight: adds up to 1")
    bars.set_title('how much "it" looks at each')
    return figure


def scale() -> Figure:
    """What softmax makes of 16 scores of random vectors, as these grow: without the scale one takes all."""
    rng = np.random.default_rng(3)
    figure = Figure(figsize=(8.2, 2.9), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for size, colour, marker in ((4, GREEN, "o"), (64, BLUE, "s"), (512, RED, "^")):
        query = rng.standard_normal((1, 1, 500, size), dtype=np.float32)
        key = rng.standard_normal((1, 1, 16, size), dtype=np.float32)
        for panel, factor in zip(panels, (1.0, None), strict=True):
            _, weights = fa.attention(query, key, key, scale=factor, return_weights=True)
            strongest_first = np.sort(weights[0, 0])[:, ::-1].mean(0)
            options = {"color": colour, "marker": marker, "markersize": 4}
            panel.plot(range(1, 17), strongest_first, label=f"{size} columns", **options)
    for panel, title in zip(panels, ("scores as they come", "scores over the root of D"), strict=True):
        panel.set(xlabel="keys, the strongest first", ylim=(0, 1.05), xticks=(1, 4, 8, 12, 16))
        panel.set_title(title)
    panels[0].set_ylabel("weight, the mean of 500 queries")
    panels[1].legend()
    return figure


def variants() -> Figure:
    """Five variants: where Q, K and V come from, and who sees whom."""
    rng = np.random.default_rng(5)
    x, other = rng.standard_normal((6, 16)), rng.standard_normal((8, 16))
    to_query, to_key = (rng.standard_normal((2, 16, 16)) / 3).round(2)
    query, key = x @ to_query, x @ to_key
    shown: tuple[tuple[str, str, np.ndarray, np.ndarray, dict[str, bool]], ...] = (
        ("K = V", "Q = X W, K = V = X", query, x, {}),
        ("self-attention", "Q, K, V: three maps of X", query, key, {}),
        ("masked", "the same, and no look ahead", query, key, {"causal": True}),
        ("cross-attention", "Q of X, K and V of another", query, other @ to_key, {}),
    )
    figure = Figure(figsize=(10.2, 2.45), layout="constrained")
    panels = figure.subplots(1, 5)
    for panel, (title, told, asked, keys, options) in zip(panels, shown, strict=False):
        _matrix(panel, _weights(asked, keys, **options))
        panel.set_title(title, weight="bold")
        panel.set_xlabel(told, fontsize=8)
    panels[0].set_ylabel("queries")
    _stack(panels[4], query, key)
    return figure


def _weights(query: np.ndarray, key: np.ndarray, **options: bool) -> np.ndarray:
    arrays = [np.ascontiguousarray(a[None, None], np.float32) for a in (query, key, key)]
    _, weights = fa.attention(*arrays, return_weights=True, **options)
    return weights[0, 0]


def _matrix(ax: Axes, weights: np.ndarray) -> None:
    shown = np.ma.masked_equal(weights, 0.0)
    ax.pcolormesh(shown, cmap="cividis", vmin=0, vmax=0.6, edgecolors="white", linewidth=0.8)
    ax.set(xticks=[], yticks=[], aspect="equal", ylim=(len(weights), 0), anchor="N")
    for spine in ax.spines.values():
        spine.set_visible(True)
        spine.set_color(GREY)


def _stack(ax: Axes, query: np.ndarray, key: np.ndarray) -> None:
    """Heads one behind the other, each over columns of its own."""
    ax.set(xticks=[], yticks=[], box_aspect=1, anchor="N")
    for spine in ax.spines.values():
        spine.set_visible(False)
    for head in range(4):
        start = 0.27 - 0.09 * head
        inset = ax.inset_axes((start, start, 0.7, 0.7))
        columns = slice(4 * head, 4 * head + 4)
        _matrix(inset, _weights(query[:, columns], key[:, columns]))
    ax.set_title("multi-head", weight="bold")
    ax.set_xlabel("each head its own columns", fontsize=8)


def heads() -> Figure:
    """Eight query heads on eight, two and one heads of keys and values."""
    figure = Figure(figsize=(8.2, 2.1), layout="constrained")
    titles = {8: "multi-head: 8 on 8", 2: "grouped: 8 on 2", 1: "multi-query: 8 on 1"}
    for panel, (count, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        places = (np.arange(count) + 0.5) * 8 / count - 0.5
        for head in range(8):
            panel.plot((head, places[head // (8 // count)]), (1, 0), color=GREY, linewidth=1, zorder=0)
        panel.scatter(range(8), np.ones(8), s=130, color=BLUE, marker="o")
        panel.scatter(places, np.zeros(count), s=130, color=ORANGE, marker="s")
        panel.set(xlim=(-0.8, 7.8), ylim=(-0.45, 1.35))
        panel.set_axis_off()
        panel.set_title(title)
        panel.text(-0.6, 1.22, "query heads", fontsize=8, color=BLUE)
        panel.text(-0.6, -0.38, "heads of keys and values", fontsize=8, color="#9a6a00")
    return figure


def positions() -> Figure:
    """Three ways to tell an order: added, turned, subtracted."""
    figure = Figure(figsize=(9.4, 3.0), layout="constrained")
    added, turned, subtracted = figure.subplots(1, 3)
    encoding = SinusoidalPositionalEncoding(64)(torch.zeros(1, 100, 64))[0].numpy()
    image = added.imshow(encoding, cmap="cividis", aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=added, shrink=0.8)
    added.set(xlabel="column", ylabel="position")
    added.set_title("sinusoidal: added to X")

    one = torch.ones(1, 1, 1, 64)
    query, keys = RotaryEmbedding(64)(one.repeat(1, 1, 257, 1), one.repeat(1, 1, 257, 1))
    scores = (query[0, 0, 256] @ keys[0, 0].T).flip(0) / 64
    turned.plot(range(257), scores, color=BLUE, linewidth=1.4)
    turned.axhline(0, color=GREY, linewidth=0.6)
    turned.set(xlabel="distance from query to key", ylabel="score, of 1 at distance 0")
    turned.set_title("RoPE: query and key are turned")

    distance = np.arange(257)
    for slope in alibi_slopes(8).tolist():
        subtracted.plot(distance, -slope * distance, color=RED, linewidth=1.1)
    subtracted.text(256, 0.5, "last head", ha="right", fontsize=8)  # whose line is the topmost
    subtracted.text(68, -38, "first head", ha="right", fontsize=8)
    subtracted.set(xlabel="distance from query to key", ylabel="added to the score", ylim=(-40, 3))
    subtracted.set_title("ALiBi: distance is subtracted")
    return figure


def cost() -> Figure:
    """Work and memory of one layer of 512 columns over length, counted, not measured."""
    width, heads = 512, 8
    lengths = 2.0 ** np.arange(4, 17)
    attention = 8 * lengths * width**2 + 4 * lengths**2 * width
    masked = 8 * lengths * width**2 + 2 * lengths**2 * width
    lstm = 16 * lengths * width**2
    figure = Figure(figsize=(8.8, 3.3), layout="constrained")
    work, memory = figure.subplots(1, 2)
    for values, label, colour, dash in (
        (attention, "self-attention", RED, "-"), (masked, "masked self-attention", ORANGE, "--"),
        (lstm, "LSTM", BLUE, "-."),
    ):  # fmt: skip
        work.plot(lengths, values / 1e9, dash, color=colour, label=label)
    work.axvline(2 * width, color=GREY, linewidth=0.8)
    work.text(2 * width * 1.1, 0.06, "2 x width", fontsize=8, color="#5c5a55")
    work.set(xscale="log", yscale="log", xlabel="length", ylabel="GFLOP, one layer, forward")
    work.set_title("the square meets the line")
    work.legend(fontsize=8)
    memory.plot(lengths, 4 * heads * lengths**2 / 2**20, color=RED, label="scores as a matrix")
    memory.plot(
        lengths, 4 * 4 * lengths * width / 2**20, "--", color=GREEN,
        label="Q, K, V and the output:\nwhat fused kernels keep",
    )  # fmt: skip
    memory.set(xscale="log", yscale="log", xlabel="length", ylabel="MiB, float32, 8 heads")
    memory.set_title("what has to be in memory")
    memory.legend(fontsize=8)
    for panel in (work, memory):
        panel.set_xticks(lengths[::3], [f"{int(x):,}" for x in lengths[::3]])
        panel.minorticks_off()
        panel.grid(color="#e6e6e6", linewidth=0.6)
    return figure
