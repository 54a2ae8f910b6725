"""Build the package, check it on the GPU, time it: ``python -m gpu_check --out FOLDER``.

Exits with 1 where something was wrong, with 2 where there is nothing to run on.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import subprocess
import sys
import time
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from gpu_check import ROOT
from gpu_check.build import BuildError, build, environment

SLICE = 8  # items of a list that one process takes on
FOR_CHECKS = 0.5  # of the time, with the build
RESERVE = 5.0  # seconds to write the report in


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    if (missing := what_is_missing(options.rehearse)) is not None:
        print(f"gpu-check: {missing}")
        return 2
    if options.list:
        print("\n".join(_names()))
        return 0
    return Session(options).run()


def what_is_missing(rehearse: bool) -> str | None:
    """Why nothing can be run here, in a sentence."""
    try:
        import torch
    except ImportError:
        return "there is no torch here; it needs torch, built for CUDA, and Triton."
    if rehearse:
        return None
    if not torch.cuda.is_available():
        return f"there is no CUDA GPU here that torch {torch.__version__} can use."
    try:
        import triton  # noqa: F401
    except ImportError:
        return "there is no Triton here, which compiles the kernels: pip install 'fastattn[triton]'."
    return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gpu_check", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check" / "report", help="a folder")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything (default: %(default)s)")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="groups of checks, or labels of rows; * and ? match"
    )
    parser.add_argument("--list", action="store_true", help="print what --only can name")
    parser.add_argument("--seed", type=int, help="of the inputs, which are drawn anew by default")
    parser.add_argument("--no-build", action="store_true", help="use the fastattn that this Python finds")
    parser.add_argument(
        "--rehearse", action="store_true", help="on the CPU, small: tries the script, not the GPU"
    )
    return parser


def _names() -> list[str]:
    from gpu_check.lists import GROUPS, items_of

    return [*GROUPS, *(row.label for row in items_of("bench"))]


class Session:
    """One run, from the build to the report."""

    def __init__(self, options: argparse.Namespace) -> None:
        from gpu_check.processes import Runner
        from gpu_check.report import Report

        self.options, self.start = options, time.monotonic()
        self.end = self.start + 60 * options.minutes
        self.device = "cpu" if options.rehearse else "cuda"
        seed = random.randrange(1 << 30) if options.seed is None else options.seed
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.report = Report(now, machine(self.device), commit(), seed, options.minutes)
        self.runner = Runner(environment(None), self.device, seed)

    def run(self) -> int:
        from dataclasses import replace

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
        from gpu_check.report import summary

        print(summary(self.report), flush=True)
        return 0 if self.report.passed() else 1

    def check(self) -> None:
        """Every group, many processes at once; and meanwhile the checkers, and compilation for the benchmark."""
        from gpu_check import checkers
        from gpu_check.groups import CHECKERS, GROUPS

        start = time.monotonic()
        tasks = [
            task
            for name in GROUPS
            if name not in CHECKERS and self.wanted(name)
            for task in self.sliced(name)
        ]
        checking, notes = ([], []) if self.options.rehearse else checkers.tasks()
        checking = [task for task in checking if self.wanted(task.list)]
        self.report.notes += notes
        background = [*checking, *self.warming()]
        share = FOR_CHECKS if self.rows() else 1.0
        deadline = self.start + share * (self.end - self.start) - RESERVE
        at_once = max(2, (os.cpu_count() or 2) - 2)
        # What takes longest starts first.
        self.runner.run([*background, *tasks] if at_once > 4 else tasks, at_once, deadline)
        for task in [*tasks, *checking]:
            name = {"memory": "memory checker", "races": "race checker"}.get(task.list, task.list)
            self.report.checks.setdefault(name, []).extend(task.outcomes[i] for i in sorted(task.outcomes))
        self.report.seconds["checks"] = time.monotonic() - start
        self.report.save(self.options.out)
        bad = sum(
            outcome.status in ("wrong", "failed", "crashed", "hung") for outcome in self.report.everything()
        )
        print(f"checked in {self.report.seconds['checks']:.0f} s, {bad} not right", flush=True)

    def bench(self) -> None:
        """Every row in one process, alone on the device."""
        from gpu_check.processes import Task

        rows = self.rows()
        if not rows:
            return
        start = time.monotonic()
        hopper = [x for name, found in self.report.checks.items() if name.startswith("hopper") for x in found]
        stuck = any(outcome.status in ("hung", "crashed") for outcome in hopper)
        if stuck:
            self.report.notes.append("the Hopper kernels were not timed: a check of theirs did not come back")
        task = Task(
            "rehearsal" if self.options.rehearse else "bench", rows, patience=90.0,
            arguments=("--without", "hopper") if stuck else (),
        )  # fmt: skip

        def add(outcome: object) -> None:
            self.report.add_row(outcome)  # type: ignore[arg-type]
            self.report.save(self.options.out)

        self.runner.run([task], 1, self.end - RESERVE, add)
        reported = {row.label for row in self.report.rows}
        self.report.rows += [outcome for outcome in task.outcomes.values() if outcome.label not in reported]
        self.report.seconds["benchmark"] = time.monotonic() - start

    def wanted(self, name: str) -> bool:
        only = self.options.only
        return only is None or any(fnmatchcase(name, pattern) for pattern in only)

    def rows(self) -> dict[int, str]:
        """Of the benchmark; the ceilings come with any of them."""
        from gpu_check.lists import items_of

        wanted = {i: x.label for i, x in enumerate(items_of("bench")) if self.wanted(x.label)}
        return {0: "ceilings", **wanted} if wanted else {}

    def sliced(self, name: str) -> list:
        """A list as tasks that can run beside each other."""
        from gpu_check.lists import items_of
        from gpu_check.processes import Task

        labels = dict(enumerate(item.label for item in items_of(name)))
        count = -(-len(labels) // SLICE)
        # Elsewhere the public function is to choose the portable kernels, and no process tries the others first.
        variables = {} if name == "torch" or name.startswith("hopper") else {"FASTATTN_HOPPER": "0"}
        return [
            Task(name, {i: labels[i] for i in list(labels)[first::count]}, variables=variables)
            for first in range(count)
        ]

    def warming(self) -> list:
        """The rows of the benchmark, compiled while the checks run."""
        from gpu_check.processes import Task

        if self.options.rehearse:
            return []
        rows = list(self.rows().items())
        return [Task("warm", dict(rows[first::3]), patience=120.0) for first in range(3) if rows[first::3]]


def machine(device: str) -> dict[str, str]:
    """The chip and the versions of what runs on it."""
    import torch

    found = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        found["triton"] = version("triton")
    except PackageNotFoundError:
        found["triton"] = "none"
    if device == "cpu":
        return {"chip": "none, a rehearsal on the CPU", **found}
    chip = torch.cuda.get_device_properties(0)
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split()[0]
    except (OSError, IndexError, subprocess.TimeoutExpired):
        driver = "unknown"
    return {
        "chip": f"{chip.name} ({chip.multi_processor_count} multiprocessors, {chip.total_memory >> 30} GiB)",
        "driver": driver,
        **found,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
    }


def commit() -> str:
    """Of the sources, where git is there to say."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
