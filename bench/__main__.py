"""``python -m bench SUITE``, from the root of the repository."""

from __future__ import annotations

import argparse
import sys

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import fastattn
from bench import report
from bench.measure import ROUNDS, measure
from bench.suites import SUITES, select


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("suite", help=f"one of: {', '.join(SUITES)}")
    parser.add_argument(
        "--cases", nargs="+", default=[], metavar="CASE", help="names or patterns, as '*d64*'"
    )
    parser.add_argument("--dtype", nargs="+", default=[], help="float32, bfloat16, float16")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each peer in each row")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> int:
    """Measure, print and save; 1 where an output was wrong, 2 for a name that does not exist."""
    options = arguments()
    try:
        jobs = select(options.suite, options.cases, options.dtype)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if not jobs:
        print("no row has both a case and a dtype that were asked for", file=sys.stderr)
        return 2
    fastattn.set_num_threads(options.threads)
    torch.set_num_threads(options.threads)
    console = Console(width=None if sys.stdout.isatty() else 150)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    results = []
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(jobs) * ROUNDS)
        for job in jobs:
            progress.update(task, description=str(job))
            results.append(measure(job, options.seconds, options.threads, lambda: progress.advance(task)))
    console.print(report.table(options.suite, results, options.threads))
    report.notes(results, console)
    path = report.save(options.suite, results, options.threads, options.seconds)
    console.print(f"written to {path.relative_to(path.parents[2])}", style="dim")
    return int(any("fastattn" in row.wrong for row in results))


if __name__ == "__main__":
    sys.exit(main())
