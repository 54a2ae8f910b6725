"""From the root of the repository: ``python -m bench SUITE``, or ``compare``, ``plot``, ``figures``,
``report``.
"""

from __future__ import annotations

import argparse
import os
import sys

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from bench import compare, figures, insight, tables
from bench.ceilings import Ceilings, Limit
from bench.measure import measure
from bench.peers import PEERS
from bench.results import Run, find
from bench.suites import SUITES, Job, select
from bench.workers import PeerError, Workers, huge_pages


def parser() -> argparse.ArgumentParser:
    """The command line."""
    suites = "\n".join(f"  {name:10}{suite.about}" for name, suite in SUITES.items())
    result = argparse.ArgumentParser(
        prog="python -m bench",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Time fastattn beside its peers and the machine's own limits.",
        epilog=f"suites:\n{suites}\n\nor:\n  compare A B   ratios, regressions\n  plot A        pictures\n"
        "  figures A     the README's table of the same suite\n  report        one page of everything kept\n"
        "  variants      attention beside RNN, GRU and LSTM: cost, recall, order\n"
        "  insight       what looking costs beside attention",
    )
    add = result.add_argument
    add("suite", help=f"one of: {', '.join(SUITES)}")
    add("--cases", nargs="+", default=[], metavar="CASE", help="names or patterns, as '*d64*'")
    add("--dtype", nargs="+", default=[], help="float64, float32, bfloat16, float16")
    add("--peers", nargs="+", default=[], metavar="PEER", help=f"of: {', '.join(PEERS)}; all by default")
    add("--seconds", type=float, default=0.5, help="for each peer in each row")
    add("--threads", type=int, default=min(2, os.cpu_count() or 1))
    add("--plot", action="store_true", help="pictures beside the result")
    return result


def main(arguments: list[str]) -> int:
    """Do what the command line says; 1 for a wrong output or a regression, 2 for a wrong name."""
    console = Console(width=None if sys.stdout.isatty() else 170)
    try:
        if arguments[:1] == ["compare"]:
            return compare.main(arguments[1:], console)
        if arguments[:1] == ["figures"]:
            return figures.main(arguments[1:], console)
        if arguments[:1] == ["report"]:
            return page(arguments[1:], console)
        if arguments[:1] == ["plot"]:
            return plot(arguments[1:], console)
        if arguments[:1] == ["variants"]:
            return variants(arguments[1:], console)
        if arguments[:1] == ["insight"]:
            return insight.main(arguments[1:], console)
        options = parser().parse_args(arguments)
        jobs = select(options.suite, options.cases, options.dtype)
        peers = choose_peers(options.suite, options.peers)
        if options.threads < 1 + (options.suite == "threads"):
            raise ValueError(f"--threads: too few for {options.suite!r}, got {options.threads}")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    run = run_suite(options, jobs, peers, console)
    console.print(tables.table(run))
    tables.notes(run, console)
    path = run.save()
    console.print(f"written to {os.path.relpath(path)}", style="dim")
    if options.plot:
        plot([str(path)], console)
    ours = [
        row.contestants[name] for row in run.rows for name in row.contestants if name.startswith("fastattn")
    ]
    return int(any(contestant.status in ("wrong", "failed") for contestant in ours))


def choose_peers(suite: str, names: list[str]) -> list[str]:
    """Those asked for, or all that the suite is for; ours always. Raises ValueError for a name unknown."""
    for name in names:
        if name not in PEERS:
            raise ValueError(f"no peer {name!r}; there are: {', '.join(PEERS)}")
    fitting = SUITES[suite].peers or tuple(PEERS)
    return ["fastattn", *(name for name in fitting if name != "fastattn" and (not names or name in names))]


def run_suite(options: argparse.Namespace, jobs: list[Job], peers: list[str], console: Console) -> Run:
    """Measure every job."""
    run, ceilings = Run.begin(options.suite, options.threads, options.seconds), Ceilings()
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as progress, Workers() as workers:
        task = progress.add_task("starting peers", total=len(jobs))

        def tick(what: str) -> None:
            progress.update(task, description=what)

        for kind in ("fma_f32", "read"):  # the lines of a roofline
            ceilings.read(Limit(kind, options.threads))
        present = []
        for peer in peers:
            tick(f"starting {peer}")
            try:
                workers.get(peer, options.threads)
                present.append(peer)
            except PeerError as error:
                run.absent[peer] = str(error)
        for job in jobs:
            row = measure(
                job, present, workers=workers, ceilings=ceilings, seconds=options.seconds,
                threads=options.threads, tick=tick,
            )  # fmt: skip
            run.rows.append(row)
            progress.advance(task)
        run.versions |= workers.versions
        run.machine["huge_pages"] = huge_pages()
    run.ceilings = ceilings.best
    return run


def plot(names: list[str], console: Console) -> int:
    """Draw results that were kept. Raises ValueError, with those there are, for a name of none."""
    try:
        from bench.plot import draw
    except ModuleNotFoundError as error:
        raise ValueError(f"pictures need matplotlib: {error}") from error
    for path in map(find, names or [""]):
        if path.stem.startswith("variants-"):
            variants(["--draw", str(path)], console)
            continue
        for picture in draw(Run.load(path), path.with_suffix("")):
            console.print(f"drawn: {os.path.relpath(picture)}", style="dim")
    return 0


def variants(arguments: list[str], console: Console) -> int:
    """Attention beside recurrent networks, whose module imports torch."""
    from bench.variants import main as compared

    return compared(arguments, console)


def page(arguments: list[str], console: Console) -> int:
    """One page of HTML from what is kept. Raises ValueError without the libraries that make it."""
    try:
        from bench.report.page import main
    except ModuleNotFoundError as error:
        raise ValueError(f"a report needs plotly and jinja2: pip install '.[bench]' ({error})") from error
    return main(arguments, console)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
