"""Pictures of a run: bars against peers, a roofline, time over length. Needs matplotlib."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from bench import tables
from bench.colours import DTYPES, GREY, style
from bench.results import Row, Run

_ROWS_A_PANEL = 8
_FAR = 3.0  # a ceiling this many times our rate is not drawn: it would flatten the bars


def draw(run: Run, stem: Path) -> list[Path]:
    """Draw what the run has figures for, as PNG files beside `stem`."""
    drawn = []
    pictures: dict[str, Callable[[Run], Figure | None]] = {
        "bars": bars,
        "roofline": roofline,
        "lengths": lengths,
        "queries": queries,
    }
    with plt.rc_context(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}
    ):
        for name, picture in pictures.items():
            figure = picture(run)
            if figure is None:
                continue
            path = stem.with_name(f"{stem.name}-{name}.png")
            figure.savefig(path, dpi=150)
            plt.close(figure)
            drawn.append(path)
    return drawn


def bars(run: Run) -> Figure | None:
    """Speed beside ours, which is 1: a panel a dtype, a group of bars a case, the ceiling if near."""
    panels: list[list[Row]] = []
    for row in run.rows:
        if run.figures(row, "fastattn") is None:
            continue
        same = panels and panels[-1][0].dtype == row.dtype
        if not same or len(panels[-1]) == _ROWS_A_PANEL:
            panels.append([])
        panels[-1].append(row)
    if not panels:
        return None
    size = (11, 2.5 * len(panels) + 0.9)
    figure, axes = plt.subplots(len(panels), 1, figsize=size, layout="constrained", squeeze=False)
    names = ["fastattn", *(name for name in run.peers() if name != "fastattn")]
    for ax, rows in zip(axes.flat, panels, strict=True):
        _bar_panel(ax, run, rows, names)
    handles = [plt.Rectangle((0, 0), 1, 1, color=style(name)[0]) for name in names]
    handles.append(plt.Line2D([], [], color=GREY, linestyle="--", linewidth=1))
    figure.legend(handles, [*names, "ceiling"], loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(_title(run), x=0.01, ha="left", fontsize=10)
    return figure


def _bar_panel(ax: Axes, run: Run, rows: list[Row], names: list[str]) -> None:
    width = 0.84 / len(names)
    for place, row in enumerate(rows):
        ours, found = run.rate(row, "fastattn"), run.figures(row, "fastattn")
        assert found is not None  # rows without our figures are not drawn
        speeds = {name: run.rate(row, name) / ours for name in names if not math.isnan(run.rate(row, name))}
        for index, (name, speed) in enumerate(speeds.items()):
            x = place + (index - (len(speeds) - 1) / 2) * width
            ax.bar(x, speed, 0.92 * width, color=style(name)[0])
        if row.quotes_ceiling and found.share > 1 / _FAR:
            ax.hlines(1 / found.share, place - 0.45, place + 0.45, color=GREY, linestyle="--", linewidth=1)
        label = f"{_wrapped(row.name)}\n{tables.time(found.seconds)}, {tables.rate(ours)} {row.unit}"
        ax.text(place, -0.04, label, ha="center", va="top", fontsize=7.5, transform=ax.get_xaxis_transform())
    ax.axhline(1, color=style("fastattn")[0], linewidth=0.7, zorder=0)
    ax.set_xticks([])
    ax.set_xlim(-0.6, max(len(rows), 4) - 0.4)
    ax.set_ylabel("speed, fastattn = 1")
    ax.set_title(rows[0].dtype, loc="left", fontweight="bold")


def roofline(run: Run) -> Figure | None:
    """Useful FLOP/s over useful FLOPs a byte that must move, under the ceilings of the same run."""
    rows = [row for row in run.rows if row.flops and row.bytes and run.figures(row, "fastattn")]
    read = run.ceilings.get(f"read, {run.threads} thread{'s' * (run.threads > 1)}", 0.0)
    if not rows or not read or any(row.limit.isa for row in rows):  # tiers have a roof each
        return None
    figure, ax = plt.subplots(figsize=(8, 5.2), layout="constrained")
    xs = [row.flops / row.bytes for row in rows]
    flat = {name: rate for name, rate in run.ceilings.items() if not name.startswith("read") and rate > 0}
    ridges = [rate / read for rate in flat.values()]
    left, right = min(*xs, *ridges) / 4, max(*xs, *ridges) * 3
    for name, rate in flat.items():
        ax.plot([left, rate / read, right], [left * read, rate, rate], color=GREY, linewidth=1)
        ax.text(
            right, rate * 1.06, f"{name}: {rate:.0f}", ha="right", va="bottom", fontsize=8, color="#5c5a55"
        )
    ax.text(
        left * 1.5,
        left * 1.2 * read,
        f"streaming read: {read:.0f} GB/s",
        va="top",
        fontsize=8,
        color="#5c5a55",
    )
    for dtype in dict.fromkeys(row.dtype for row in rows):
        these = [row for row in rows if row.dtype == dtype]
        for causal, marker in ((False, "o"), (True, "^")):
            points = [row for row in these if bool(row.case["causal"]) == causal]
            if not points:
                continue
            found = [(row, figures) for row in points if (figures := run.figures(row, "fastattn"))]
            ax.scatter(
                [row.flops / row.bytes for row, _ in found],
                [row.flops / 1e9 / figures.seconds for row, figures in found],
                s=34, marker=marker, color=DTYPES[dtype], edgecolor="white", linewidth=0.6, zorder=3,
                label=f"{dtype}{', causal' if causal else ''}",
            )  # fmt: skip
    ax.set(xscale="log", yscale="log", xlim=(left, right), ylabel="GFLOP/s, useful",
           xlabel="useful FLOPs a byte of query, key, value and output")  # fmt: skip
    ax.grid(True, which="major", color="#e8e6e1", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    ax.set_title(_title(run), loc="left")
    return figure


def lengths(run: Run) -> Figure | None:
    """Milliseconds a head over length, a panel a dtype and rule; both axes logarithmic."""
    groups: dict[tuple[str, bool], list[Row]] = {}
    for row in run.rows:
        if re.fullmatch(r"prefill-d64-s\d+(-causal)?( backward| training)?", row.name):
            groups.setdefault((row.dtype, bool(row.case["causal"])), []).append(row)
    groups = {key: rows for key, rows in groups.items() if len({row.case["seqlen_q"] for row in rows}) > 1}
    if not groups:
        return None
    dtypes = list(dict.fromkeys(dtype for dtype, _ in groups))
    figure, axes = plt.subplots(
        2, len(dtypes), figsize=(3.6 * len(dtypes) + 1.2, 6.4), layout="constrained", squeeze=False,
        sharex=True, sharey="row",
    )  # fmt: skip
    names = ["fastattn", *(name for name in run.peers() if name != "fastattn")]
    for column, dtype in enumerate(dtypes):
        for causal in (False, True):
            ax = axes[int(causal), column]
            _length_panel(ax, run, groups.get((dtype, causal), []), names)
            ax.set_title(f"{dtype}, {'causal' if causal else 'full'}, D 64", loc="left")
        axes[1, column].set_xlabel("queries and keys")
    figure.supylabel("milliseconds a head", fontsize=9)
    handles = [plt.Line2D([], [], color=style(name)[0], marker="o", markersize=4) for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.suptitle(_title(run), x=0.01, ha="left", fontsize=10)
    return figure


def _length_panel(ax: Axes, run: Run, rows: list[Row], names: list[str]) -> None:
    rows = sorted(rows, key=lambda row: int(row.case["seqlen_q"]))
    for name in reversed(names):  # ours last, on top
        points = [
            (row.case["seqlen_q"], 1e3 * found.seconds / (row.case["batch"] * row.case["query_heads"]))
            for row in rows
            if (found := run.figures(row, name)) is not None
        ]
        if points:
            ours = name == "fastattn"
            ax.plot(
                *zip(*points, strict=True),
                color=style(name)[0],
                marker="o",
                markersize=4,
                linewidth=2.2 if ours else 1.2,
            )
    ax.set(xscale="log", yscale="log")
    ax.set_xticks([row.case["seqlen_q"] for row in rows])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.minorticks_off()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.grid(True, color="#e8e6e1", linewidth=0.6)
    ax.set_axisbelow(True)


def queries(run: Run) -> Figure | None:
    """Milliseconds of a few queries over one cache, a panel a dtype, and the time that reading it takes."""
    names = ["fastattn", *(name for name in run.peers() if name != "fastattn")]
    panels: dict[str, list[Row]] = {}
    for row in run.rows:
        if re.fullmatch(r"queries-\d+-s8192|decode-32x8-s8192", row.name) and run.figures(row, "fastattn"):
            panels.setdefault(row.dtype, []).append(row)
    panels = {dtype: rows for dtype, rows in panels.items() if len(rows) > 2}
    if not panels:
        return None
    size = (4.4 * len(panels) + 0.6, 4.2)
    figure, axes = plt.subplots(
        1, len(panels), figsize=size, layout="constrained", squeeze=False, sharey=True
    )
    for ax, (dtype, rows) in zip(axes.flat, panels.items(), strict=True):
        _query_panel(ax, run, sorted(rows, key=lambda row: int(row.case["seqlen_q"])), names)
        ax.set_title(f"{dtype}, 32 heads on 8, 8192 keys, D 128", loc="left")
        ax.set_xlabel("queries")
    axes[0, 0].set_ylabel("milliseconds")
    handles = [plt.Line2D([], [], color=style(name)[0], marker="o", markersize=4) for name in names]
    handles.append(plt.Line2D([], [], color=GREY, linestyle="--", linewidth=1))
    labels = [*names, "keys and values read once"]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(_title(run), x=0.01, ha="left", fontsize=10)
    return figure


def _query_panel(ax: Axes, run: Run, rows: list[Row], names: list[str]) -> None:
    for name in reversed(names):
        points = [
            (row.case["seqlen_q"], 1e3 * found.seconds)
            for row in rows
            if (found := run.figures(row, name)) is not None
        ]
        if points:
            width = 2.2 if name == "fastattn" else 1.2
            ax.plot(
                *zip(*points, strict=True), color=style(name)[0], marker="o", markersize=4, linewidth=width
            )
    first = run.figures(rows[0], "fastattn")
    if first is not None and rows[0].limit.kind == "read":
        ax.axhline(1e3 * first.seconds * first.share, color=GREY, linestyle="--", linewidth=1)
    ax.set(xscale="log", yscale="log")
    ax.set_xticks([row.case["seqlen_q"] for row in rows if row.case["seqlen_q"] != 63])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.minorticks_off()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.grid(True, color="#e8e6e1", linewidth=0.6)
    ax.set_axisbelow(True)


def _wrapped(name: str) -> str:
    """A case's name without what the title says, in short lines."""
    return name.removeprefix("prefill-").replace("-causal", "\ncausal").replace(" ", "\n", 1)


def _title(run: Run) -> str:
    return f"{run.suite}: {run.machine['cpu']}, {run.machine['isa']}, {run.threads} threads, {run.when[:10]}"
