"""What a run says, as a table to read."""

from __future__ import annotations

import math

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.results import BASE, Row, Run
from bench.suites import SUITES

_SHORT = {"onnxruntime": "ort"}


def table(run: Run) -> Table:
    """Rows in the order measured, a section a dtype; rates of peers in columns of their own."""
    peers = [name for name in run.peers() if name != "fastattn"]
    title = f"{run.suite}: {run.machine['cpu']}, {run.machine['isa']}, {run.threads} threads; medians"
    result = Table(title=title, title_justify="left")
    result.add_column("case", overflow="fold")
    held = any(row.base for row in run.rows)
    headings = ["time", "±", "rate", "of peak", *(["of base"] if held else [])]
    headings += [
        *(_SHORT.get(name, name) for name in peers),
        *(["x best peer"] if peers else []),
        "error",
        "dropped",
    ]
    for heading in headings:
        result.add_column(heading, justify="right", no_wrap=True)
    for row, following in zip(run.rows, [*run.rows[1:], None], strict=True):
        end = following is None or _section(row) != _section(following)
        result.add_row(*_cells(run, row, peers, held), end_section=end)
    return result


def _section(row: Row) -> str:
    return row.limit.isa or row.dtype


def _cells(run: Run, row: Row, peers: list[str], held: bool) -> list[str]:
    ours, found = row.contestants["fastattn"], run.figures(row, "fastattn")
    name = f"{row.name} {row.dtype}"
    if found is None:
        cells = [name, f"[bold red]{ours.status.upper()}", "", "", "", *([""] if held else [])]
    else:
        cells = [name + ("" if found.trusted else " [yellow]~"), time(found.seconds), f"{found.spread:.0%}"]
        cells += [
            f"{rate(run.rate(row, 'fastattn'))} {row.unit}",
            f"{found.share:.0%}" if _quoted(row, found.share) else "-",
        ]
        if held:
            cells.append(_ratio(run.of_base(row, "fastattn")) if row.base else "")
    cells += [_peer(run, row, peer) for peer in peers]
    if peers:
        cells.append(_against_best(run, row, peers))
    return [*cells, "" if ours.error is None else f"{ours.error:.0e}", dropped(run, row)]


def _quoted(row: Row, share: float) -> bool:
    return row.quotes_ceiling and share > 0


def _peer(run: Run, row: Row, peer: str) -> str:
    """A rate, or one word: why is among the notes."""
    contestant = row.contestants.get(peer)
    if contestant is None or contestant.status in ("absent", "refused"):
        return "[dim]-"
    if contestant.status != "right":
        return {"lower": "[yellow]lower", "wrong": "[red]wrong"}.get(contestant.status, "[red]failed")
    text = rate(run.rate(row, peer))
    ratio = run.of_base(row, peer) if row.base else math.nan
    return text if math.isnan(ratio) else f"{text} ({_ratio(ratio)})"


def best_peer(run: Run, row: Row, peers: list[str]) -> tuple[str, float]:
    """The fastest peer that was right, and our speed over its; ("", NaN) without one."""
    times = {peer: found.seconds for peer in peers if (found := run.figures(row, peer)) is not None}
    ours = run.figures(row, "fastattn")
    if not times or ours is None:
        return "", math.nan
    best = min(times, key=times.__getitem__)
    return best, times[best] / ours.seconds


def _against_best(run: Run, row: Row, peers: list[str]) -> str:
    best, ratio = best_peer(run, row, peers)
    return f"[{'green' if ratio >= 1 else 'red'}]{ratio:.2f}[/] {_SHORT.get(best, best)}" if best else ""


def dropped(run: Run, row: Row) -> str:
    """Samples that did not count, of all that were taken in the row."""
    found = [run.figures(row, name) for name in row.contestants]
    lost = sum(figures.dropped for figures in found if figures)
    return f"{lost}/{lost + sum(figures.kept for figures in found if figures)}"


def time(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.1f} µs"


def rate(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def _ratio(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"


def notes(run: Run, console: Console) -> None:
    """Say what the columns mean, where not to trust them, and who is missing and why."""
    best = ", ".join(f"{name} {value:.0f}" for name, value in run.ceilings.items())
    console.print(f"best readings of the ceilings, GFLOP/s or GB/s: {best}", style="dim", highlight=False)
    console.print(
        f"rate: {SUITES[run.suite].rate}; of peak: of the "
        "higher reading beside each sample; ±: between quartiles; dropped: while the machine was slow",
        style="dim",
    )
    if any(row.base for row in run.rows):
        console.print(
            f"of base, and in brackets: rate over that of {SUITES[run.suite].base}, in the same rounds",
            style="dim",
        )
    if any(found and not found.trusted for row in run.rows for found in [run.figures(row, "fastattn")]):
        console.print(
            "~: the machine was busy in nearly all samples; the row counts all of them: run it again",
            style="yellow",
        )
    for peer, reason in run.absent.items():
        console.print(f"{peer} took no part: {escape(reason)}", style="dim", highlight=False)
    for line in reasons(run):
        console.print(line, style="dim", highlight=False, markup=False)


def reasons(run: Run) -> list[str]:
    """Why contestants have no time, a line for each reason, with the rows it is about."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in run.rows:
        for name, contestant in row.contestants.items():
            if contestant.status != "right" and not name.endswith(BASE):
                key = name, contestant.status, contestant.why
                found.setdefault(key, []).append(f"{row.name} {row.dtype}")
    lines = []
    for (name, status, why), rows in found.items():
        where = ", ".join(rows[:3]) + (f" and {len(rows) - 3} more" if len(rows) > 3 else "")
        lines.append(f"{name} {status}: {why} ({where})")
    return lines
