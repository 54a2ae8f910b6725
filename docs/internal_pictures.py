"""Pictures of how it is computed: of the pages under internals/."""

from __future__ import annotations

import numpy as np
from concept_pictures import BLACK, BLUE, GREEN, GREY, ORANGE, RED, SKY
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Patch, Rectangle

__all__ = ["backward", "call", "decode", "online", "schedule", "tiles"]


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """Axes in which one unit is a tenth of an inch."""
    figure = Figure(figsize=(width, height))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, 10 * width), ylim=(0, 10 * height))
    ax.set_axis_off()
    return figure, ax


def _box(
    ax: Axes, x: float, y: float, w: float, h: float, text: str, colour: str = GREY, size: float = 9
) -> None:
    """A box by its lower left corner, its text in the middle."""
    shape = "round,pad=0,rounding_size=1"
    ax.add_patch(
        FancyBboxPatch((x, y), w, h, shape, facecolor=colour + "22", edgecolor=colour, linewidth=1.2)
    )
    ax.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=size)


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
    ax.annotate(
        "",
        end,
        start,
        arrowprops={"arrowstyle": "-|>", "color": "#555", "lw": 1.1, "shrinkA": 0, "shrinkB": 0},
    )
    if text:
        x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        ax.text(x, y + 0.9, text, ha="center", va="bottom", fontsize=8, color="#555")


def call() -> Figure:
    """A call from top to bottom, and the short way past the middle."""
    figure, ax = _canvas(8.6, 2.2)
    steps = (
        ("attention()", "what was asked", BLUE), ("AttentionProblem", "what it means", BLUE),
        ("dispatch", "who can do it", BLUE), ("backend", "memory and threads", ORANGE),
        ("KernelTable", "which instructions", GREEN), ("kernel", "the numbers", GREEN),
    )  # fmt: skip
    for place, (name, told, colour) in enumerate(steps):
        x = 1 + 14.2 * place
        _box(ax, x, 10, 12, 6, f"{name}\n", colour, 8.5)
        ax.text(x + 6, 11.6, told, ha="center", fontsize=7.5, color="#555")
        if place:
            _arrow(ax, (x - 2.2, 13), (x, 13))
    ax.text(1, 18.6, "Python: meaning", fontsize=9, color=BLUE, weight="bold")
    ax.text(43.6, 18.6, "the border", fontsize=9, color="#9a6a00", weight="bold")
    ax.text(57.8, 18.6, "C++ or Triton: memory, instructions", fontsize=9, color=GREEN, weight="bold")
    ax.plot((7, 7, 63.8), (10, 6.5, 6.5), "--", color=GREY, linewidth=1.1)
    ax.annotate("", (63.8, 10), (63.8, 6.5), arrowprops={"arrowstyle": "-|>", "color": GREY, "lw": 1.1})
    told = "the short way of a plain call: C++ reads the arrays itself"
    ax.text(35, 4, told, ha="center", fontsize=8, color="#555")
    return figure


def tiles() -> Figure:
    """A causal call of 512 queries and keys, cut: what is never visited, never masked, and masked."""
    panel, block, length = 32, 64, 512
    rows, columns = length // panel, length // block
    kind = np.zeros((rows, columns))
    for row in range(rows):
        for column in range(columns):
            first, last = column * block, (column + 1) * block - 1
            kind[row, column] = 0 if first > row * panel + panel - 1 else 1 if last <= row * panel else 2
    figure = Figure(figsize=(8.2, 3.7), layout="constrained")
    whole, one = figure.subplots(1, 2, width_ratios=(1.15, 1))
    whole.pcolormesh(kind, cmap=ListedColormap(["#f2f2f2", SKY, ORANGE]), edgecolors="white", linewidth=1)
    for task in range(0, rows, 4):
        whole.add_patch(Rectangle((0, task), columns, 4, fill=False, edgecolor=BLACK, linewidth=1.4))
    whole.set(
        ylim=(rows, 0), xticks=range(0, columns + 1, 2), yticks=range(0, rows + 1, 4),
        xlabel=f"keys, in blocks of {block}", ylabel=f"queries, in panels of {panel}",
    )  # fmt: skip
    whole.set_xticklabels([str(block * x) for x in range(0, columns + 1, 2)])
    whole.set_yticklabels([str(panel * x) for x in range(0, rows + 1, 4)])
    whole.set_title("a causal call, cut")
    handles = [
        Patch(color="#f2f2f2"),
        Patch(color=SKY),
        Patch(color=ORANGE),
        Patch(fill=False, edgecolor=BLACK),
    ]
    labels = ["never visited", "visited, never masked", "masked lane by lane", "a task: four panels"]
    whole.legend(handles, labels, loc="upper right", fontsize=8, frameon=True)
    _one_tile(one)
    return figure


