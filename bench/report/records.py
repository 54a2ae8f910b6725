"""Which records the page is made of, and which row counts where one was measured twice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import generation, insight
from bench.results import BASE, FOLDER, Row, Run, find


@dataclass(frozen=True)
class Measured:
    """A row, the run that it is of, and the record that keeps it."""

    run: Run
    row: Row
    record: str

    @property
    def rank(self) -> tuple[int, str]:
        """Of a row measured twice, the one held against more libraries counts, and then the later."""
        right = (x.status == "right" and not name.endswith(BASE) for name, x in self.row.contestants.items())
        return sum(right), self.run.when


@dataclass
class Records:
    """What was read, by kind."""

    rows: list[Measured] = field(default_factory=list)
    generation: dict[str, Path] = field(default_factory=dict)
    insight: dict[str, Path] = field(default_factory=dict)
    variants: dict[str, Path] = field(default_factory=dict)  # the latest of each machine and set of parts
    gpu_checks: dict[str, dict[str, Any]] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)  # of kinds that the page does not show

    def suites(self) -> dict[tuple[str, str, str, int], list[Measured]]:
        """Rows that count, by suite, CPU, instruction set and threads."""
        best: dict[tuple[str, str, str, int], dict[tuple[str, str], Measured]] = {}
        for measured in self.rows:
            run, row = measured.run, measured.row
            group = best.setdefault((run.suite, run.machine["cpu"], run.machine["isa"], run.threads), {})
            key = row.name, row.dtype
            if key not in group or group[key].rank <= measured.rank:
                group[key] = measured
        return {key: list(group.values()) for key, group in best.items()}


def read(names: Sequence[str] = ()) -> Records:
    """The records named, or all that are kept; of the checks of one GPU the latest.

    Raises ValueError for one that cannot be read.
    """
    records = Records()
    for path in [find(name) for name in names] or sorted(FOLDER.glob("*.json")):
        _sort_in(path, records)
    return records


def _sort_in(path: Path, records: Records) -> None:
    try:
        content = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error
    suite = content.get("suite") if isinstance(content, dict) else None
    if suite == generation.SUITE:
        records.generation[path.stem] = path
    elif suite == insight.SUITE:
        records.insight[path.stem] = path
    elif suite == "variants":
        machine = content["machine"]
        key = machine["cpu"], machine["isa"], content["threads"], *content["parts"]
        records.variants[" ".join(map(str, key))] = path  # files come in the order of their dates
    elif suite is not None and all("contestants" in row for row in content.get("rows", [{}])):
        run = Run.load(path)
        records.rows += [Measured(run, row, path.stem) for row in run.rows]
    elif isinstance(content, dict) and {"checks", "targets", "rows"} <= content.keys():
        chip = content["machine"].get("chip", "")
        if chip not in records.gpu_checks or records.gpu_checks[chip]["when"] <= content["when"]:
            records.gpu_checks[chip] = {**content, "record": path.stem}
    else:
        records.others.append(path.stem)
