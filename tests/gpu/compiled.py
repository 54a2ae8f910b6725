"""Runs aot.py, in processes that may end as they like."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jobs import JOBS, TARGETS, Target

ROOT = Path(__file__).resolve().parent.parent.parent
TESTS = ROOT / "tests"
PROGRAM = TESTS / "gpu" / "aot.py"
AT_ONCE = 2
# Jobs for one process, which takes seconds to start: six of CPU time.
BATCH = 25

Records = list[dict[str, Any]]  # one a kernel: its name, launch options, and what binaries.py says of it


class Refused(str):
    """Why a job could not be compiled."""


def compile_jobs(
    target: Target, names: tuple[str, ...], triton: Path | None = None
) -> dict[str, Records | Refused]:
    """What the kernels of each job are compiled to; `triton`: a folder that has another version of it."""
    batches = [names[at : at + BATCH] for at in range(0, len(names), BATCH)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        parts = pool.map(lambda batch: _compile(target, batch, triton), batches)
        return {name: result for part in parts for name, result in part.items()}


def shipped_options(version: str) -> dict[tuple[str, str], Records]:
    """The launch options of each target and job by this version of Triton, installed or not."""
    done = _run([",".join(TARGETS), *JOBS, "--options", version], None)
    assert done.returncode == 0, done.stderr
    return _read(done.stdout)


def _compile(target: Target, names: tuple[str, ...], triton: Path | None) -> dict[str, Records | Refused]:
    found: dict[str, Records | Refused] = {}
    left = list(names)
    while left:
        done = _run([target.name, *left], triton)
        found |= {name: records for (_, name), records in _read(done.stdout).items()}
        left = [name for name in left if name not in found]
        if done.returncode and left:
            found[left.pop(0)] = Refused(_reason(done))
    return found


def _run(arguments: list[str], triton: Path | None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "triton-cache"))
    folders = [str(triton)] if triton else []
    environment["PYTHONPATH"] = os.pathsep.join([*folders, str(TESTS), environment.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, str(PROGRAM), *arguments], env=environment, capture_output=True, text=True
    )


def _read(output: str) -> dict[tuple[str, str], Records]:
    """The targets and jobs that came to their end."""
    found: dict[tuple[str, str], Records] = {}
    records: Records = []
    for line in output.splitlines():
        told = json.loads(line)
        if "begin" in told:
            records = []
        elif "end" in told:
            found[told["target"], told["end"]] = records
        else:
            records.append(told)
    return found


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"{signal.Signals(-done.returncode).name}: {done.stderr[-1000:]}"
    return done.stderr[-3000:]
