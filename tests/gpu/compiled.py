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

from jobs import Target

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAM = Path(__file__).with_name("aot.py")
AT_ONCE = 2
# Jobs for one process: it takes some seconds to start, and one that is ended by a compiler costs no more than these.
BATCH = 8

Records = list[dict[str, Any]]  # one a kernel: its name, launch options, and what binaries.py says of it


class Refused(Exception):
    """A job that could not be compiled."""


def compile_jobs(
    target: Target, names: tuple[str, ...], triton: Path | None = None
) -> dict[str, Records | Refused]:
    """What the kernels of each job are compiled to; `triton`: a folder that has another version of it."""
    batches = [names[at : at + BATCH] for at in range(0, len(names), BATCH)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        parts = pool.map(lambda batch: _compile(target, batch, triton), batches)
        return {name: result for part in parts for name, result in part.items()}


def shipped_options(targets: tuple[Target, ...], names: tuple[str, ...]) -> dict[str, dict[str, Records]]:
    """The launch options of each job for each target, compiled or not."""
    found: dict[str, dict[str, Records]] = {}
    for target in targets:
        done = _run([target.name, *names, "--options"], None)
        assert done.returncode == 0, done.stderr
        found[target.name] = _read(done.stdout)
    return found


def _compile(target: Target, names: tuple[str, ...], triton: Path | None) -> dict[str, Records | Refused]:
    found: dict[str, Records | Refused] = {}
    left = list(names)
    while left:
        done = _run([target.name, *left], triton)
        found |= _read(done.stdout)
        left = [name for name in left if name not in found]
        if done.returncode and left:
            found[left.pop(0)] = Refused(_reason(done))
    return found


def _run(arguments: list[str], triton: Path | None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "triton-cache"))
    if triton is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(triton), environment.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, str(PROGRAM), *arguments], env=environment, capture_output=True, text=True
    )


def _read(output: str) -> dict[str, Records]:
    """The jobs that came to their end."""
    found: dict[str, Records] = {}
    records: Records = []
    for line in output.splitlines():
        told = json.loads(line)
        if "begin" in told:
            records = []
        elif "end" in told:
            found[told["end"]] = records
        else:
            records.append(told)
    return found


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"{signal.Signals(-done.returncode).name}: {done.stderr[-1000:]}"
    return done.stderr[-3000:]
