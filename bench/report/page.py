"""The page itself: sections through a template, plotly's JavaScript in it once."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs
from rich.console import Console

from bench.goals import AIM, BELOW, MUST, SHORT
from bench.report import insight, others, suites
from bench.report.records import Records, read
from bench.report.view import SIGNS, Cell, Chart, Section, Table

OUT = Path("build/bench-report.html")


def html(records: Records) -> str:
    """The whole page. Raises ValueError where there is no record to show."""
    sections = [*suites.sections(records), *others.generating(records), *beside_recurrent(records)]
    sections += [*insight.section(records), *others.gpu_checks(records)]
    if not sections:
        raise ValueError("no record to show: python -m bench SUITE makes one")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("page.html.j2").render(
        plotly=Markup(get_plotlyjs()), sections=sections, goals=goals(records), picture=picture, signs=SIGNS,
        others=records.others,
    )  # fmt: skip


def beside_recurrent(records: Records) -> list[Section]:
    """What there is of attention beside recurrent networks, whose module imports torch."""
    if not records.variants:
        return []
    from bench.report import recurrent

    return [recurrent.section(path) for path in records.variants.values()]


_WORDS = {
    "share": "share of the ceiling", "peers": "against the best peer", "base": "against its base",
    "seconds": "time of a call", "reading": "attention over reading its bytes",
    "attention": "time over that of attention",
}  # fmt: skip


def goals(records: Records) -> Table:
    """Every goal that was measured, those that are short first."""
    lines = []
    for judged in [*suites.goals(records), *others.goals(records), *insight.goals(records)]:
        goal = judged.goal
        at = sorted(judged.values.items(), key=lambda item: item[1], reverse=goal.at_most)
        (worst_row, worst), best = at[0], at[-1][1]
        told = goal.text(worst) if len(at) == 1 else f"{goal.text(worst)} to {goal.text(best)}"
        lines.append([
            Cell(f"{goal.suite}: {goal.title.replace('_', ' ')}", "", f"#{judged.anchor}"),
            Cell(_WORDS.get(goal.of, f"against {goal.of}")),
            Cell(told, goal.verdict(worst), f"furthest: {worst_row}"),
            Cell(goal.text(goal.must)), Cell(goal.text(goal.aim)), Cell(judged.machine),
        ])  # fmt: skip
    lines.sort(key=lambda line: (SHORT, BELOW, MUST, AIM).index(line[2].verdict))
    header = ("rows", "of", "reached", "must", "aim", "machine")
    return Table("", header, lines, "The verdict is that of the row that is furthest away.")


def picture(chart: Chart) -> Markup:
    """A chart as a div and its script."""
    config: dict[str, Any] = {"displaylogo": False, "responsive": True}
    return Markup(chart.figure.to_html(full_html=False, include_plotlyjs=False, config=config))


def main(arguments: Sequence[str], console: Console) -> int:
    """Write the page. Raises ValueError for a record that is not there or cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m bench report", description=__doc__)
    parser.add_argument("results", nargs="*", help="files, or their names in bench/results; all by default")
    parser.add_argument("--out", type=Path, default=OUT, help=f"{OUT} by default")
    options = parser.parse_args(arguments)
    records = read(options.results)
    text = html(records)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text)
    verdicts = [line[2].verdict for line in goals(records).rows]
    console.print(
        f"{len(verdicts)} goals measured: {verdicts.count(AIM)} at their aim, {verdicts.count(SHORT)} short"
    )
    console.print(f"written to {os.path.relpath(options.out)}", style="dim")
    return 0