def _one_tile(ax: Axes) -> None:
    """The tile in registers: eight keys by two vectors of queries."""
    for key in range(8):
        for vector in range(2):
            ax.add_patch(
                Rectangle((vector * 4.2 + 2, 7 - key), 4, 0.86, facecolor=SKY + "66", edgecolor=BLUE)
            )
        ax.add_patch(Rectangle((0.5, 7 - key), 0.86, 0.86, facecolor=ORANGE + "88", edgecolor="#9a6a00"))
    for vector in range(2):
        ax.add_patch(Rectangle((vector * 4.2 + 2, 8.7), 4, 0.86, facecolor=GREEN + "55", edgecolor=GREEN))
        ax.text(vector * 4.2 + 4, 9.1, "16 queries", ha="center", va="center", fontsize=8)
    ax.text(0.93, 8.3, "8 keys", ha="center", fontsize=8)
    ax.text(
        6.1, -0.75, "16 sums in registers: every lane is one query's own softmax", ha="center", fontsize=8
    )
    ax.set(xlim=(0, 10.6), ylim=(-1.2, 10))
    ax.set_axis_off()
    ax.set_title("one tile of AVX-512, column by column")


def online() -> Figure:
    """One row through its blocks: scores, what is subtracted from them, and the sum."""
    rng = np.random.default_rng(1)
    blocks, size = 10, 32
    scores = rng.normal(0, 2.2, (blocks, size)) + 7 * (np.arange(blocks) == 5)[:, None]
    shift, total, shifts, totals = -np.inf, 0.0, [], []
    for block in scores:  # what the kernel does, to base 2
        highest = block.max()
        if highest > shift + 8 or np.isinf(shift):
            moved = np.ceil(highest)
            total, shift = total * 2.0 ** (shift - moved) if total else 0.0, moved
        total += float((2.0 ** (block - shift)).sum())
        shifts.append(shift)
        totals.append(total)
    figure = Figure(figsize=(8.2, 3.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1.7, 1))
    x = np.repeat(np.arange(blocks), size) + np.tile(np.linspace(-0.36, 0.36, size), blocks)
    above.scatter(x, scores.ravel(), s=7, color=BLUE, label="scores of one query, to base 2")
    above.step(
        np.arange(-0.5, blocks),
        [shifts[0], *shifts],
        where="pre",
        color=RED,
        linewidth=2,
        label="shift: what is subtracted",
    )
    highest = np.maximum.accumulate([scores[0].max(), *scores.max(axis=1)])
    options = {"where": "pre", "color": GREY, "linewidth": 1.2}
    above.step(np.arange(-0.5, blocks), highest, "--", label="maximum so far", **options)
    above.set_ylabel("score")
    above.legend(fontsize=8, loc="upper left")
    below.bar(range(blocks), totals, 0.7, color=ORANGE)
    below.set(xlabel="block of keys", ylabel="sum so far", xticks=range(blocks))
    return figure


