"""Pictures of what was compared. Needs matplotlib: ``pip install 'fastattn[viz]'``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from fastattn.compare.cost import Cost
from fastattn.compare.layers import ATTENTION, RECURRENT
from fastattn.compare.order import Order
from fastattn.compare.recall import Recall

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# Okabe and Ito's colours, which all eyes tell apart: warm ones for attention, cold ones for what recurs.
_COLOURS = {
    "full": "#D55E00", "causal": "#E69F00", "window": "#CC79A7",
    "rnn": "#56B4E9", "gru": "#0072B2", "lstm": "#009E73",
    "none": "#000000", "sinusoidal": "#E69F00", "learned": "#56B4E9",
    "rotary": "#009E73", "alibi": "#0072B2", "relative": "#CC79A7",
}  # fmt: skip
_NAMES = {
    "full": "full attention", "causal": "causal attention", "rnn": "RNN", "gru": "GRU", "lstm": "LSTM",
    "none": "no positions", "rotary": "RoPE", "alibi": "ALiBi", "relative": "relative bias",
}  # fmt: skip
_MODES = ((False, "forward"), (True, "training: forward and backward"))
_GREY = "#6b6862"
_SCORES = "scores of all pairs, were they kept"


def draw_times(cost: Cost) -> Figure:
    """Milliseconds over length; dotted, the operations at the machine's peak.

    Rings mark where full attention meets a recurrent network.
    """
    threads = cost.settings.threads[-1]
    figure, axes = _panels(cost.settings.lengths, "milliseconds")
    for ax, (training, _) in zip(axes, _MODES, strict=True):
        for kind in cost.settings.kinds:
            _line(ax, kind, cost.seconds(kind, training, threads), 1e3)
            floors = {
                timing.length: 1e-6 * timing.flops / cost.peaks[-1]
                for timing in cost.timings
                if (timing.kind, timing.training, timing.threads) == (kind, training, threads)
            }
            ax.plot(list(floors), list(floors.values()), ":", color=_COLOURS[kind], linewidth=1)
        _mark_crossings(ax, cost, training, threads)
        _logarithmic(ax)
    peak = f"its FLOPs at the machine's peak, {cost.peaks[-1]:.0f} GFLOP/s"
    _finish(
        figure,
        cost,
        f"time of one layer on {_count(threads, 'thread')}",
        {":": peak, "o": "full attention meets a recurrent one"},
    )
    return figure


def draw_memory(cost: Cost) -> Figure:
    """MiB over length, of a single one as bars; dashed, what the scores of all pairs would take alone."""
    lengths = cost.settings.memory_lengths
    if len(lengths) == 1:
        return _memory_bars(cost, lengths[0])
    figure, axes = _panels(lengths, "MiB beside input and weights")
    for ax, (training, _) in zip(axes, _MODES, strict=True):
        for kind in cost.settings.kinds:
            _line(ax, kind, cost.bytes(kind, training), 2**-20)
        ax.plot(lengths, [_scores(cost, length) for length in lengths], "--", color=_GREY, linewidth=1)
        _logarithmic(ax)
    axes[0].set_ylim(bottom=0.05)  # of both, once the highest is drawn
    _finish(figure, cost, "memory of one layer", {"--": _SCORES})
    return figure


def _memory_bars(cost: Cost, length: int) -> Figure:
    kinds = cost.settings.kinds
    figure = _figure(10.5, 1.4 + 0.3 * len(kinds))
    axes: Sequence[Axes] = figure.subplots(1, 2, sharex=True, sharey=True)
    for ax, (training, told) in zip(axes, _MODES, strict=True):
        found = [cost.bytes(kind, training).get(length, 0) / 2**20 for kind in kinds]
        bars = ax.barh(range(len(kinds)), found, color=[_COLOURS[kind] for kind in kinds])
        ax.bar_label(
            bars,
            [f"{value:.0f}" if value >= 10 else f"{value:.1f}" for value in found],
            padding=3,
            fontsize=9,
        )
        scores = ax.axvline(_scores(cost, length), color=_GREY, linewidth=1, linestyle="--")
        ax.set_title(told, loc="left", fontsize=10)
        ax.set_xlabel("MiB beside input and weights")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(kinds)), [_name(kind, cost.settings.window) for kind in kinds])
    axes[0].invert_yaxis()
    axes[0].margins(x=0.15)  # for the numbers
    figure.legend([scores], [_SCORES], loc="outside lower center", frameon=False, fontsize=9)
    _write_title(figure, cost, f"memory of one layer at {length} rows")
    return figure


def _scores(cost: Cost, length: int) -> float:
    """MiB of one number for every pair in every head."""
    return 4 * cost.settings.heads * length**2 / 2**20


def draw_speedup(cost: Cost) -> Figure:
    """Time on the fewest threads over that on the most, over length."""
    few, many = cost.settings.threads[0], cost.settings.threads[-1]
    figure, axes = _panels(cost.settings.lengths, f"speed-up from {_count(few, 'thread')} to {many}")
    for ax, (training, _) in zip(axes, _MODES, strict=True):
        for kind in cost.settings.kinds:
            _line(ax, kind, cost.speedup(kind, training))
        ax.axhline(many / few, color=_GREY, linewidth=1, linestyle="--")
        ax.set_ylim(0, 1.15 * many / few)
    _finish(figure, cost, "what more threads give", {"--": "as many times as there are threads"})
    return figure


def draw_recall(recall: Recall) -> Figure:
    """Share of right answers over the distance between what was marked and the question."""
    settings = recall.settings
    figure = _figure(9.0, 4.4)
    ax = figure.subplots()
    for place, kind in enumerate(settings.kinds):
        shift = 0.006 * ((len(settings.kinds) - 1) / 2 - place)  # lines that would hide each other
        _line(ax, kind, {distance: share + shift for distance, share in recall.accuracy(kind).items()})
    _shares(ax, recall.chance, "guessing", side="left")
    _lengths(ax, settings.distances)
    ax.set_xlabel("distance between symbol and question, rows")
    handles = [_handle(kind) for kind in settings.kinds]
    labels = [_name(kind, settings.window) for kind in settings.kinds]
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    sizes = sorted(result.parameters for result in recall.results)
    told = f"{settings.steps} steps of {settings.batch} sequences, {sizes[0]} to {sizes[-1]} parameters"
    figure.suptitle(f"recall of a marked symbol after {told}", x=0.01, ha="left", fontsize=10)
    return figure


def draw_order(order: Order) -> Figure:
    """Share of right answers while attention learns, with each kind of position and with none."""
    settings = order.settings
    figure = _figure(9.0, 4.4)
    ax = figure.subplots()
    for result in order.results:
        steps, shares = zip(*result.curve, strict=True)
        ax.plot(steps, shares, color=_COLOURS[result.position], linewidth=1.8)
    _shares(ax, order.chance, "guessing between the two", least=0.4)
    ax.set_xlim(left=0)
    ax.set_xlabel(f"steps of {settings.batch} sequences of {settings.length} rows")
    handles = [_handle(result.position, marker="") for result in order.results]
    labels = [f"{_name(result.position)}: {result.accuracy:.0%}" for result in order.results]
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    figure.suptitle(
        "which of two marked symbols came first? One layer of full attention", x=0.01, ha="left", fontsize=10
    )
    return figure


_PICTURES: dict[str, dict[str, Callable[[Any], Figure]]] = {
    "cost": {"times": draw_times, "memory": draw_memory, "speedup": draw_speedup},
    "recall": {"recall": draw_recall},
    "order": {"order": draw_order},
}


def of_part(part: str, result: Cost | Recall | Order) -> Iterator[tuple[str, Figure]]:
    """All pictures of what was compared, "cost", "recall" or "order", with their names."""
    for name, draw in _PICTURES[part].items():
        if isinstance(result, Cost) and (
            (name == "speedup" and len(result.settings.threads) < 2)
            or (name == "memory" and not result.memory)
        ):
            continue
        yield name, draw(result)


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'fastattn[viz]'") from error
    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def _panels(lengths: Sequence[int], label: str) -> tuple[Figure, Sequence[Axes]]:
    """Two panels, forward and training, over length."""
    figure = _figure(10.5, 5.0)
    axes: Sequence[Axes] = figure.subplots(1, 2, sharey=True)
    for ax, (_, told) in zip(axes, _MODES, strict=True):
        ax.set_title(told, loc="left", fontsize=10)
        ax.set_xlabel("length, rows")
        _lengths(ax, lengths)
    axes[0].set_ylabel(label)
    return figure, axes


def _lengths(ax: Axes, lengths: Sequence[int]) -> None:
    """A logarithmic axis with the lengths themselves on it, every other one where there are many."""
    ax.set_xscale("log")
    ax.set_xticks(lengths[:: 1 + len(lengths) // 8], minor=False)
    ax.set_xticks([], minor=True)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    ax.grid(True, color="#e8e6e1", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _logarithmic(ax: Axes) -> None:
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _line(ax: Axes, kind: str, values: Mapping[int, float], unit: float = 1.0) -> None:
    marker = "o" if kind in ATTENTION else "s"
    heights = [unit * value for value in values.values()]
    ax.plot(list(values), heights, color=_COLOURS[kind], marker=marker, markersize=4, linewidth=1.6)


def _mark_crossings(ax: Axes, cost: Cost, training: bool, threads: int) -> None:
    """Ring the points where full attention takes as long as a recurrent network, and list their lengths."""
    if "full" not in cost.settings.kinds:
        return
    lengths = {
        kind: cost.crossing("full", kind, training, threads)
        for kind in RECURRENT
        if kind in cost.settings.kinds
    }
    met = {kind: length for kind, length in lengths.items() if 0 < length < math.inf}
    for kind, length in met.items():
        seconds = cost.seconds(kind, training, threads)
        low = max(known for known in seconds if known <= length)
        high = min(known for known in seconds if known >= length)
        share = math.log(length / low) / math.log(high / low) if high > low else 0.0
        height = 1e3 * seconds[low] ** (1 - share) * seconds[high] ** share
        ax.plot(length, height, "o", markersize=11, markerfacecolor="none", markeredgecolor="black")
    if met:
        found = [f"{_name(kind)} {met[kind]:.0f}" for kind in sorted(met, key=met.__getitem__)]
        told = "\n".join(["full attention meets", *found])
        ax.text(0.98, 0.03, told, ha="right", fontsize=8.5, linespacing=1.4, transform=ax.transAxes)


def _shares(
    ax: Axes, chance: float, told: str, *, least: float = 0.0, side: Literal["left", "right"] = "right"
) -> None:
    """An axis of right answers from `least` up, with what guessing gives, told at one side."""
    ax.axhline(chance, color=_GREY, linewidth=1, linestyle="--")
    x = 0.01 if side == "left" else 0.995
    ax.text(x, chance + 0.015, told, ha=side, color=_GREY, fontsize=8, transform=ax.get_yaxis_transform())
    ax.set(ylim=(least, 1.05 - 0.03 * (least > 0)), ylabel="right answers")
    ax.grid(True, color="#e8e6e1", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def _finish(figure: Figure, cost: Cost, told: str, styles: Mapping[Any, str]) -> None:
    """A legend of kinds and of other marks by style, and the title."""
    from matplotlib.lines import Line2D

    settings = cost.settings
    handles = [_handle(kind) for kind in settings.kinds]
    labels = [_name(kind, settings.window) for kind in settings.kinds]
    for style, label in styles.items():
        ring = style == "o"
        handles.append(
            Line2D([], [], color="black" if ring else _GREY, linestyle="" if ring else style,
                   marker="o" if ring else "", markersize=9, markerfacecolor="none")
        )  # fmt: skip
        labels.append(label)
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    _write_title(figure, cost, told)


def _write_title(figure: Figure, cost: Cost, told: str) -> None:
    settings = cost.settings
    heads = _count(settings.heads, "head")
    figure.suptitle(
        f"{told}: width {settings.width}, {heads}, batch 1, float32", x=0.01, ha="left", fontsize=10
    )


def _handle(kind: str, marker: str | None = None) -> Line2D:
    from matplotlib.lines import Line2D

    shape = ("s" if kind in RECURRENT else "o") if marker is None else marker
    return Line2D([], [], color=_COLOURS[kind], marker=shape, markersize=5, linewidth=1.8)


def _name(kind: str, window: int = 0) -> str:
    return f"window of {window}" if kind == "window" else _NAMES.get(kind, kind)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
