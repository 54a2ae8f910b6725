"""Sections of records that are no suite: a model that generates, and the checks on a GPU."""

from __future__ import annotations

import math
from typing import Any

from plotly.graph_objects import Bar, Figure
from plotly.subplots import make_subplots

from bench import generation
from bench.colours import style
from bench.goals import AIM, BELOW, MUST, SHORT, Goal, goals_of
from bench.report.charts import laid_out
from bench.report.records import Records
from bench.report.suites import Judged, machine
from bench.report.view import Cell, Chart, Section, Table

_BAD = ("wrong", "failed", "crashed", "hung")


def generating(records: Records) -> list[Section]:
    """Tokens a second with each implementation of attention; none without records of it."""
    if not records.generation:
        return []
    rows, run = generation.load(list(map(str, records.generation.values())))
    facts = {
        "machine": machine(run.machine["cpu"], run.machine["isa"], run.threads),
        "versions": ", ".join(f"{name} {version}" for name, version in run.versions.items()),
        "streaming read": f"{_read(rows):.0f} GB/s, the median of those beside the rows",
        "records": ", ".join(records.generation),
    }
    by_key = {(row.implementation, row.dtype, row.length): row for row in rows}
    lines = [
        _generated(row, by_key.get(("sdpa", row.dtype, row.length)), run.machine["isa"])
        for row in sorted(rows, key=lambda row: (row.dtype, row.length, row.implementation))
    ]
    header = ("implementation", "dtype", "prompt", "prompt tokens/s", "tokens/s after it", "x sdpa",
              "attention", "x reading its bytes", "MiB at most")  # fmt: skip
    note = (
        "SmolLM2-135M, 64 greedy tokens. Attention: its part of a token's time. x sdpa: tokens a second "
        "after the prompt."
    )
    return [
        Section(
            "generation",
            f"generation: {facts['machine']}",
            "a model that generates, whole",
            facts,
            [Table("", header, lines, note)],
            [_generation_chart(rows)],
        )
    ]


def _reached(row: generation.Row, sdpa: generation.Row | None) -> dict[str, float]:
    """Of sdpa's tokens a second, and of the time that reading keys and values takes."""
    return {
        "sdpa": row.decode / sdpa.decode if sdpa else math.nan,
        "reading": row.over_reading if any(row.made["attention"]) else math.nan,
    }


def goals(records: Records) -> list[Judged]:
    """The goals of a model that generates."""
    if not records.generation:
        return []
    rows, run = generation.load(list(map(str, records.generation.values())))
    by_key = {(row.implementation, row.dtype, row.length): row for row in rows}
    found: dict[Goal, dict[str, float]] = {}
    for row in (row for row in rows if row.implementation == "fastattn"):
        values = _reached(row, by_key.get(("sdpa", row.dtype, row.length)))
        for goal in goals_of(generation.SUITE, str(row.length), row.dtype, run.machine["isa"]):
            if not math.isnan(values[goal.of]):
                found.setdefault(goal, {})[f"{row.length} {row.dtype}"] = values[goal.of]
    where = machine(run.machine["cpu"], run.machine["isa"], run.threads)
    return [Judged(goal, where, "generation", values) for goal, values in found.items()]


