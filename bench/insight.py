"""What `insight` costs beside `attention`: ``python -m bench.insight``.

Calls take turns, and each shows the first quartile of its times: what else the machine does slows all alike.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import fastattn as fa
from tests.shapes import Case

TITLES = ("", "attention, ms", "insight, ms", "ratio", "no value, ms", "ratio")


def cases(lengths: list[int]) -> list[Case]:
    """Eight heads, two of more than 2048 tokens."""
    return [
        Case(f"D{dim} S{length} {'causal' if causal else 'full'}", length, length, dim, 0, 1,
             8 if length <= 2048 else 2, causal=causal)
        for length in lengths
        for dim in (64, 128)
        for causal in (False, True)
    ]  # fmt: skip


def quartiles(actions: list[Callable[[], Any]], seconds: float) -> list[float]:
    """Milliseconds of each, in turns for as long as that, three times at least."""
    times: list[list[float]] = [[] for _ in actions]
    for action in actions:
        action()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 3:
        for action, taken in zip(actions, times, strict=True):
            start = time.perf_counter()
            action()
            taken.append(time.perf_counter() - start)
    return [1e3 * float(np.quantile(taken, 0.25)) for taken in times]


def main(arguments: list[str]) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.insight", description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    fa.set_num_threads(options.threads)
    table = Table(title=f"top_k {options.top_k}, {options.threads} threads")
    for column, title in enumerate(TITLES):
        table.add_column(title, justify="right" if column else "left", no_wrap=True)
    for dtype in options.dtype:
        for case in cases(options.lengths):
            query, key, value = case.tensors(dtype)
            attend = partial(fa.attention, query, key, value, causal=case.causal)
            look, glance = (
                partial(fa.insight, *tensors, causal=case.causal, top_k=options.top_k)
                for tensors in ((query, key, value), (query, key))
            )
            plain, whole, less = quartiles([attend, look, glance], options.seconds)
            times = (
                f"{plain:.2f}",
                f"{whole:.2f}",
                f"{whole / plain:.2f}",
                f"{less:.2f}",
                f"{less / plain:.2f}",
            )
            table.add_row(f"{dtype} {case.name}", *times)
    Console(width=None if sys.stdout.isatty() else 100).print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
