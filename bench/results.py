"""What a run leaves, as it is kept: everything measured, and on what, as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import subprocess
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from bench import work
from bench.ceilings import Limit
from bench.samples import Contestant, Figures, Reading, Sample, figures
from bench.suites import Job
from fastattn import _core
from tests.shapes import Case

FOLDER = Path(__file__).with_name("results")
BASE = " (base)"  # after the name of a contestant that runs the job a row is held against
_SCHEMA = 2


@dataclass
class Row:
    """One job, measured."""

    name: str
    dtype: str
    unit: str
    work: float  # of one call, in what `unit` counts a second
    base: str  # the job it is held against, "" without one
    base_work: float
    flops: float  # useful ones; with `bytes`, where it stands under a roofline; 0 for models
    bytes: float
    case: dict[str, Any]
    limit: Limit
    quotes_ceiling: bool
    contestants: dict[str, Contestant] = field(default_factory=dict)

    @classmethod
    def of(cls, job: Job, limit: Limit, quotes_ceiling: bool) -> Row:
        """A row without contestants."""
        case, base = job.case, job.base
        held_against = (
            "" if base is None else str(base) + (f", {base.threads} thread" if base.threads else "")
        )
        flops, moved = 0.0, 0.0
        if isinstance(case, Case):
            flops, moved = map(
                float, (work.useful_flops(case, job.mode), work.all_bytes(case, job.dtype, job.mode))
            )
        return cls(
            job.name, job.dtype, job.unit, job.work, held_against, base.work if base else 0.0,
            flops, moved, json.loads(json.dumps(dataclasses.asdict(case))), limit, quotes_ceiling,
        )  # fmt: skip


@dataclass
class Run:
    """All rows of a suite, and where they come from."""

    suite: str
    when: str
    machine: dict[str, Any]
    versions: dict[str, str]
    git: dict[str, Any]
    threads: int
    seconds: float
    absent: dict[str, str] = field(default_factory=dict)  # peers that took no part, and why
    ceilings: dict[str, float] = field(default_factory=dict)  # the best reading of each limit
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def begin(cls, suite: str, threads: int, seconds: float) -> Run:
        """An empty run, here and now."""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        git = {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain"))}
        return cls(suite, now, _machine(), _versions(), git, threads, seconds)

    def figures(self, row: Row, name: str) -> Figures | None:
        """What the samples of a contestant say; None where there are none."""
        contestant = row.contestants.get(name)
        if contestant is None:
            return None
        best = self.ceilings.get(str(row.limit), 0.0)
        return figures(contestant, self.work(row, name), best, row.limit.kind)

    def rate(self, row: Row, name: str) -> float:
        """Work a second; NaN where it was not timed."""
        found = self.figures(row, name)
        return self.work(row, name) / found.seconds if found else math.nan

    def of_base(self, row: Row, name: str) -> float:
        """Rate over that of the base in the same rounds."""
        return self.rate(row, name) / self.rate(row, name + BASE)

    @staticmethod
    def work(row: Row, name: str) -> float:
        return row.base_work if name.endswith(BASE) else row.work

    def peers(self) -> list[str]:
        """Everyone timed on some row, bases left out, in the order of the first row."""
        names = {name: None for row in self.rows for name in row.contestants if not name.endswith(BASE)}
        return [
            name
            for name in names
            if any(row.contestants[name].samples for row in self.rows if name in row.contestants)
        ]

    def save(self, path: Path | None = None) -> Path:
        """Write it, under its suite and time if no path is given."""
        if path is None:
            moment = datetime.fromisoformat(self.when)
            path = FOLDER / f"{self.suite}-{moment:%Y%m%d-%H%M%S}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            json.dumps({"schema": _SCHEMA, **dataclasses.asdict(self)}, indent=1, allow_nan=False) + "\n"
        )
        return path

    @classmethod
    def load(cls, path: Path) -> Run:
        """Read what `save` wrote. Raises ValueError, in words, for anything else."""
        try:
            content = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: {error}") from error
        if not isinstance(content, dict) or content.pop("schema", None) != _SCHEMA:
            raise ValueError(f"{path}: not a result of this version of the benchmark")
        if not all("contestants" in row for row in content["rows"]):
            raise ValueError(f"{path}: a result of {content['suite']!r}, whose rows are no suite's")
        content["rows"] = [_row(row) for row in content["rows"]]
        return cls(**content)


def find(name: str) -> Path:
    """A result by path, or by its name in bench/results. Raises ValueError, with those there are."""
    for path in (Path(name), FOLDER / name, FOLDER / f"{name}.json"):
        if path.is_file():
            return path
    there = "\n  ".join(path.stem for path in sorted(FOLDER.glob("*.json"))) or "none"
    raise ValueError(f"no result {name!r}; in {FOLDER.relative_to(FOLDER.parents[1])} there are:\n  {there}")


def _row(content: dict[str, Any]) -> Row:
    content["limit"] = Limit(*content["limit"])
    for name, contestant in content["contestants"].items():
        contestant["samples"] = [
            Sample(seconds, cores, Reading(*before), Reading(*after), *floor)
            for seconds, cores, before, after, *floor in contestant["samples"]
        ]
        content["contestants"][name] = Contestant(**contestant)
    return Row(**content)


def _machine() -> dict[str, Any]:
    return {
        "cpu": _core.cpu_name(),
        "cpus": _core.available_cpus(),
        "features": [name for name, present in _core.cpu_features().items() if present],
        "isa": _core.selected_isa(),
        "platform": platform.platform(),
        "build": _core.build_info(),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("numpy", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(FOLDER.parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