def _read(rows: list[generation.Row]) -> float:
    """GB/s of a streaming read, the median of those beside the rows."""
    return sorted(row.read for row in rows)[len(rows) // 2]


def _generated(row: generation.Row, sdpa: generation.Row | None, isa: str) -> list[Cell]:
    reached, attends = _reached(row, sdpa), any(row.made["attention"])
    cells = {of: Cell("" if math.isnan(value) else f"{value:.2f}") for of, value in reached.items()}
    if row.implementation == "fastattn":
        for goal in goals_of(generation.SUITE, str(row.length), row.dtype, isa):
            value = reached[goal.of]
            marks = f"must {goal.text(goal.must)}, aim {goal.text(goal.aim)}"
            cells[goal.of] = Cell(cells[goal.of].text, goal.verdict(value), marks)
    return [
        Cell(row.implementation), Cell(row.dtype), Cell(str(row.length)), Cell(f"{row.prefill:.0f}"),
        Cell(f"{row.decode:.1f}"), cells["sdpa"] if row.implementation != "sdpa" else Cell(""),
        Cell(f"{row.share:.0%}" if attends else ""), cells["reading"], Cell(f"{row.memory:.0f}"),
    ]  # fmt: skip


def _generation_chart(rows: list[generation.Row]) -> Chart:
    titles = [f"{dtype}, {part}" for dtype in generation.DTYPES for part in ("prompt", "after it")]
    figure = make_subplots(2, 2, subplot_titles=titles, vertical_spacing=0.16)
    for line, dtype in enumerate(generation.DTYPES, 1):
        for column, part in enumerate(("prefill", "decode"), 1):
            for name in generation.IMPLEMENTATIONS:
                these = sorted((r for r in rows if (r.implementation, r.dtype) == (name, dtype)),
                               key=lambda row: row.length)  # fmt: skip
                figure.add_trace(
                    Bar(
                        x=[str(row.length) for row in these], y=[getattr(row, part) for row in these],
                        name=name, legendgroup=name, showlegend=line == column == 1,
                        marker={"color": style(name)[0]},
                        hovertemplate="%{x} tokens: %{y:.1f} tokens/s<extra>" + name + "</extra>",
                    ),
                    row=line, col=column,
                )  # fmt: skip
    figure.update_xaxes(
        type="category", categoryorder="array", categoryarray=list(map(str, generation.LENGTHS))
    )
    figure.update_xaxes(title="tokens of the prompt", row=2)
    figure.update_yaxes(title="tokens a second", col=1)
    return Chart("Tokens a second", laid_out(figure, 560, barmode="group"))


def gpu_checks(records: Records) -> list[Section]:
    """What `make gpu-check` found, a section a GPU."""
    return [_gpu_check(content) for content in records.gpu_checks.values()]


def _gpu_check(content: dict[str, Any]) -> Section:
    told = content["machine"]
    ceilings = ", ".join(f"{name} {_ceiling(name, value)}" for name, value in content["ceilings"].items())
    facts = {
        "machine": ", ".join(f"{name} {value}" for name, value in told.items()),
        "ceilings": ceilings,
        "record": f"{content['record']} ({content['commit']}), {content['when'][:10]}",
    }
    rates = [_rates(content, title, rows) for title, rows in _kinds(content["rows"])]
    return Section(
        f"gpu-{content['record']}", f"gpu-check: {told.get('chip', '')}",
        "every kernel against float64, and how fast it is",
        facts, [_marks(content), _checks(content), *rates],
        [_gpu_bars(title, rows) for title, rows in _kinds(content["rows"])],
        [*content["notes"], *_failures(content)],
    )  # fmt: skip


def _ceiling(name: str, value: float) -> str:
    return f"{value / 1e12:.0f} TFLOP/s" if name == "matmul" else f"{value / 1e9:.0f} GB/s"


def gpu_verdict(mark: dict[str, Any]) -> str:
    """What a mark of a GPU's record reached."""
    value = mark["reached"]
    if value is None:
        return ""
    if value >= mark["aim"]:
        return AIM
    return BELOW if mark["must"] is None else MUST if value >= mark["must"] else SHORT


def _marks(content: dict[str, Any]) -> Table:
    rows = [
        [
            Cell(mark["title"]),
            *(Cell("-" if mark[x] is None else f"{mark[x]:.2f}") for x in ("must", "aim")),
            Cell("not measured" if mark["reached"] is None else f"{mark['reached']:.2f}", gpu_verdict(mark)),
        ]
        for mark in content["targets"]
    ]  # fmt: skip
    return Table("Marks", ("mark", "must", "aim", "reached"), rows)


def _checks(content: dict[str, Any]) -> Table:
    rows = []
    for group, outcomes in content["checks"].items():
        count = [outcome["status"] for outcome in outcomes]
        wrong = sum(status in _BAD for status in count)
        worst = [x for outcome in outcomes for name, x in outcome["found"].items() if name != "lse"]
        rows.append([
            Cell(group), *(Cell(str(count.count(status))) for status in ("right", "skipped", "left out")),
            Cell(str(wrong)), Cell(f"{max(worst):.1e}" if worst else ""),
        ])  # fmt: skip
    header = ("group", "right", "skipped", "left out", "wrong", "worst error")
    return Table("Checks against float64", header, rows)


def _failures(content: dict[str, Any]) -> list[str]:
    """A line for each check that found something wrong."""
    return [
        f"{group}, {outcome['label']}: {outcome['status']}: {outcome['why']}"
        for group, outcomes in content["checks"].items()
        for outcome in outcomes
        if outcome["status"] in _BAD
    ]


def _kinds(rows: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    timed = [
        row for row in rows if row["found"].get("contestants") and not row["label"].startswith("overhead")
    ]
    kinds = {"Forward": " forward", "Backward": " backward", "Decode, under a CUDA graph": " graph"}
    found = [(title, [row for row in timed if row["label"].endswith(end)]) for title, end in kinds.items()]
    return [(title, rows) for title, rows in found if rows]


def _names(rows: list[dict[str, Any]]) -> list[str]:
    return list({name: None for row in rows for name in row["found"]["contestants"]})


def _rate(row: dict[str, Any], name: str) -> float:
    """TFLOP/s, or GB/s of a row under a graph; NaN where it was not timed."""
    entry, found = row["found"]["contestants"].get(name, {}), row["found"]
    if "seconds" not in entry:
        return math.nan
    done = found["bytes"] / 1e9 if row["label"].endswith("graph") else found["flops"] / 1e12
    return done / entry["seconds"]


def _rates(content: dict[str, Any], title: str, rows: list[dict[str, Any]]) -> Table:
    reads = rows[0]["label"].endswith("graph")
    ceiling = content["ceilings"].get("copy" if reads else "matmul", math.nan) / (1e9 if reads else 1e12)
    names = _names(rows)

    def cell(row: dict[str, Any], name: str) -> Cell:
        entry, rate = row["found"]["contestants"].get(name), _rate(row, name)
        if entry is None or math.isnan(rate):
            return Cell("" if entry is None else entry["status"], "", entry.get("why", "") if entry else "")
        told = f"{1e6 * entry['seconds']:.1f} µs, ±{entry['spread']:.0%}, error {entry['error']:.1e}"
        return Cell(f"{rate:.0f} ({rate / ceiling:.0%})", "", told)

    lines = [[Cell(row["label"].rsplit(" ", 1)[0]), *(cell(row, name) for name in names)] for row in rows]
    return Table(title, ("row", *names), lines, f"{'GB/s' if reads else 'TFLOP/s'} (share of the ceiling).")


def _gpu_bars(title: str, rows: list[dict[str, Any]]) -> Chart:
    figure = Figure()
    for name in _names(rows):
        rates = [_rate(row, name) for row in rows]
        figure.add_trace(
            Bar(
                x=[row["label"].rsplit(" ", 1)[0] for row in rows],
                name=name,
                y=[None if math.isnan(rate) else rate for rate in rates],
                marker={"color": style(name)[0]},
                hovertemplate="%{x}<br>%{y:.0f}<extra>" + name + "</extra>",
            )
        )
    figure.update_yaxes(title="GB/s" if rows[0]["label"].endswith("graph") else "TFLOP/s")
    return Chart(title, laid_out(figure, 440, barmode="group"))
