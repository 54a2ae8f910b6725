"""What a run leaves: a table to read and a file to keep."""

from __future__ import annotations

import json
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy
import torch
from rich.console import Console
from rich.table import Table

import fastattn
from bench.measure import Result
from fastattn import _core

RESULTS = Path(__file__).with_name("results")


def table(suite: str, results: list[Result], threads: int) -> Table:
    """Rows in the order measured, a section a dtype."""
    title = f"{suite}: {_core.cpu_name()}, {_core.selected_isa()}, {threads} threads; medians"
    result = Table(title=title, title_justify="left")
    result.add_column("case")
    for heading in ("time", "rate", "of peak", "torch", "torch rate", "torch / fastattn", "error", "torch's"):
        result.add_column(heading, justify="right", no_wrap=True)
    for row, following in zip(results, [*results[1:], None], strict=True):
        result.add_row(*_cells(row), end_section=following is None or row.job.dtype != following.job.dtype)
    return result


def _cells(row: Result) -> list[str]:
    name = f"{row.job}{' [yellow]~' if row.noisy else ''}"
    if "fastattn" in row.wrong:
        return [name, "[bold red]WRONG", "", "", "", "", "", f"[red]{row.errors['fastattn']:.1e}", ""]
    cells = [name, _time(row.seconds["fastattn"]), f"{row.rate('fastattn'):.0f} {row.unit}"]
    cells.append(f"{row.share('fastattn'):.0%}")
    if "torch" in row.wrong:
        cells += ["[red]wrong", "", ""]
    else:
        ratio = row.ratio("torch")
        colour = "green" if ratio > 1 else "red"
        cells += [_time(row.seconds["torch"]), f"{row.rate('torch'):.0f}", f"[{colour}]{ratio:.2f}"]
    return [*cells, f"{row.errors['fastattn']:.1e}", f"{row.errors['torch']:.1e}"]


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.1f} µs"


def notes(results: list[Result], console: Console) -> None:
    """Say what the columns mean and where not to trust them."""
    kinds = {row.peak_kind: row for row in sorted(results, key=lambda row: row.peak)}
    peaks = ", ".join(f"{kind} {row.peak:.0f} {row.unit}" for kind, row in kinds.items())
    console.print(f"highest peak, measured between the samples: {peaks}", style="dim")
    console.print("FLOPs: 4 B Hq D for every visible pair; one query: bytes of K and V", style="dim")
    if any(row.noisy for row in results):
        console.print("~: something else ran while this row was measured; run it again", style="yellow")


def save(suite: str, results: list[Result], threads: int, seconds: float) -> Path:
    """Write everything measured, and on what, as JSON."""
    now = datetime.now(timezone.utc)
    content = {
        "suite": suite,
        "when": now.isoformat(timespec="seconds"),
        "machine": _machine(),
        "git": {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain"))},
        "threads": threads,
        "seconds": seconds,
        "rows": [_record(row) for row in results],
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{suite}-{now:%Y%m%d-%H%M%S}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def _machine() -> dict[str, Any]:
    return {
        "cpu": _core.cpu_name(),
        "cpus": _core.available_cpus(),
        "features": [name for name, present in _core.cpu_features().items() if present],
        "isa": _core.selected_isa(),
        "platform": platform.platform(),
        "build": _core.build_info(),
        "python": platform.python_version(),
        "fastattn": fastattn.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }


def _record(row: Result) -> dict[str, Any]:
    return {
        "case": row.job.case.name,
        "dtype": row.job.dtype,
        "unit": row.unit,
        "peak_kind": row.peak_kind,
        "peak": row.peak,
        "peak_spread": row.peak_spread,
        "busy": row.busy,
        "seconds": row.seconds,
        "rates": {name: row.rate(name) for name in row.seconds},
        "errors": row.errors,
        "wrong": row.wrong,
    }


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(RESULTS.parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
