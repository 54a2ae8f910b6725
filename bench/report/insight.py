"""The section of ``python -m bench insight``: what looking costs beside attention."""

from __future__ import annotations

from plotly.graph_objects import Bar
from plotly.subplots import make_subplots

from bench import insight
from bench.colours import GREY, style
from bench.goals import Goal, goals_of
from bench.report.charts import laid_out
from bench.report.records import Records
from bench.report.suites import Judged, machine
from bench.report.view import Cell, Chart, Section, Table


def section(records: Records) -> list[Section]:
    """Time of each input beside that of `attention`; none without records of it."""
    if not records.insight:
        return []
    rows, run = insight.load(list(map(str, records.insight.values())))
    facts = {
        "machine": machine(run.machine["cpu"], run.machine["isa"], run.threads),
        "versions": ", ".join(f"{name} {version}" for name, version in run.versions.items()),
        "records": ", ".join(records.insight),
    }
    header = ("input", "dtype", "top_k", "turns", "attention", "insight", "without a value", "x attention",
              "without a value, x attention")  # fmt: skip
    note = "Times of a call, of each the first quartile. x attention: less is better. 1 of 4096: one query."
    lines = [_line(row, run.machine["isa"]) for row in rows]
    return [
        Section(
            insight.SUITE,
            f"insight: {facts['machine']}",
            "strongest keys, entropy and mass of keys, beside attention alone",
            facts,
            [Table("", header, lines, note)],
            [_chart(rows)],
        )
    ]


def goals(records: Records) -> list[Judged]:
    """The goals of `insight`, which are those of its default `top_k`."""
    if not records.insight:
        return []
    rows, run = insight.load(list(map(str, records.insight.values())))
    found: dict[Goal, dict[str, float]] = {}
    for row in rows:
        for goal in _goals(row, run.machine["isa"]):
            found.setdefault(goal, {})[f"{row.name} {row.dtype}"] = row.ratio("insight")
    where = machine(run.machine["cpu"], run.machine["isa"], run.threads)
    return [Judged(goal, where, insight.SUITE, values) for goal, values in found.items()]


def _goals(row: insight.Row, isa: str) -> list[Goal]:
    return goals_of(insight.SUITE, row.name, row.dtype, isa) if row.top_k == insight.TOP_K else []


def _line(row: insight.Row, isa: str) -> list[Cell]:
    ratio = Cell(f"{row.ratio('insight'):.2f}")
    for goal in _goals(row, isa):
        marks = f"must {goal.text(goal.must)}, aim {goal.text(goal.aim)}"
        ratio = Cell(ratio.text, goal.verdict(row.ratio("insight")), marks)
    return [
        Cell(row.name), Cell(row.dtype), Cell(str(row.top_k)), Cell(str(row.rounds)),
        *(Cell(f"{1e3 * row.seconds[call]:.3g} ms") for call in insight.CALLS),
        ratio, Cell(f"{row.ratio('without a value'):.2f}"),
    ]  # fmt: skip


def _chart(rows: list[insight.Row]) -> Chart:
    figure = make_subplots(len(insight.DTYPES), 1, subplot_titles=insight.DTYPES, vertical_spacing=0.24)
    for line, dtype in enumerate(insight.DTYPES, 1):
        these = [row for row in rows if (row.dtype, row.top_k) == (dtype, insight.TOP_K)]
        for call in insight.CALLS[1:]:
            figure.add_trace(
                Bar(
                    x=[row.name for row in these], y=[row.ratio(call) for row in these],
                    name=call, legendgroup=call, showlegend=line == 1, marker={"color": style(call)[0]},
                    hovertemplate="%{x}: %{y:.2f}<extra>" + call + "</extra>",
                ),
                row=line, col=1,
            )  # fmt: skip
        figure.add_hline(1, line={"color": GREY, "dash": "dot"}, row=line, col=1)
    figure.update_yaxes(title="x attention", rangemode="tozero")
    return Chart("Time beside attention's", laid_out(figure, 640, barmode="group"))
