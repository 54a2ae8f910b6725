"""Sections of what ``python -m bench SUITE`` keeps, and the table of goals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from bench import tables
from bench.goals import Goal, goals_of, reached
from bench.report import charts
from bench.report.records import Measured, Records
from bench.report.view import Cell, Section, Table
from bench.results import Run
from bench.suites import SUITES


@dataclass(frozen=True)
class Judged:
    """A goal, where it was measured, and what each row reached."""

    goal: Goal
    machine: str
    anchor: str
    values: dict[str, float]


def sections(records: Records) -> list[Section]:
    """One for each suite and machine, in the order of the suites."""
    order = list(SUITES)
    groups = sorted(
        records.suites().items(),
        key=lambda item: order.index(item[0][0]) if item[0][0] in order else len(order),
    )
    return [_section(key, _in_order(key[0], rows)) for key, rows in groups]


def _in_order(suite: str, rows: list[Measured]) -> list[Measured]:
    """As the suite has them; rows that it has no more come last."""
    jobs = [(job.name, job.dtype) for job in SUITES[suite].jobs()] if suite in SUITES else []
    places = {key: place for place, key in enumerate(jobs)}
    return sorted(rows, key=lambda measured: places.get((measured.row.name, measured.row.dtype), len(places)))


def machine(cpu: str, isa: str, threads: int) -> str:
    return f"{cpu.replace('(R)', '').replace(' Processor', '')}, {isa}, {threads} thread{'s' * (threads > 1)}"


def _section(key: tuple[str, str, str, int], rows: list[Measured]) -> Section:
    suite, cpu, isa, threads = key
    known = SUITES.get(suite)
    runs = {measured.record: measured.run for measured in rows}
    latest = max(runs.values(), key=lambda run: run.when)
    versions = {name: version for run in runs.values() for name, version in run.versions.items()}
    facts = {
        "machine": f"{machine(cpu, isa, threads)}; {', '.join(latest.machine['features'])}; "
        f"{latest.machine['platform']}",
        "build": ", ".join(latest.machine["build"].values()),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "ceilings": ", ".join(f"{name} {rate:.0f}" for name, rate in _ceilings(runs).items())
        + " (GFLOP/s, GB/s)",
        "records": ", ".join(
            f"{record} ({run.git['commit'][:7] or 'no commit'}{'+' if run.git['dirty'] else ''})"
            for record, run in runs.items()
        ),
    }
    notes = [f"{peer} took no part: {why}" for run in runs.values() for peer, why in run.absent.items()]
    notes += [line for run in runs.values() for line in tables.reasons(run)]
    about = known.about if known else ""
    return Section(
        anchor=f"{suite}-{isa}-{threads}", title=f"{suite}: {machine(cpu, isa, threads)}", about=about,
        facts=facts, tables=[_table(suite, isa, rows)], charts=charts.of_suite(rows),
        notes=list(dict.fromkeys(notes)),
    )  # fmt: skip


def _ceilings(runs: dict[str, Run]) -> dict[str, float]:
    best: dict[str, float] = {}
    for run in runs.values():
        for name, rate in run.ceilings.items():
            best[name] = max(rate, best.get(name, 0.0))
    return best


def _table(suite: str, isa: str, rows: list[Measured]) -> Table:
    """A row a row; ratios coloured by the goals that they are judged by."""
    peers = [name for name in charts.contestants(rows) if name != "fastattn"]
    held = any(measured.row.base for measured in rows)
    header = ("case", "dtype", "time", "±", "rate", "of ceiling", *(["of base"] if held else []),
              *(["x best peer"] if peers else []), *(f"x {peer}" for peer in peers),
              "error", "record")  # fmt: skip
    known = SUITES.get(suite)
    note = f"Rate: {known.rate}. " if known else ""
    note += "x: our speed over theirs. ~: nearly all samples met a busy machine. Hover for details."
    if held and known:
        note += f" Base: {known.base}."
    return Table("", header, [_cells(suite, isa, measured, peers, held) for measured in rows], note)


def _cells(suite: str, isa: str, measured: Measured, peers: list[str], held: bool) -> list[Cell]:
    run, row = measured.run, measured.row
    goals = {goal.of: goal for goal in reversed(goals_of(suite, row.name, row.dtype, isa))}
    ours, found = row.contestants["fastattn"], run.figures(row, "fastattn")

    def judged(of: str, text: str, title: str = "") -> Cell:
        goal = goals.get(of)
        if goal is None:
            return Cell(text, "", title)
        verdict = goal.verdict(reached(goal, run, row))
        marks = f"{verdict or 'not measured'}: must {goal.text(goal.must)}, aim {goal.text(goal.aim)}"
        return Cell(text, verdict, f"{title}; {marks}" if title else marks)

    last = Cell(measured.record[-15:], "", f"{measured.record}, commit {run.git['commit'][:7]}")
    if found is None:
        empty = 3 + held + len(peers) + bool(peers)
        return [Cell(row.name), Cell(row.dtype), Cell(ours.status, "", ours.why), *[Cell("")] * empty,
                Cell(""), last]  # fmt: skip
    share = f"{found.share:.0%}" if row.quotes_ceiling and found.share else "-"
    cells = [
        Cell(
            ("" if found.trusted else "~ ") + row.name, "", f"{found.kept} samples, {found.dropped} dropped"
        ),
        Cell(row.dtype),
        judged("seconds", tables.time(found.seconds)),
        Cell(f"{found.spread:.0%}"),
        Cell(f"{tables.rate(run.rate(row, 'fastattn'))} {row.unit}"),
        judged("share", share, str(row.limit)),
    ]
    if held:
        cells.append(judged("base", _ratio(run.of_base(row, "fastattn")) if row.base else "", row.base))
    if peers:
        best, ratio = tables.best_peer(run, row, peers)
        cells.append(judged("peers", f"{ratio:.2f} {best}") if best else Cell(""))
    cells += [_against(measured, peer, judged) for peer in peers]
    return [*cells, Cell("" if ours.error is None else f"{ours.error:.0e}"), last]


def _against(measured: Measured, peer: str, judged: Callable[[str, str, str], Cell]) -> Cell:
    run, row = measured.run, measured.row
    contestant = row.contestants.get(peer)
    if contestant is None or contestant.status in ("absent", "refused"):
        return Cell("-", "", contestant.why if contestant else "took no part")
    found = run.figures(row, peer)
    if found is None:
        return Cell(contestant.status, "", contestant.why)
    told = f"{tables.time(found.seconds)}, {tables.rate(run.rate(row, peer))} {row.unit}"
    if row.base and not math.isnan(base := run.of_base(row, peer)):
        told += f", {base:.2f} of its own base"
    return judged(peer, _ratio(tables.best_peer(run, row, [peer])[1]), told)


def _ratio(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def goals(records: Records) -> list[Judged]:
    """Every goal that some row is judged by."""
    found = []
    for (suite, cpu, isa, threads), rows in records.suites().items():
        judged: dict[Goal, dict[str, float]] = {}
        for measured in rows:
            row = measured.row
            for goal in goals_of(suite, row.name, row.dtype, isa):
                value = reached(goal, measured.run, row)
                if not math.isnan(value):
                    judged.setdefault(goal, {})[f"{row.name} {row.dtype}"] = value
        where = machine(cpu, isa, threads), f"{suite}-{isa}-{threads}"
        found += [Judged(goal, *where, values) for goal, values in judged.items()]
    return found
