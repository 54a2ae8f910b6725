"""Writes the table of what each kernel needs on each kind of GPU: registers, shared memory, products.

    make gpu-resources

compiles every job of jobs.py for every target with both versions of Triton, says what is wrong with any, and
writes bench/results/gpu-resources-triton-VERSION.json and .md. It exits with 1 if anything is wrong.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from compiled import ROOT, Records, Refused, compile_jobs
from jobs import JOBS, NEWEST, TARGETS
from limits import faults

RESULTS = ROOT / "bench" / "results"
PREFIX = "gpu-resources-triton-"
Table = dict[str, dict[str, Records]]  # target -> job -> kernels


def path_of(version: str) -> Path:
    return RESULTS / f"{PREFIX}{version}.json"


def version_of(folder: Path | None) -> str:
    """Of the triton in `folder`, or in this environment."""
    path = sys.path if folder is None else [str(folder)]
    return next(found.version for found in distributions(path=path) if found.name == "triton")


def fill(folder: Path | None, version: str) -> tuple[Table, list[str]]:
    """Compile everything; what is wrong comes as lines of text."""
    table: Table = {}
    wrong: list[str] = []
    for target in TARGETS.values():
        table[target.name] = {}
        for name, records in compile_jobs(target, tuple(JOBS) if folder is None else NEWEST, folder).items():
            if isinstance(records, Refused):
                wrong.append(f"{target.name} {name}: {records}")
                continue
            table[target.name][name] = records
            for record in records:
                found = faults(record, JOBS[name], target, version)
                wrong += [f"{target.name} {name} {record['kernel']}: {fault}" for fault in found]
        print(f"{target.name}: {len(table[target.name])} jobs", flush=True)
    return table, wrong


def markdown(table: Table, version: str) -> str:
    lines = [
        f"# What kernels need, compiled by Triton {version}",
        "",
        "`make gpu-resources` writes this table; no GPU is asked. Registers are those of a thread (a lane on",
        "gfx942, accumulators included); shared memory is in KiB.",
        "",
        "| GPU | job | kernel | tile | warps | stages | registers | shared | products |",
        "|---|---|---|---|--:|--:|--:|--:|---|",
    ]
    for target, jobs in table.items():
        for name, records in jobs.items():
            lines += [row(target, name, record) for record in records]
    return "\n".join([*lines, ""])


def row(target: str, name: str, record: dict[str, Any]) -> str:
    options, counts = record["options"], record["instructions"]
    tile = "x".join(str(options[key]) for key in ("BLOCK_M", "BLOCK_N") if key in options)
    products = ", ".join(f"{counts[key]} {key}" for key in counts if "MMA" in key or "mfma" in key)
    numbers = (options.get("num_warps", ""), options.get("num_stages", ""), record["registers"])
    cells = (target, name, record["kernel"], tile, *numbers, f"{record['shared'] / 1024:.0f}", products)
    return f"| {' | '.join(map(str, cells))} |"


def main(folder: Path | None = None) -> int:
    version = version_of(folder)
    table, wrong = fill(folder, version)
    path_of(version).write_text(json.dumps(table, indent=1) + "\n")
    path_of(version).with_suffix(".md").write_text(markdown(table, version))
    print("\n".join(wrong) or "nothing is wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
