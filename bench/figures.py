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

from bench import generation, insight, tables
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
    return decode_table(runs) if runs[-1].suite == "decode" else square_table(runs)


def square_table(runs: list[Run]) -> str:
    """Of as many queries as keys: a row a dtype and length, a column a head size and rule."""
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
    rates = "GFLOP/s, and in brackets times PyTorch:"
    return (
        f"{_caption(runs[-1], f'batch 1, {_HEADS} heads unless said')} {rates}\n\n{header}{''.join(lines)}\n"
        f"Of the ceiling that was read beside each sample: {quoted}.\n"
    )


def decode_table(runs: list[Run]) -> str:
    """Of a few queries over caches: a row a cache, a column a dtype, the other libraries' times over ours."""
    cells: dict[str, dict[str, str]] = {}
    for run in runs:
        for row in run.rows:
            if label := _cache_label(row):
                cells.setdefault(label, {})[row.dtype] = _cache_cell(run, row)
    dtypes = [
        dtype for dtype in ("float32", "bfloat16", "float16") if any(dtype in row for row in cells.values())
    ]
    lines = (
        f"| {label} | {' | '.join(row.get(dtype, '') for dtype in dtypes)} |\n"
        for label, row in cells.items()
    )
    vllm = next((run.versions["vllm"] for run in reversed(runs) if "vllm" in run.versions), "")
    pages = ", huge pages asked for" if runs[-1].machine.get("huge_pages") else ""
    told = (
        f"Times{pages}, shares\n"
        "of the streaming read measured beside each sample, where reading is the limit,\n"
        f"and in brackets times PyTorch{vllm and f' and times the CPU kernel of vLLM {vllm}'}. "
        "~: the machine was busy:"
    )
    return (
        f"{_caption(runs[-1], '32 query heads on 8, D128, unless said')} {told}\n\n"
        f"| | {' | '.join(dtypes)} |\n|---|{'--:|' * len(dtypes)}\n{''.join(lines)}"
    )


def _cache_label(row: Row) -> str:
    """What a row of the table is called; "" for one that the picture has."""
    kept, case = row.case.get("kept"), row.case.get("case", row.case)
    if kept is not None:
        return f"1 query, 8192 keys in {kept}, against bfloat16"
    queries, keys, batch = case["seqlen_q"], case["seqlen_k"], case["batch"]
    if queries not in (1, 8):
        return ""
    label = f"{queries} quer{'y' if queries == 1 else 'ies'}, {keys} keys"
    if batch > 1:
        label = f"{batch} sequences of 100 to {keys} keys"
    heads, kv_heads = case["query_heads"], case["kv_heads"]
    return label if (heads, kv_heads) == (32, 8) else f"{label}, {heads}/{kv_heads} heads"


def _cache_cell(run: Run, row: Row) -> str:
    found = run.figures(row, "fastattn")
    if found is None:
        return ""
    busy = "" if found.trusted else "~"
    if "kept" in row.case:
        return f"{busy}{tables.time(found.seconds)} ({run.of_base(row, 'fastattn'):.2f}x)"
    share = f", {found.share:.0%}" if row.limit.kind == "read" else ""
    ratios = [tables.best_peer(run, row, [peer])[1] for peer in ("torch", "vllm")]
    told = ", ".join(f"{ratio:.1f}x" if ratio < 10 else f"{ratio:.0f}x" for ratio in ratios if ratio == ratio)
    return f"{busy}{tables.time(found.seconds)}{share}{told and f' ({told})'}"


def _range(shares: list[float]) -> str:
    return f"{min(shares):.0%}" if len(shares) == 1 else f"{100 * min(shares):.0f} to {max(shares):.0%}"


def _caption(run: Run, sizes: str) -> str:
    cpu = run.machine["cpu"].replace("(R)", "").replace(" Processor", "")
    torch = run.versions.get("torch", "").split("+")[0]
    return (
        f"`python -m bench {run.suite}`: {sizes}, {run.threads} threads of an "
        f"{cpu} ({run.machine['isa']}),\nbeside PyTorch {torch} in the same run, {run.when[:10]}."
    )


def _label(row: Row) -> str:
    case: dict[str, Any] = row.case
    heads, kv_heads = case["query_heads"], case["kv_heads"]
    told = f"{heads}/{kv_heads} heads" if heads != kv_heads else f"{heads} head{'s' * (heads > 1)}"
    plain = heads == kv_heads == _HEADS
    return f"{row.dtype} S{case['seqlen_q']}{'' if plain else f', {told}'}"


def _cell(run: Run, row: Row) -> str:
    rate = run.rate(row, "fastattn")
    _, ratio = tables.best_peer(run, row, ["torch"])
    return f"{rate:.0f} ({ratio:.2f}x)"


def rewrite(text: str, names: list[str]) -> str:
    """`text` with the table of these results; ValueError where they do not go together or have no place."""
    if all(find(name).stem.startswith(f"{generation.SUITE}-") for name in names):
        suite, new = generation.SUITE, generation.table(*generation.load(names))
    else:
        runs = [Run.load(find(name)) for name in names]
        suites = {(run.suite, run.threads, run.machine["cpu"]) for run in runs}
        if len(suites) != 1:
            raise ValueError(
                f"one table is of one suite, machine and number of threads, got {sorted(suites)}"
            )
        suite, new = runs[0].suite, table(runs)
    for place in _PLACE.finditer(text):
        if re.match(rf"{suite}\b", place["results"]):
            stems = " ".join(find(name).stem for name in names)
            made = f"<!-- table: {stems} -->\n{new}<!-- /table -->"
            return text[: place.start()] + made + text[place.end() :]
    raise ValueError(f"no table of {suite!r} in {README.name}: it would be between <!-- table: {suite} --> "
                     "and <!-- /table -->")  # fmt: skip


def places(text: str) -> list[list[str]]:
    """The results named by each table."""
    return [place["results"].split() for place in _PLACE.finditer(text)]


def main(arguments: list[str], console: Console) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench figures", description=__doc__)
    parser.add_argument("results", nargs="+", help="files, or their names in bench/results")
    names = parser.parse_args(arguments).results
    if find(names[0]).stem.startswith("variants-"):
        from bench.variants import document  # imports torch

        return document(names, console)
    if find(names[0]).stem.startswith(f"{insight.SUITE}-"):
        return insight.document(names, console)
    README.write_text(rewrite(README.read_text(), names))
    if find(names[0]).stem.startswith(generation.SUITE):
        generation.draw(*generation.load(names))
    console.print(f"written to {os.path.relpath(README)}", style="dim")
    return 0
