"""Prefill of long prompts: time in attention and in all, beside torch's scaled_dot_product_attention."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastattn.demo.chat import prompts

LENGTHS = {512: 5, 2048: 3}  # tokens: rounds
NAMES = ("fastattn", "sdpa")


@dataclass
class Times:
    """Milliseconds, a round each."""

    attention: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)


@contextmanager
def clock(name: str) -> Iterator[list[float]]:
    """Collect the seconds of every call of the attention function registered as `name`."""
    original = ALL_ATTENTION_FUNCTIONS[name]
    seconds: list[float] = []

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = original(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return result

    AttentionInterface.register(name, timed)
    try:
        yield seconds
    finally:
        AttentionInterface.register(name, original)


@torch.inference_mode()
def prefill(model: Any, ids: torch.Tensor, name: str) -> tuple[float, float]:
    """Milliseconds in attention and in all of one pass over `ids`."""
    model.set_attn_implementation(name)
    with clock(name) as seconds:
        start = time.perf_counter()
        model(ids, use_cache=True, logits_to_keep=1)
        total = time.perf_counter() - start
    return 1e3 * sum(seconds), 1e3 * total


def measure(model: Any, tokenizer: Any, console: Console) -> dict[int, dict[str, Times]]:
    """Interleave the two, so that whatever else the machine does hits both alike."""
    text = tokenizer(" ".join(prompts() * 100), return_tensors="pt").input_ids
    times = {length: {name: Times() for name in NAMES} for length in LENGTHS}
    with Progress(console=console, transient=True) as progress:
        steps = progress.add_task("prefill beside sdpa", total=sum(LENGTHS.values()) * len(NAMES))
        for length, rounds in LENGTHS.items():
            for name in NAMES:
                prefill(model, text[:, :length], name)  # warm
            for turn in range(rounds):
                for name in NAMES if turn % 2 else reversed(NAMES):
                    attention, total = prefill(model, text[:, :length], name)
                    times[length][name].attention.append(attention)
                    times[length][name].total.append(total)
                    progress.advance(steps)
    return times


def compare_speed(model: Any, tokenizer: Any, console: Console) -> None:
    """Print the table, and in words what it says of the longest prompt."""
    times = measure(model, tokenizer, console)
    table = Table(
        title=f"Prefill, float32, {torch.get_num_threads()} threads: median milliseconds",
        title_justify="left",
    )
    for heading in ("prompt", "", "fastattn", "sdpa", "sdpa / fastattn"):
        table.add_column(heading, justify="left" if not heading else "right")
    ratio = 0.0
    for length, by_name in times.items():
        for part in ("attention", "total"):
            ours, theirs = (statistics.median(getattr(by_name[name], part)) for name in NAMES)
            ratio = theirs / ours
            colour = "green" if ratio > 1 else "red"
            label = f"{length} tokens" if part == "attention" else ""
            table.add_row(label, part, f"{ours:.1f}", f"{theirs:.1f}", f"[{colour}]{ratio:.2f}")
        table.add_section()
    console.print(table)
    console.print(f"the prefill of {length} tokens is [bold]{ratio:.2f} times[/] as fast as with sdpa")
