"""What a run found: kept as JSON, and written as tables to read."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpu_check.contestants import PEERS
from gpu_check.processes import Outcome
from gpu_check.targets import TARGETS

SCHEMA = 1
BAD = ("wrong", "failed", "crashed", "hung")
_SHORT = {"portable atomic": "atomic", "cudnn folded": "cudnn (f)", "flash folded": "flash (f)"}


_LEGEND = """\
Rates are TFLOP/s of visible pairs; of decode rows GB/s, each input and output counted once; of overhead rows
microseconds of the host. In brackets the share of the ceiling measured in this run. Medians of event times,
contestants in turns, the second-level cache overwritten before each call. Every result was held against
float64 before it was timed. (f): query heads folded into rows. ~: quartiles a tenth of the median apart.
"""


@dataclass
class Report:
    """One run. Everything in it was measured or seen on `machine`."""

    when: str
    machine: dict[str, str]
    commit: str
    seed: int
    minutes: float
    seconds: dict[str, float] = field(default_factory=dict)  # of each part of the run
    checks: dict[str, list[Outcome]] = field(default_factory=dict)  # by group
    rows: list[Outcome] = field(default_factory=list)
    ceilings: dict[str, float] = field(default_factory=dict)  # FLOP/s and bytes/s
    notes: list[str] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write gpu-check.json, gpu-check.md and gpu-check.log."""
        folder.mkdir(parents=True, exist_ok=True)
        content = {"schema": SCHEMA, **asdict(self), "targets": self.targets()}
        (folder / "gpu-check.json").write_text(json.dumps(content, indent=1) + "\n")
        (folder / "gpu-check.md").write_text(markdown(self))
        logs = [f"== {x.label}: {x.status}: {x.why}\n{x.log}\n" for x in self.everything() if x.status in BAD]
        (folder / "gpu-check.log").write_text("\n".join(logs))

    def add_row(self, outcome: Outcome) -> None:
        """Take in a row of the benchmark, or the ceilings."""
        self.ceilings |= outcome.found.get("ceilings", {})
        self.rows.append(outcome)

    def everything(self) -> Iterator[Outcome]:
        for outcomes in self.checks.values():
            yield from outcomes
        yield from self.rows

    def targets(self) -> list[dict[str, Any]]:
        """Each mark with what was reached, None where it was not measured."""
        rows = {row.label: row.found for row in self.rows}
        return [
            {"title": x.title, "must": x.must, "aim": x.aim, "reached": x.reached(rows, self.ceilings)}
            for x in TARGETS
        ]

    def passed(self) -> bool:
        """Whether nothing was found wrong."""
        return not any(outcome.status in BAD for outcome in self.everything()) and not any(
            entry["status"] in BAD
            for row in self.rows
            for name, entry in _contestants(row).items()
            if name not in PEERS
        )


def markdown(report: Report) -> str:
    """Every table."""
    parts = [
        "# gpu-check\n",
        _facts(report),
        "## Marks\n",
        _table(("mark", "must", "aim", "reached"), _target_cells(report)),
        "## Checks\n",
        _table(("group", "right", "skipped", "left out", "wrong", "worst error"), _check_cells(report)),
        *_failures(report),
    ]
    for title, rows in _sections(report):
        parts += [f"## {title}\n", _table(*_rate_cells(report, rows))]
    parts += [
        _LEGEND,
        *(f"- {note}\n" for note in [*report.notes, *_refusals(report)]),
    ]
    return "\n".join(parts)


def summary(report: Report) -> str:
    """For a terminal: what went wrong, the marks, and a line for each row."""
    lines = [_facts(report).strip()]
    checks = [("group", "right", "skipped", "left out", "wrong", "worst"), *_check_cells(report)]
    lines += [_plain(cells, (18, 6, 8, 9, 6, 8)) for cells in checks]
    lines += [line[:230] for line in _failures(report)][:14]
    for _, rows in _sections(report):
        header, cells = _rate_cells(report, rows)
        widths = [34, *[max(13, len(name) + 1) for name in header[1:]]]
        lines += ["", _plain(header, widths), *(_plain(row, widths) for row in cells)]
    lines += [f"note: {note[:230]}" for note in [*report.notes, *_refusals(report)]][:14]
    lines += ["", _plain(("mark", "must", "aim", "reached"), (62, 6, 6, 14))]
    lines += [_plain(cells, (62, 6, 6, 14)) for cells in _target_cells(report)]
    return "\n".join(lines)


