"""What `insight` costs beside `attention`: ``python -m bench insight``.

Calls take turns, and of each the first quartile of its times counts: what else the machine does slows all
alike.
``python -m bench figures RESULT ...`` makes of what is kept the table of docs/insight.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import fastattn as fa
from bench.results import Run, find
from tests.shapes import Case

SUITE = "insight"
CALLS = ("attention", "insight", "without a value")
DTYPES = ("float32", "bfloat16")
LENGTHS = (512, 2048, 8192)
QUERIES = (1, 32)
TOP_K = 8
_KEYS = 4096  # that a few queries look at
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "insight.md"
_PLACE = re.compile(r"<!-- table: insight\b[^\n]* -->\n.*?<!-- /table -->\n", re.DOTALL)


@dataclass(frozen=True)
class Row:
    """One input: seconds of each call, the first quartile, and how often they took turns."""

    name: str
    dtype: str
    top_k: int
    rounds: int
    seconds: dict[str, float]  # by name in CALLS

    def ratio(self, call: str) -> float:
        """Of `attention`'s time."""
        return self.seconds[call] / self.seconds["attention"]


def cases(lengths: Sequence[int], queries: Sequence[int]) -> list[Case]:
    """Eight heads, two of more than 2048 tokens; and so many queries of 32 heads over the keys of 8."""
    squares = [
        Case(f"D{dim} S{length} {'causal' if causal else 'full'}", length, length, dim, 0, 1,
             8 if length <= 2048 else 2, causal=causal)
        for length in lengths
        for dim in (64, 128)
        for causal in (False, True)
    ]  # fmt: skip
    return squares + [Case(f"D128 {count} of {_KEYS}", count, _KEYS, 128, 0, 1, 32, 8) for count in queries]


def quartiles(actions: list[Callable[[], Any]], seconds: float) -> tuple[list[float], int]:
    """Seconds of each, in turns for as long as that, three times at least; and how many turns these were."""
    times: list[list[float]] = [[] for _ in actions]
    for action in actions:
        action()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 3:
        for action, taken in zip(actions, times, strict=True):
            start = time.perf_counter()
            action()
            taken.append(time.perf_counter() - start)
    return [float(np.quantile(taken, 0.25)) for taken in times], len(times[0])


def measure(case: Case, dtype: str, top_k: int, seconds: float) -> Row:
    """Time all calls on one input."""
    query, key, value = case.tensors(dtype)
    options = {"causal": case.causal}
    look = partial(fa.insight, query, key, top_k=top_k, **options)
    actions = [partial(fa.attention, query, key, value, **options), partial(look, value), look]
    times, rounds = quartiles(actions, seconds)
    return Row(case.name, dtype, top_k, rounds, dict(zip(CALLS, times, strict=True)))


def load(names: list[str]) -> tuple[list[Row], Run]:
    """Rows of all results named, a later one in place of an earlier, and where the last comes from."""
    rows: dict[tuple[str, str, int], Row] = {}
    for name in names:
        content = json.loads(find(name).read_text())
        for row in (Row(**kept) for kept in content.pop("rows")):
            rows[row.name, row.dtype, row.top_k] = row
        del content["schema"]
        run = Run(**content)
    return sorted(rows.values(), key=lambda row: (row.top_k, DTYPES.index(row.dtype))), run


def save(run: Run, rows: list[Row], path: Path | None = None) -> Path:
    """Write what `load` reads."""
    path = run.save(path)
    kept = [dataclasses.asdict(row) for row in rows]
    path.write_text(json.dumps({**json.loads(path.read_text()), "rows": kept}, indent=1) + "\n")
    return path


def table(rows: list[Row]) -> Table:
    """What a person reads after a run."""
    result = Table(title=f"top_k {rows[0].top_k}")
    for column, title in enumerate(("", "attention, ms", *(f"{call}, ms" for call in CALLS[1:]), "ratios")):
        result.add_column(title, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        ratios = "  ".join(f"{row.ratio(call):.2f}" for call in CALLS[1:])
        result.add_row(
            f"{row.dtype} {row.name}", *(f"{1e3 * row.seconds[call]:.2f}" for call in CALLS), ratios
        )
    return result


def markdown(rows: list[Row], run: Run) -> str:
    """The table of the document: a line a dtype and length, a column a head size and rule."""
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        size, length, *rule = row.name.split(" ", 2)
        if rule[0] in ("full", "causal"):
            told = f"{row.ratio('insight'):.2f} ({row.ratio('without a value'):.2f})"
            cells.setdefault(f"{row.dtype} {length}", {})[f"{size} {rule[0]}"] = told
    columns = list(next(iter(cells.values())))
    lines = [f"| {name} | {' | '.join(found.get(column, '') for column in columns)} |\n"
             for name, found in cells.items()]  # fmt: skip
    few = [row for row in rows if " of " in row.name]
    cpu = run.machine["cpu"].replace(" Processor", "")
    words = "; ".join(
        f"{row.dtype}, {row.name.split()[1]} queries: {row.ratio('insight'):.2f} "
        f"({row.ratio('without a value'):.2f})".replace("1 queries", "1 query")
        for row in few
    )
    return (
        f"`python -m bench insight`, {run.threads} threads of an {cpu} ({run.machine['isa']}), "
        f"top_k {rows[0].top_k}, {run.when[:10]}: times `attention` on the same\ninput, in brackets without "
        f"a value. Batch 1, 8 heads, 2 of 8192 tokens:\n\n| | {' | '.join(columns)} |\n"
        f"|---|{'--:|' * len(columns)}\n{''.join(lines)}\n"
        f"Few queries over {_KEYS} keys, 32 heads on 8, D128: {words}.\n"
    )


def rewrite(text: str, names: list[str]) -> str:
    """`text` with the table of these results in its place; ValueError where there is none."""
    if not _PLACE.search(text):
        raise ValueError(f"no table of {SUITE!r} in {DOCUMENT.name}")
    rows = [row for row in load(names)[0] if row.top_k == TOP_K]
    stems = " ".join(find(name).stem for name in names)
    made = f"<!-- table: {stems} -->\n{markdown(rows, load(names)[1])}<!-- /table -->\n"
    return _PLACE.sub(lambda _: made, text)


def document(names: list[str], console: Console) -> int:
    """Write the table of docs/insight.md anew."""
    DOCUMENT.write_text(rewrite(DOCUMENT.read_text(), names))
    console.print(f"written to {os.path.relpath(DOCUMENT)}", style="dim")
    return 0


def main(arguments: list[str], console: Console) -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(
        prog="python -m bench insight", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--lengths", type=int, nargs="*", default=LENGTHS, help="of as many queries as keys")
    add("--queries", type=int, nargs="*", default=QUERIES, help=f"over {_KEYS} keys")
    add("--dtype", nargs="+", default=DTYPES, choices=DTYPES)
    add("--top-k", type=int, default=TOP_K)
    add("--seconds", type=float, default=2.0, help="for each row")
    add("--threads", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args(arguments)
    fa.set_num_threads(options.threads)
    run = Run.begin(SUITE, options.threads, options.seconds)
    rows = [
        measure(case, dtype, options.top_k, options.seconds)
        for dtype in options.dtype
        for case in cases(options.lengths, options.queries)
    ]
    console.print(table(rows))
    console.print(f"written to {os.path.relpath(save(run, rows))}", style="dim")
    return 0
