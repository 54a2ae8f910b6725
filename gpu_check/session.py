"""One run, from the build to the report."""

from __future__ import annotations

import argparse
import os
import platform
import random
import subprocess
import time
from dataclasses import replace
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version

import torch

from gpu_check import ROOT, checkers
from gpu_check.build import BuildError, build, environment
from gpu_check.groups import CHECKERS, GROUPS
from gpu_check.lists import items_of
from gpu_check.processes import Outcome, Runner, Task
from gpu_check.report import BAD, Report, summary

SLICE = 8  # items of a list that one process takes on
FOR_CHECKS = 0.5  # of the time, with the build
RESERVE = 5.0  # seconds to write the report in


def names() -> list[str]:
    """Groups of checks, and rows of the benchmark."""
    return [*GROUPS, *(row.label for row in items_of("bench"))]


class Session:
    """What the options of the command ask for."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.start = options, time.monotonic()
        self.end = self.start + 60 * options.minutes
        self.device = "cpu" if options.rehearse else "cuda"
        seed = random.randrange(1 << 30) if options.seed is None else options.seed
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.report = Report(now, machine(self.device), commit(), seed, options.minutes)
        self.runner = Runner(environment(None), self.device, seed, "cpu" if options.rehearse else None)

    def run(self) -> int:
        """Build, check, time and tell; returns the exit code."""
        if not self.options.no_build:
            try:
                package, seconds = build(self.end - time.monotonic())
            except BuildError as error:
                print(f"gpu-check: the package could not be built:\n{error}")
                return 1
            self.report.seconds["build"] = seconds
            self.runner = replace(self.runner, environment=environment(package))
            print(f"built in {seconds:.0f} s", flush=True)
        self.check()
        self.bench()
        self.report.save(self.options.out)
        print(summary(self.report), flush=True)
        return 0 if self.report.passed() else 1

    def check(self) -> None:
        """Every group, many processes at once; meanwhile the checkers, and compilation for the benchmark."""
        start = time.monotonic()
        groups = [name for name in GROUPS if name not in CHECKERS and self.wanted(name)]
        tasks = [task for name in groups for task in sliced(name)]
        checking, notes = ([], []) if self.options.rehearse else checkers.tasks()
        checking = [task for task in checking if self.wanted(task.list)]
        self.report.notes += notes
        share = FOR_CHECKS if self.rows() else 1.0
        deadline = self.start + share * (self.end - self.start) - RESERVE
        at_once = max(2, os.cpu_count() or 2)
        # What takes longest starts first.
        self.runner.run([*self.warming(), *checking, *tasks], at_once, deadline)
        for task in [*tasks, *checking]:
            outcomes = self.report.checks.setdefault(checkers.TITLES.get(task.list, task.list), [])
            outcomes += [task.outcomes[index] for index in sorted(task.outcomes)]
        self.report.seconds["checks"] = time.monotonic() - start
        self.report.save(self.options.out)
        bad = sum(outcome.status in BAD for outcome in self.report.everything())
        print(f"checked in {self.report.seconds['checks']:.0f} s, {bad} not right", flush=True)

    def bench(self) -> None:
        """Every row in one process, alone on the device."""
        rows = self.rows()
        if not rows:
            return
        start = time.monotonic()
        task = Task("rehearsal" if self.options.rehearse else "bench", rows, patience=150.0)
        hopper = [x for name, found in self.report.checks.items() if name.startswith("hopper") for x in found]
        if any(outcome.status in ("hung", "crashed") for outcome in hopper):
            self.report.notes.append("the Hopper kernels were not timed: a check of theirs did not come back")
            task = replace(task, arguments=("--without", "hopper"), variables={"FASTATTN_HOPPER": "0"})

        def add(outcome: Outcome) -> None:
            self.report.add_row(outcome)
            self.report.save(self.options.out)

        self.runner.run([task], 1, self.end - RESERVE, add)
        self.report.rows += [x for x in task.outcomes.values() if x.status == "left out"]
        self.report.seconds["benchmark"] = time.monotonic() - start

    def wanted(self, name: str) -> bool:
        """Whether `--only` names it, if given."""
        only = self.options.only
        return only is None or any(fnmatchcase(name, pattern) for pattern in only)

    def rows(self) -> dict[int, str]:
        """Of the benchmark; the ceilings come with any of them."""
        wanted = {i: row.label for i, row in enumerate(items_of("bench")) if self.wanted(row.label)}
        return {0: "ceilings", **wanted} if wanted else {}

    def warming(self) -> list[Task]:
        """The rows of the benchmark, compiled while the checks run."""
        rows = [] if self.options.rehearse else list(self.rows().items())
        return [Task("warm", dict(rows[first::3]), patience=180.0) for first in range(3) if rows[first::3]]


def sliced(name: str) -> list[Task]:
    """A list as tasks that can run beside each other."""
    labels = dict(enumerate(item.label for item in items_of(name)))
    hopper = name.startswith("hopper")
    # Elsewhere the public function is to choose portable kernels, without a trial of others first.
    variables = {} if hopper or name == "torch" else {"FASTATTN_HOPPER": "0"}
    patience = 60.0 if hopper else 150.0 if name == "torch" else 90.0  # the trial takes its time
    count = -(-len(labels) // SLICE)
    parts = [list(labels)[first::count] for first in range(count)]
    return [Task(name, {i: labels[i] for i in part}, patience, variables=variables) for part in parts]


def machine(device: str) -> dict[str, str]:
    """The chip and the versions of what runs on it."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        found["triton"] = version("triton")
    except PackageNotFoundError:
        found["triton"] = "none"
    if device == "cpu":
        return {"chip": "none, a rehearsal on the CPU", **found}
    chip = torch.cuda.get_device_properties(0)
    return {
        "chip": f"{chip.name} ({chip.multi_processor_count} multiprocessors, {chip.total_memory >> 30} GiB)",
        "driver": _told(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        **found,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
    }


def commit() -> str:
    """Of the sources, where git is there to say."""
    return _told(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"])


def _told(command: list[str]) -> str:
    """The first word that a program prints."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        return done.stdout.split()[0]
    except (OSError, IndexError, subprocess.TimeoutExpired):
        return "unknown"
