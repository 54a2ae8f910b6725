"""``python -m bench compare A B``: what became of A's figures in B."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from bench import tables
from bench.results import Row, Run, find

TOLERANCE = 0.05


@dataclass(frozen=True)
class Change:
    """One row in both results. Ratios are B over A: above 1 is faster."""

    name: str
    speed: float  # by time
    share: float  # by share of the ceiling, NaN where one is not known
    verdict: str  # same, faster, REGRESSION, busy (perhaps the same), WRONG, gone, new
    before: float  # seconds
    after: float

    @property
    def regressed(self) -> bool:
        return self.verdict in ("REGRESSION", "WRONG")


def compare(a: Run, b: Run, tolerance: float = TOLERANCE) -> list[Change]:
    """Rows of A, then those that only B has.

    Judged by the share of the ceiling where both have one, so that a machine that clocks differently from one
    hour to the next does not decide; by time otherwise. What the spread of the samples explains is no change;
    figures from a busy machine must differ by twice as much.
    """
    rows = {(row.name, row.dtype): row for row in b.rows}
    changes = [_change(a, row, b, rows.pop((row.name, row.dtype), None), tolerance) for row in a.rows]
    new = [Change(f"{name} {dtype}", math.nan, math.nan, "new", math.nan, math.nan) for name, dtype in rows]
    return changes + new


def _change(a: Run, before: Row, b: Run, after: Row | None, tolerance: float) -> Change:
    name, old = f"{before.name} {before.dtype}", a.figures(before, "fastattn")
    if after is None:
        return Change(name, math.nan, math.nan, "gone", math.nan, math.nan)
    new = b.figures(after, "fastattn")
    if new is None or old is None:
        verdict = "WRONG" if new is None else "new"
        return Change(
            name,
            math.nan,
            math.nan,
            verdict,
            old.seconds if old else math.nan,
            new.seconds if new else math.nan,
        )
    speed = old.seconds / new.seconds
    comparable = before.quotes_ceiling and before.limit == after.limit and old.share and new.share
    share = new.share / old.share if comparable else math.nan
    judged = share if comparable else speed
    busy = not (old.trusted and new.trusted)
    slack = (1 + busy) * max(tolerance, (old.spread + new.spread) / 2)
    verdict = (
        "faster" if judged > 1 + slack else "REGRESSION" if judged < 1 - slack else "busy" if busy else "same"
    )
    return Change(name, speed, share, verdict, old.seconds, new.seconds)


def main(arguments: list[str], console: Console) -> int:
    """Print the table; 1 with a regression. ValueError for results that cannot be read or compared."""
    parser = argparse.ArgumentParser(prog="python -m bench compare", description=__doc__)
    parser.add_argument("a", help="a file, or its name in bench/results")
    parser.add_argument("b")
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help="slower by this much is no regression"
    )
    options = parser.parse_args(arguments)
    a, b = Run.load(find(options.a)), Run.load(find(options.b))
    if a.suite != b.suite:
        raise ValueError(f"{options.a} is of the suite {a.suite!r}, {options.b} of {b.suite!r}")
    changes = compare(a, b, options.tolerance)
    if all(change.verdict in ("gone", "new") for change in changes):
        raise ValueError(f"{options.a} and {options.b} have no row in common")
    console.print(_table(a, b, changes))
    for what, left, right in (("CPU", a.machine["cpu"], b.machine["cpu"]), ("threads", a.threads, b.threads)):
        if left != right:
            console.print(f"not the same {what}: {left} and {right}", style="yellow")
    busy = sum(change.verdict == "busy" for change in changes)
    if busy:
        console.print(f"rows not decided, since the machine was busy: {busy}", style="yellow")
    regressed = sum(change.regressed for change in changes)
    console.print(f"[bold red]regressions: {regressed}" if regressed else "[green]no regression")
    return int(regressed > 0)


def _table(a: Run, b: Run, changes: list[Change]) -> Table:
    result = Table(
        title=f"{a.suite}: {a.when} ({_commit(a)}) and {b.when} ({_commit(b)})", title_justify="left"
    )
    result.add_column("case")
    for heading in ("A", "B", "speed B / A", "share of peak B / A", ""):
        result.add_column(heading, justify="right", no_wrap=True)
    colours = {"faster": "green", "REGRESSION": "bold red", "WRONG": "bold red", "same": "dim"}
    for change in changes:
        cells = ["" if math.isnan(x) else tables.time(x) for x in (change.before, change.after)]
        cells += ["" if math.isnan(x) else f"{x:.2f}" for x in (change.speed, change.share)]
        result.add_row(change.name, *cells, f"[{colours.get(change.verdict, 'yellow')}]{change.verdict}")
    return result


def _commit(run: Run) -> str:
    return f"{run.git['commit'][:7] or 'no commit'}{'+' if run.git['dirty'] else ''}"
