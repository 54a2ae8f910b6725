"""``python -m bench figures RESULT ...``: the table of the README that is of the same suite, written anew.

A table stands between comments, the first of which names the results that it is made of.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import report
from bench.results import Row, Run, find

README = Path(__file__).resolve().parent.parent / "README.md"
_PLACE = re.compile(r"<!-- table: (?P<results>[^\n]*) -->\n(?P<table>.*?)<!-- /table -->", re.DOTALL)
_COLUMNS = {
    (64, False): "D64 full",
    (64, True): "D64 causal",
    (128, False): "D128 full",
    (128, True): "D128 causal",
}
_HEADS = 8  # where a row does not say how many


def table(runs: list[Run]) -> str:
    """What stands between the comments; of a row measured twice, the later figures."""
    cells: dict[str, dict[tuple[int, bool], str]] = {}
    shares: dict[str, list[float]] = {}
    for run in runs:
        for row in run.rows:
            column = row.case["head_dim"], bool(row.case["causal"])
            if column in _COLUMNS and row.case["value_dim"] == row.case["head_dim"]:
                cells.setdefault(_label(row), {})[column] = _cell(run, row)
                if found := run.figures(row, "fastattn"):
                    shares.setdefault(row.dtype, []).append(found.share)
    header = f"| | {' | '.join(_COLUMNS.values())} |\n|---|{'--:|' * len(_COLUMNS)}\n"
    lines = (
        f"| {label} | {' | '.join(row.get(column, '') for column in _COLUMNS)} |\n"
        for label, row in cells.items()
    )
    quoted = ", ".join(f"{dtype} {_range(values)}" for dtype, values in shares.items())
    return (
        f"{_caption(runs[-1])}\n\n{header}{''.join(lines)}\n"
        f"Of the ceiling that was read beside each sample: {quoted}.\n"
    )


def _range(shares: list[float]) -> str:
    return f"{min(shares):.0%}" if len(shares) == 1 else f"{100 * min(shares):.0f} to {max(shares):.0%}"


def _caption(run: Run) -> str:
    cpu = run.machine["cpu"].replace("(R)", "").replace(" Processor", "")
    torch = run.versions.get("torch", "").split("+")[0]
    return (
        f"`python -m bench {run.suite}`: batch 1, {_HEADS} heads unless said, {run.threads} threads of an "
        f"{cpu} ({run.machine['isa']}),\nbeside PyTorch {torch} in the same run, {run.when[:10]}. "
        "GFLOP/s, and in brackets times PyTorch:"
    )


def _label(row: Row) -> str:
    case: dict[str, Any] = row.case
    heads, kv_heads = case["query_heads"], case["kv_heads"]
    told = f"{heads}/{kv_heads} heads" if heads != kv_heads else f"{heads} head{'s' * (heads > 1)}"
    plain = heads == kv_heads == _HEADS
    return f"{row.dtype} S{case['seqlen_q']}{'' if plain else f', {told}'}"


def _cell(run: Run, row: Row) -> str:
    rate = run.rate(row, "fastattn")
    _, ratio = report.best_peer(run, row, ["torch"])
    return f"{rate:.0f} ({ratio:.2f}x)"


def rewrite(text: str, names: list[str]) -> str:
    """`text` with the table of these results; ValueError where they do not go together or have no place."""
    runs = [Run.load(find(name)) for name in names]
    suites = {(run.suite, run.threads, run.machine["cpu"]) for run in runs}
    if len(suites) != 1:
        raise ValueError(f"one table is of one suite, machine and number of threads, got {sorted(suites)}")
    suite = runs[0].suite
    for place in _PLACE.finditer(text):
        if re.match(rf"{suite}\b", place["results"]):
            made = (
                f"<!-- table: {' '.join(find(name).stem for name in names)} -->\n{table(runs)}<!-- /table -->"
            )
            return text[: place.start()] + made + text[place.end() :]
    raise ValueError(f"no table of {suite!r} in {README.name}: it would be between <!-- table: {suite} --> "
                     "and <!-- /table -->")  # fmt: skip


def places(text: str) -> list[list[str]]:
    """The results named by each table."""
    return [place["results"].split() for place in _PLACE.finditer(text)]


def main(arguments: list[str], console: Console) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench figures", description=__doc__)
    parser.add_argument("results", nargs="+", help="files, or their names in bench/results")
    README.write_text(rewrite(README.read_text(), parser.parse_args(arguments).results))
    console.print(f"written to {os.path.relpath(README)}", style="dim")
    return 0
