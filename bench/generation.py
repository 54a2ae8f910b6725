"""A model that generates, whole: ``python -m bench.generation``.

SmolLM2 reads a prompt and goes on by 64 greedy tokens, with transformers' eager and sdpa attention and with
fastattn and its `PagedCache`. Each implementation has a process to itself, so that its memory is its own.
``python -m bench figures RESULT ...`` makes the table of the README of what is kept, and the picture.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.colours import style
from bench.results import Run, find

IMPLEMENTATIONS = ("eager", "sdpa", "fastattn")
LENGTHS = (32, 512, 2048, 8000)
DTYPES = ("float32", "bfloat16")
SUITE = "generation"
_READ_BYTES = 1 << 27  # more than caches hold
PICTURE = Path(__file__).resolve().parent.parent / "docs" / "generation.png"


@dataclass(frozen=True)
class Row:
    """One prompt: what `fastattn.demo.generation.Generation` has, and what the process took."""

    implementation: str
    dtype: str
    length: int
    made: dict[str, Any]
    memory: float  # MiB, the most that was resident, model included
    cache_bytes: int  # of keys and values that the median token attends to
    read: float  # GB/s of a streaming read: the median of those after each token

    @property
    def prefill(self) -> float:
        """Tokens of the prompt a second."""
        return self.length / self.made["prefill"]

    @property
    def decode(self) -> float:
        """Tokens a second after the first."""
        return 1 / _median(self.made["steps"])

    @property
    def over_reading(self) -> float:
        """Time of a token's attention over that of reading its keys and values, as was read beside it."""
        beside = self.made.get("beside") or [self.read] * len(self.made["attention"])
        times = [spent * read for spent, read in zip(self.made["attention"], beside, strict=True)]
        return _median(times) * 1e9 / self.cache_bytes

    @property
    def share(self) -> float:
        """What part of a token's time its attention takes."""
        return _median(self.made["attention"]) * self.decode


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def measure(implementation: str, dtype: str, lengths: list[int], threads: int) -> list[Row]:
    """What the process of one implementation does."""
    import torch

    import fastattn
    from bench.models import start_transformers
    from fastattn import _core

    start_transformers()
    from fastattn.demo import generation
    from fastattn.demo.models import load_language_model

    torch.set_num_threads(threads)
    fastattn.set_num_threads(threads)
    model, tokenizer = load_language_model()
    model, config = model.to(getattr(torch, dtype)), model.config
    item = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    generation.generate(model, generation.text(tokenizer, 16), implementation, 4)  # warm
    rows = []
    buffer = torch.ones(_READ_BYTES, dtype=torch.uint8)

    def read() -> float:
        return _READ_BYTES / 1e9 / _core.read_once(buffer.data_ptr(), _READ_BYTES, threads)

    for length in lengths:
        made, memory = generation.measured(model, generation.text(tokenizer, length), implementation, read)
        memory -= _READ_BYTES / 2**20
        cache_bytes = (length + generation.TOKENS // 2) * item
        made_of = dataclasses.asdict(made)
        rows.append(Row(implementation, dtype, length, made_of, memory, cache_bytes, _median(made.beside)))
    return rows


def table(rows: list[Row], run: Run) -> str:
    """What the README has between the comments."""
    cpu = run.machine["cpu"].replace(" Processor", "")
    versions = f"transformers {run.versions['transformers']}"
    lines = [
        f"`python -m bench.generation`: SmolLM2-135M (9 heads on 3, D64) on {run.threads} threads of an "
        f"{cpu} ({run.machine['isa']}),\n{versions}, {run.when[:10]}. Tokens a second of the prompt, "
        "tokens a second of the 64 that follow, and MiB at most:\n\n"
        f"| prompt | {' | '.join(IMPLEMENTATIONS[:-1])} | fastattn, its cache | decode over sdpa |\n"
        "|---|--:|--:|--:|--:|\n"
    ]
    for dtype in DTYPES:
        for length in LENGTHS:
            found = {row.implementation: row for row in rows if (row.dtype, row.length) == (dtype, length)}
            cells = [_cell(found.get(name)) for name in IMPLEMENTATIONS]
            ratio = f"{found['fastattn'].decode / found['sdpa'].decode:.2f}x" if len(found) > 1 else ""
            lines.append(f"| {dtype}, {length} tokens | {' | '.join(cells)} | {ratio} |\n")
    return "".join(lines) + "\n" + _in_words(rows)


def _cell(row: Row | None) -> str:
    return "" if row is None else f"{row.prefill:.0f} / {row.decode:.1f} / {row.memory:.0f}"


def _in_words(rows: list[Row]) -> str:
    """Attention against what it reads, and whether the tokens are eager's."""
    long = [row for row in rows if row.implementation == "fastattn" and row.length == max(LENGTHS)]
    told = [
        f"{row.share:.0%} of the time in {row.dtype}, {row.over_reading:.2f} times that of reading its "
        f"keys and values once at {row.read:.0f} GB/s"
        for row in long
    ]
    same, of = 0, 0
    eager = {row.length: row for row in rows if (row.implementation, row.dtype) == ("eager", "float32")}
    for row in rows:
        if (row.implementation, row.dtype) == ("fastattn", "float32") and row.length in eager:
            other = eager[row.length].made["tokens"]
            same += sum(a == b for a, b in zip(row.made["tokens"], other, strict=True))
            of += len(other)
    return (
        f"Of a token after {max(LENGTHS)}, attention takes {', and '.join(told)}\n"
        "(a streaming read after each token). "
        f"In float32 {same} of {of} greedy tokens are eager's.\n"
    )


def draw(rows: list[Row], run: Run, path: Path = PICTURE) -> None:
    """Tokens a second over the length of the prompt: a row of panels for prompt and what follows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colours = {name: style(name)[0] for name in IMPLEMENTATIONS}
    options = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}
    with plt.rc_context(options):
        figure, axes = plt.subplots(2, 2, figsize=(9, 5.4), layout="constrained")
        for line, dtype in zip(axes, DTYPES, strict=True):
            for ax, part in zip(line, ("prefill", "decode"), strict=True):
                for place, name in enumerate(IMPLEMENTATIONS):
                    for x, length in enumerate(LENGTHS):
                        key = name, dtype, length
                        found = [r for r in rows if (r.implementation, r.dtype, r.length) == key]
                        height = getattr(found[0], part) if found else 0.0
                        bar = ax.bar(x + 0.27 * (place - 1), height, 0.25, color=colours[name])
                        if found:
                            ax.bar_label(bar, fmt="%.0f", fontsize=7)
                ax.set_xticks(range(len(LENGTHS)), [str(length) for length in LENGTHS])
                what = "of the prompt" if part == "prefill" else "after it"
                ax.set_title(f"{dtype}: tokens a second {what}", loc="left")
        for ax in axes[1]:
            ax.set_xlabel("tokens of the prompt")
        handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
        labels = ["eager", "sdpa", "fastattn with its cache"]
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        title = f"SmolLM2-135M generating, {run.machine['cpu']}, {run.threads} threads, {run.when[:10]}"
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def load(names: list[str]) -> tuple[list[Row], Run]:
    """Rows of all results named, a later one in place of an earlier, and where the last comes from."""
    rows: dict[tuple[str, str, int], Row] = {}
    for name in names:
        content = json.loads(find(name).read_text())
        for row in (Row(**kept) for kept in content.pop("rows")):
            rows[row.implementation, row.dtype, row.length] = row
        del content["schema"]
        run = Run(**content)
    return list(rows.values()), run


def save(run: Run, rows: list[Row], path: Path | None = None) -> Path:
    """Write what `load` reads."""
    path = run.save(path)
    kept = [dataclasses.asdict(row) for row in rows]
    path.write_text(json.dumps({**json.loads(path.read_text()), "rows": kept}, indent=1) + "\n")
    return path


def main() -> int:
    """Measure in processes of their own, and keep what they say."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.generation", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--implementations", nargs="+", default=IMPLEMENTATIONS, choices=IMPLEMENTATIONS)
    add("--dtype", nargs="+", default=DTYPES, choices=DTYPES)
    add("--tokens", nargs="+", type=int, default=LENGTHS, help="of the prompt")
    add("--threads", type=int, default=min(2, os.cpu_count() or 1))
    add("--process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process:
        rows = measure(options.implementations[0], options.dtype[0], options.tokens, options.threads)
        print(json.dumps([dataclasses.asdict(row) for row in rows]))
        return 0
    run, console = Run.begin(SUITE, options.threads, 0.0), Console()
    kept: list[Row] = []
    for dtype in options.dtype:
        for name in options.implementations:
            arguments = ["--implementations", name, "--dtype", dtype, "--threads", str(options.threads)]
            command = [sys.executable, "-m", "bench.generation", "--process", *arguments]
            done = subprocess.run(
                [*command, "--tokens", *map(str, options.tokens)],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                console.print(done.stderr, markup=False, highlight=False)
                return 1
            for row in (Row(**made) for made in json.loads(done.stdout.splitlines()[-1])):
                kept.append(row)
                console.print(
                    f"{name:8} {dtype:8} {row.length:5} tokens: {_cell(row)} MiB; attention {row.share:.0%}, "
                    f"{row.over_reading:.2f} times a read of {row.read:.0f} GB/s",
                    highlight=False,
                )
    console.print(f"written to {os.path.relpath(save(run, kept))}", style="dim")
    return 0


if __name__ == "__main__":
    sys.exit(main())