def _facts(report: Report) -> str:
    machine = ", ".join(f"{name} {value}" for name, value in report.machine.items())
    limits = ", ".join(f"{name} {_ceiling(name, value)}" for name, value in report.ceilings.items())
    took = ", ".join(f"{name} {value:.0f} s" for name, value in report.seconds.items())
    return (
        f"{machine}; {report.when}, commit {report.commit}, seed {report.seed}\nceilings: {limits}; {took}\n"
    )


def _ceiling(name: str, value: float) -> str:
    return f"{value / 1e12:.0f} TFLOP/s" if name == "matmul" else f"{value / 1e9:.0f} GB/s"


def _target_cells(report: Report) -> list[tuple[str, ...]]:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    return [
        (
            entry["title"], number(entry["must"]), number(entry["aim"]),
            "not measured" if entry["reached"] is None else number(entry["reached"]),
        )
        for entry in report.targets()
    ]  # fmt: skip


def _check_cells(report: Report) -> list[tuple[str, ...]]:
    cells = []
    for group, outcomes in report.checks.items():
        count = Counter(outcome.status for outcome in outcomes)
        errors = [x for outcome in outcomes for name, x in outcome.found.items() if name != "lse"]
        cells.append((
            group, str(count["right"]), str(count["skipped"]), str(count["left out"]),
            str(sum(count[status] for status in BAD)), f"{max(errors):.1e}" if errors else "",
        ))  # fmt: skip
    return cells


def _failures(report: Report) -> list[str]:
    """A line for each reason: what it was about, and how often it came."""
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for group, outcomes in [*report.checks.items(), ("benchmark", report.rows)]:
        for x in outcomes:
            if x.status in BAD:
                grouped.setdefault((group, x.status, x.why), []).append(x.label)
    lines = []
    for (group, status, why), labels in grouped.items():
        more = f" and {len(labels) - 1} more" if len(labels) > 1 else ""
        lines.append(f"- {group}, {labels[0]}{more}: {status}: {why}\n")
    return lines


def _sections(report: Report) -> Iterator[tuple[str, list[Outcome]]]:
    timed = [row for row in report.rows if _contestants(row)]
    chosen = {
        "Forward": lambda label: label.endswith("forward") and not label.startswith("overhead"),
        "Backward": lambda label: label.endswith("backward"),
        "Decode, under a CUDA graph": lambda label: label.endswith("graph"),
        "Launch overhead": lambda label: label.startswith("overhead"),
    }
    for title, belongs in chosen.items():
        if rows := [row for row in timed if belongs(row.label)]:
            yield title, rows


def _rate_cells(report: Report, rows: list[Outcome]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    names = list({name: None for row in rows for name in _contestants(row)})
    cells = [(row.label, *(_rate(report, row, name) for name in names)) for row in rows]
    return ("row", *(_SHORT.get(name, name) for name in names)), cells


def _rate(report: Report, row: Outcome, name: str) -> str:
    entry = _contestants(row).get(name)
    if entry is None:
        return ""
    if "seconds" not in entry:
        return {"refused": "-"}.get(entry["status"], entry["status"])
    seconds, unsure = entry["seconds"], "~" if entry["spread"] > 0.1 else ""
    if row.label.startswith("overhead"):
        return f"{unsure}{1e6 * seconds:.1f} us"
    ceiling, done = (
        ("copy", row.found["bytes"]) if row.label.endswith("graph") else ("matmul", row.found["flops"])
    )
    rate, limit = done / seconds, report.ceilings.get(ceiling, math.nan)
    shown = f"{rate / 1e9:.0f}" if ceiling == "copy" else f"{rate / 1e12:.0f}"
    return f"{unsure}{shown} ({rate / limit:.0%})" if limit == limit else unsure + shown


def _refusals(report: Report) -> list[str]:
    """Why contestants have no time, a line for each reason."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in report.rows:
        for name, entry in _contestants(row).items():
            if entry["status"] != "right":
                found.setdefault((name, entry["status"], entry.get("why", "")), []).append(row.label)
    lines = [f"{name} {status} in {len(rows)} rows, {rows[0]} first: {why}"
             for (name, status, why), rows in found.items()]  # fmt: skip
    left = [row.label for row in report.rows if row.status == "left out"]
    return [*lines, f"{len(left)} rows were left out for want of time: {', '.join(left)}"] if left else lines


def _contestants(row: Outcome) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = row.found.get("contestants", {})
    return found


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" if i == 0 else "--:" for i in range(len(header))), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _plain(cells: tuple[str, ...], widths: Any) -> str:
    first, *rest = zip(cells, widths, strict=True)
    return (f"{first[0]:<{first[1]}}" + "".join(f"{cell:>{width}}" for cell, width in rest)).rstrip()
