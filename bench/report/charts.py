"""Pictures of a suite: speed beside ours, a roofline, time over length and over queries, errors."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable

from plotly.graph_objects import Bar, Figure, Scatter
from plotly.subplots import make_subplots

from bench import tables
from bench.colours import DTYPES, GREY, style
from bench.report.records import Measured
from bench.report.view import Chart

_GRID = "#e6e6e6"
_FAR = 3.0


def laid_out(figure: Figure, height: int, **options: object) -> Figure:
    """The looks that all pictures share."""
    figure.update_layout(
        template="plotly_white", height=height, margin={"l": 60, "r": 20, "t": 40, "b": 40},
        font={"family": "system-ui, sans-serif", "size": 13},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.04, "x": 0}, **options,
    )  # fmt: skip
    figure.update_xaxes(gridcolor=_GRID)
    figure.update_yaxes(gridcolor=_GRID)
    return figure


def of_suite(rows: list[Measured]) -> list[Chart]:
    """All that the rows have figures for."""
    makers: tuple[Callable[[list[Measured]], Iterable[Chart]], ...] = (
        bars, roofline, lengths, queries, errors,
    )  # fmt: skip
    return [chart for make in makers for chart in make(rows)]


def contestants(rows: Iterable[Measured]) -> list[str]:
    """Everyone timed on some row, ours first."""
    names = {name: None for measured in rows for name in measured.run.peers()}
    return ["fastattn", *(name for name in names if name != "fastattn")]


def bars(rows: list[Measured]) -> Iterable[Chart]:
    """Speed beside ours, which is 1: a picture a dtype, a group of bars a case, the ceiling if near."""
    names = contestants(rows)
    for dtype in dict.fromkeys(measured.row.dtype for measured in rows):
        these = [x for x in rows if x.row.dtype == dtype and x.run.figures(x.row, "fastattn")]
        timed = [name for name in names if any(x.run.figures(x.row, name) for x in these)]
        if len(timed) < 2:
            continue
        figure = Figure()
        for name in timed:
            figure.add_trace(_bars_of(name, these))
        figure.add_trace(_ceiling_of(these))
        figure.update_yaxes(title="speed, fastattn = 1", rangemode="tozero")
        told = "Bars above 1 are faster than fastattn. Grey lines: the ceiling, where it is near."
        yield Chart(f"Speed beside fastattn, {dtype}", laid_out(figure, 420, barmode="group"), told)


def _ceiling_of(rows: list[Measured]) -> Scatter:
    """The ceiling that was read in the same run, unless it is so high that bars would be flat."""
    near = [
        (_short(x.row.name), found.share)
        for x in rows
        if x.row.quotes_ceiling and (found := x.run.figures(x.row, "fastattn")) and found.share > 1 / _FAR
    ]
    return Scatter(
        x=[case for case, _ in near], y=[1 / share for _, share in near], mode="markers", name="ceiling",
        marker={"symbol": "line-ew-open", "size": 34, "color": GREY, "line": {"width": 2}},
        customdata=[f"{share:.0%}" for _, share in near],
        hovertemplate="%{x}<br>fastattn is at %{customdata} of the ceiling<extra></extra>",
    )  # fmt: skip


def _short(name: str) -> str:
    return name.removeprefix("prefill-")


def _bars_of(name: str, rows: list[Measured]) -> Bar:
    speeds, told = [], []
    for measured in rows:
        run, row = measured.run, measured.row
        rate, found = run.rate(row, name), run.figures(row, name)
        speeds.append(None if math.isnan(rate) else rate / run.rate(row, "fastattn"))
        rates = f"{tables.rate(rate)} {row.unit}"
        told.append(f"{tables.time(found.seconds)}, {rates}, ±{found.spread:.0%}" if found else "")
    return Bar(
        name=name, x=[_short(measured.row.name) for measured in rows], y=speeds, customdata=told,
        marker={"color": style(name)[0]},
        hovertemplate="%{x}<br>" + name + ": %{y:.2f} of fastattn's speed<br>%{customdata}<extra></extra>",
    )  # fmt: skip


def roofline(rows: list[Measured]) -> Iterable[Chart]:
    """Useful FLOP/s over useful FLOPs a byte that must move, under the ceilings of the same runs."""
    drawn = [x for x in rows if x.row.flops and x.row.bytes and x.run.figures(x.row, "fastattn")]
    ceilings: dict[str, float] = {}
    for measured in drawn:
        for name, rate in measured.run.ceilings.items():
            ceilings[name] = max(rate, ceilings.get(name, 0.0))
    reads = [rate for name, rate in ceilings.items() if name.startswith("read") and rate]
    if not reads or any(measured.row.limit.isa for measured in drawn):  # tiers have a roof each
        return
    read = max(reads)
    flat = {name: rate for name, rate in ceilings.items() if not name.startswith("read") and rate}
    xs = [measured.row.flops / measured.row.bytes for measured in drawn]
    ridges = [rate / read for rate in flat.values()]
    left, right = min(*xs, *ridges) / 3, max(*xs, *ridges) * 3
    figure = Figure()
    for name, rate in flat.items():
        figure.add_trace(
            Scatter(
                x=[left, rate / read, right],
                y=[left * read, rate, rate],
                mode="lines+text",
                line={"color": GREY, "width": 1.5},
                showlegend=False,
                textposition="top left",
                text=["", "", f"{name}: {rate:.0f} GFLOP/s"],
                hoverinfo="skip",
            )
        )
    for dtype in dict.fromkeys(measured.row.dtype for measured in drawn):
        figure.add_trace(_under_the_roof(dtype, [x for x in drawn if x.row.dtype == dtype]))
    figure.update_xaxes(type="log", dtick=1, title="useful FLOPs a byte of query, key, value and output")
    figure.update_yaxes(type="log", dtick=1, title="useful GFLOP/s")
    yield Chart(
        "Roofline", laid_out(figure, 520),
        f"The slope is the best streaming read, {read:.0f} GB/s. Triangles are causal calls.",
    )  # fmt: skip


def _under_the_roof(dtype: str, rows: list[Measured]) -> Scatter:
    found = [(x.row, figures) for x in rows if (figures := x.run.figures(x.row, "fastattn"))]
    return Scatter(
        x=[row.flops / row.bytes for row, _ in found], y=[row.flops / 1e9 / x.seconds for row, x in found],
        mode="markers", name=dtype, text=[row.name for row, _ in found],
        customdata=[f"{x.share:.0%}" for _, x in found],
        marker={"color": DTYPES[dtype], "size": 9, "line": {"color": "white", "width": 1},
                "symbol": ["triangle-up" if row.case.get("causal") else "circle" for row, _ in found]},
        hovertemplate="%{text}<br>%{y:.3g} GFLOP/s, %{customdata} of its ceiling<extra>" + dtype + "</extra>",
    )  # fmt: skip


def lengths(rows: list[Measured]) -> Iterable[Chart]:
    """Milliseconds a head over length, a panel a dtype and rule; both axes logarithmic."""
    groups: dict[tuple[str, bool], list[Measured]] = {}
    for measured in rows:
        row = measured.row
        if re.fullmatch(r"prefill-d64-s\d+(-causal)?( backward| training)?", row.name):
            groups.setdefault((row.dtype, bool(row.case["causal"])), []).append(measured)
    groups = {key: found for key, found in groups.items() if len({x.row.case["seqlen_q"] for x in found}) > 1}
    if not groups:
        return
    dtypes = list(dict.fromkeys(dtype for dtype, _ in groups))
    titles = [f"{dtype}, {rule}" for rule in ("full", "causal") for dtype in dtypes]
    figure = make_subplots(2, len(dtypes), subplot_titles=titles, shared_yaxes=True, vertical_spacing=0.14)

    def per_head(measured: Measured, seconds: float) -> float:
        return 1e3 * seconds / (measured.row.case["batch"] * measured.row.case["query_heads"])

    shown: set[str] = set()
    for (dtype, causal), found in groups.items():
        place = 1 + causal, 1 + dtypes.index(dtype)
        _lines(figure, found, shown, per_head, *place)
    figure.update_xaxes(type="log", dtick=math.log10(2), tickformat=".0f")
    figure.update_yaxes(type="log", dtick=1)
    figure.update_xaxes(title="queries and keys", row=2)
    figure.update_yaxes(title="ms a head", col=1)
    laid_out(figure, 620).update_layout(legend={"y": 1.08})
    yield Chart("Time over length, D 64", figure, "Twice the length is four times the pairs.")


def queries(rows: list[Measured]) -> Iterable[Chart]:
    """Milliseconds of a few queries over one cache, a panel a dtype."""
    panels: dict[str, list[Measured]] = {}
    for measured in rows:
        if re.fullmatch(r"queries-\d+-s8192|decode-32x8-s8192", measured.row.name):
            panels.setdefault(measured.row.dtype, []).append(measured)
    panels = {dtype: found for dtype, found in panels.items() if len(found) > 2}
    if not panels:
        return
    figure = make_subplots(1, len(panels), subplot_titles=list(panels), shared_yaxes=True)
    shown: set[str] = set()
    for column, found in enumerate(panels.values(), 1):
        _lines(figure, found, shown, lambda _, seconds: 1e3 * seconds, 1, column)
    figure.update_xaxes(type="log", dtick=math.log10(2), tickformat=".0f", title="queries")
    figure.update_yaxes(type="log", dtick=1)
    figure.update_yaxes(title="ms", col=1)
    yield Chart("A few queries over 8192 keys, 32 heads on 8, D 128", laid_out(figure, 420))


def _lines(
    figure: Figure, rows: list[Measured], shown: set[str], height: Callable[[Measured, float], float],
    row: int, column: int,
) -> None:  # fmt: skip
    """A line a contestant over the number of queries; the legend has each once."""
    ordered = sorted(rows, key=lambda measured: int(measured.row.case["seqlen_q"]))
    for name in contestants(rows):
        timed = [(x, found) for x in ordered if (found := x.run.figures(x.row, name))]
        if not timed:
            continue
        colour, symbol = style(name)
        figure.add_trace(
            Scatter(
                x=[x.row.case["seqlen_q"] for x, _ in timed],
                y=[height(x, found.seconds) for x, found in timed],
                name=name, legendgroup=name, showlegend=name not in shown, mode="lines+markers",
                line={"color": colour, "width": 3 if name == "fastattn" else 1.5},
                marker={"symbol": symbol, "size": 8},
                hovertemplate="%{x}: %{y:.3g} ms<extra>" + name + "</extra>",
            ),
            row=row, col=column,
        )  # fmt: skip
        shown.add(name)


def errors(rows: list[Measured]) -> Iterable[Chart]:
    """The largest error of each contestant on each row, a panel a dtype."""
    dtypes = list(dict.fromkeys(
        x.row.dtype for x in rows if any(contestant.error for contestant in x.row.contestants.values())
    ))  # fmt: skip
    if not dtypes:
        return
    figure = make_subplots(1, len(dtypes), subplot_titles=dtypes, shared_yaxes=True)
    shown: set[str] = set()
    for column, dtype in enumerate(dtypes, 1):
        these = [x for x in rows if x.row.dtype == dtype]
        for name in contestants(these):
            if (points := _errors_of(name, these)).x:
                figure.add_trace(points.update(showlegend=name not in shown), row=1, col=column)
                shown.add(name)
    found = [c.error for x in rows for c in x.row.contestants.values() if c.error]
    decades = [math.floor(math.log10(min(found))), math.ceil(math.log10(max(found)))]
    figure.update_yaxes(type="log", exponentformat="power", dtick=1, range=decades)
    figure.update_yaxes(title="largest error", col=1)
    figure.update_xaxes(tickangle=60, tickfont={"size": 10})
    yield Chart(
        "Accuracy", laid_out(figure, 480),
        "The largest difference from attention in float64 on the same inputs, rounded to the dtype first.",
    )  # fmt: skip


def _errors_of(name: str, rows: list[Measured]) -> Scatter:
    points = [
        (_short(measured.row.name), found.error)
        for measured in rows
        if (found := measured.row.contestants.get(name)) and found.error
    ]
    colour, symbol = style(name)
    return Scatter(
        x=[case for case, _ in points], y=[error for _, error in points], name=name, legendgroup=name,
        mode="markers", marker={"color": colour, "symbol": symbol, "size": 9},
        hovertemplate="%{x}<br>%{y:.2e}<extra>" + name + "</extra>",
    )  # fmt: skip