def backward() -> Figure:
    """What the backward computes again, and what it makes of it."""
    figure, ax = _canvas(8.6, 3.3)
    _box(ax, 2, 22, 12, 6, "Q, K", BLUE)
    _box(ax, 2, 12, 12, 6, "V, dO", BLUE)
    _box(ax, 2, 2, 12, 6, "lse, O", ORANGE)
    _box(ax, 26, 22, 17, 6, "P = exp(Q Kᵀ - lse)", GREEN)
    _box(ax, 26, 12, 17, 6, "dP = dO Vᵀ", GREEN)
    _box(ax, 26, 2, 17, 6, "delta = sum(dO O)", GREEN)
    _box(ax, 53, 9, 14, 8, "dS =\nP (dP - delta)", GREEN)
    _box(ax, 72, 22, 12, 6, "dV = Pᵀ dO", RED)
    _box(ax, 72, 13, 12, 6, "dK = dSᵀ Q", RED)
    _box(ax, 72, 4, 12, 6, "dQ = dS K", RED)
    for y in (25, 15, 5):
        _arrow(ax, (14, y), (26, y))
    _arrow(ax, (14, 6.5), (26, 23))
    _arrow(ax, (14, 13.5), (26, 6.5))
    _arrow(ax, (43, 23.5), (53, 15.5))
    _arrow(ax, (43, 14.5), (53, 13))
    _arrow(ax, (43, 5.5), (53, 10.5))
    _arrow(ax, (43, 26), (72, 26))
    _arrow(ax, (67, 14.5), (72, 16))
    _arrow(ax, (67, 11.5), (72, 8))
    for x, text in ((2, "kept or given"), (26, "computed again, a block at a time"), (72, "gradients")):
        ax.text(x, 30, text, fontsize=8.5, color="#555")
    return figure


def schedule() -> Figure:
    """Tasks of a causal call on two threads: dealt out ahead, and one by one."""
    tasks = np.arange(1, 9) + 0.5  # a later block of queries sees more keys
    figure = Figure(figsize=(8.2, 2.5), layout="constrained")
    ahead, counter = figure.subplots(1, 2, sharex=True, sharey=True)
    halves = {0: range(4), 1: range(4, 8)}
    for thread, mine in halves.items():
        _run_tasks(ahead, thread, [(task, tasks[task]) for task in mine])
    free, dealt = [0.0, 0.0], {0: [], 1: []}
    for task in reversed(range(8)):
        thread = int(np.argmin(free))
        dealt[thread].append((task, tasks[task]))
        free[thread] += tasks[task]
    for thread, mine in dealt.items():
        _run_tasks(counter, thread, mine)
    ahead.set_title("half of the tasks each: one thread waits")
    counter.set_title("the next task to whoever is free, long ones first")
    for panel in (ahead, counter):
        panel.set(
            yticks=(0, 1), yticklabels=("thread 0", "thread 1"), xlabel="time", xticks=[], ylim=(1.6, -0.6)
        )
    return figure


def _run_tasks(ax: Axes, thread: int, tasks: list[tuple[int, float]]) -> None:
    start = 0.0
    for task, length in tasks:
        ax.barh(
            thread, length, 0.7, start, color=SKY if thread == 0 else ORANGE, edgecolor="white", linewidth=1.5
        )
        ax.text(start + length / 2, thread, str(task), ha="center", va="center", fontsize=8)
        start += length


def decode() -> Figure:
    """One query over a long cache: chunks at fixed places, each a softmax of its own, added in order."""
    figure, ax = _canvas(8.6, 2.9)
    ax.text(1, 26.5, "keys and values of one sequence, cut at every 1024th key", fontsize=8.5, color="#555")
    for chunk in range(5):
        x, width = 1 + 17 * chunk, 16 if chunk < 4 else 13  # the last has what is left
        middle = x + width / 2
        _box(ax, x, 20, width, 4.4, f"{1024 * chunk} ..", BLUE, 8.5)
        _box(ax, x, 11, width, 4.6, "shift, sum, output", GREEN, 8)
        _arrow(ax, (middle, 20), (middle, 15.6))
        _arrow(ax, (middle, 11), (middle, 6.4))
    told = "added in order, whoever computed them: out = sum of outputs / sum of sums, at one shift"
    _box(ax, 1, 2, 81, 4.4, told, ORANGE, 8.5)
    return figure
