"""The section of ``python -m bench variants``: attention beside recurrent networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plotly.graph_objects import Bar, Figure, Scatter
from plotly.subplots import make_subplots

from bench import variants
from bench.report.charts import laid_out
from bench.report.suites import machine
from bench.report.view import Cell, Chart, Section, Table
from fastattn.compare import Cost, Order, Recall

_STYLES = {
    "full": ("#d55e00", "circle", "solid"),
    "causal": ("#e69f00", "triangle-up", "solid"),
    "window": ("#cc79a7", "diamond", "solid"),
    "rnn": ("#56b4e9", "x", "dash"),
    "gru": ("#0072b2", "cross", "dash"),
    "lstm": ("#009e73", "square", "dash"),
}


def section(path: Path) -> Section:
    """What one record has, table by table."""
    record = variants.Record.load(path)
    run = record.run
    where = machine(run.machine["cpu"], run.machine["isa"], run.threads)
    facts = {
        "machine": f"{where}; {run.machine['platform']}",
        "versions": ", ".join(f"{name} {version}" for name, version in run.versions.items()),
        "record": path.stem,
    }
    tables = [
        Table(table.title, ("", *table.headings[1:]), [[Cell(text) for text in row] for row in table.rows])
        for table in variants.tables_of(record).values()
    ]
    makers: dict[str, Any] = {"cost": (times, memory), "recall": (recall,), "order": (order,)}
    charts = [make(part) for name, part in record.parts.items() for make in makers[name]]
    about = "one layer of self-attention, full, causal and of a window, beside RNN, GRU and LSTM"
    return Section(path.stem, f"{run.suite}: {where}", about, facts, tables, charts)


def times(cost: Cost) -> Chart:
    """Milliseconds over length on the most threads, forward and in training."""
    threads = cost.settings.threads[-1]
    values = [{kind: _scaled(cost.seconds(kind, training, threads), 1e3) for kind in cost.settings.kinds}
              for training in (False, True)]  # fmt: skip
    title = f"Time over length, {threads} thread{'s' * (threads > 1)}"
    return Chart(title, _over_length(values, "ms"), "Dashed lines are recurrent networks.")


def memory(cost: Cost) -> Chart:
    """MiB over length beside input and weights."""
    values = [{kind: _scaled(cost.bytes(kind, training), 2.0**-20) for kind in cost.settings.kinds}
              for training in (False, True)]  # fmt: skip
    return Chart("Memory over length", _over_length(values, "MiB"), "Beside input and weights.")


def recall(result: Recall) -> Chart:
    """The share of right answers over the distance from a symbol to the question for it."""
    figure = Figure()
    for kind in result.settings.kinds:
        figure.add_trace(_line(kind, result.accuracy(kind), "%{x}: %{y:.0%}"))
    figure.add_hline(result.chance, line={"color": "#767676", "dash": "dot"}, annotation_text="guessing")
    figure.update_xaxes(type="log", title="distance", tickvals=list(result.settings.distances))
    figure.update_yaxes(title="right", tickformat=".0%", range=[0, 1.05])
    return Chart("Recall over distance", laid_out(figure, 420), "The same parameters and steps for each.")


def order(result: Order) -> Chart:
    """The share of right answers with each kind of position."""
    bars = Bar(
        x=[one.position for one in result.results], y=[one.accuracy for one in result.results],
        marker={"color": "#d55e00"}, hovertemplate="%{x}: %{y:.1%}<extra></extra>",
    )  # fmt: skip
    figure = Figure(bars)
    figure.add_hline(result.chance, line={"color": "#767676", "dash": "dot"}, annotation_text="guessing")
    figure.update_yaxes(title="right", tickformat=".0%", range=[0, 1.05])
    return Chart("Which came first, with each kind of position", laid_out(figure, 360))


def _scaled(values: dict[int, Any], factor: float) -> dict[int, float]:
    return {length: factor * value for length, value in values.items()}


def _over_length(values: list[dict[str, dict[int, float]]], unit: str) -> Figure:
    figure = make_subplots(1, 2, subplot_titles=("forward", "training"), shared_yaxes=True)
    for column, by_kind in enumerate(values, 1):
        for kind, points in by_kind.items():
            line = _line(kind, points, "%{x}: %{y:.3g} " + unit)
            figure.add_trace(line.update(showlegend=column == 1), row=1, col=column)
    figure.update_xaxes(type="log", title="length", tickformat=".0f", dtick=1)
    figure.update_yaxes(type="log", dtick=1)
    figure.update_yaxes(title=unit, col=1)
    return laid_out(figure, 460)


def _line(kind: str, points: dict[int, float], told: str) -> Scatter:
    colour, symbol, dash = _STYLES[kind]
    return Scatter(
        x=list(points), y=list(points.values()), name=kind, legendgroup=kind, mode="lines+markers",
        line={"color": colour, "dash": dash}, marker={"symbol": symbol, "size": 8},
        hovertemplate=told + "<extra>" + kind + "</extra>",
    )  # fmt: skip
