"""Generation by eager attention, by sdpa and by fastattn with its cache: a prompt, then a token at a time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging import version
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AttentionInterface, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastattn.demo.chat import TIE, prompts
from fastattn.integrations.transformers import PagedCache

IMPLEMENTATIONS = ("eager", "sdpa", "fastattn")
LENGTHS = (512, 2048)  # tokens of a prompt
TOKENS = 64
# What models call their cache: transformers 5 takes the older name, too, and warns.
KEYWORD = "cache" if version.parse(transformers.__version__).major >= 5 else "past_key_values"


@dataclass(frozen=True)
class Generation:
    """What came, and the seconds it took.

    `attention` is the part of them that is spent in its function; eager's has no name to be timed by.
    """

    tokens: list[int]
    margins: list[float]  # between the two best logits of each token
    prefill: float
    prefill_attention: float
    steps: list[float]  # of each token but the first, which the prompt gives
    attention: list[float]
    beside: list[float]  # what the caller measured after each of these

    @property
    def step(self) -> float:
        """Median seconds a token."""
        return statistics.median(self.steps)


def text(tokenizer: Any, length: int) -> torch.Tensor:
    """(1, length): the demo's prompts, over and over."""
    ids: torch.Tensor = tokenizer(" ".join(prompts() * 100), return_tensors="pt").input_ids
    return ids[:, :length]


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
def generate(
    model: Any,
    ids: torch.Tensor,
    name: str,
    tokens: int = TOKENS,
    measure: Callable[[], float] | None = None,
) -> Generation:
    """Go on from `ids`, (1, L), by `tokens` tokens, with the attention and the cache that go with `name`.

    `measure` is called after each token but the first, whose time it is no part of.
    """
    model.set_attn_implementation(name)
    cache = PagedCache(model.config) if name == "fastattn" else DynamicCache(config=model.config)
    logits, seconds, attention, beside = [], [], [], []
    clocked: AbstractContextManager[list[float]] = nullcontext([]) if name == "eager" else clock(name)
    with clocked as calls:
        for _ in range(tokens):
            start = time.perf_counter()
            last = model(ids, **{KEYWORD: cache}, use_cache=True, logits_to_keep=1).logits[:, -1]
            ids = last.argmax(-1, keepdim=True)
            seconds.append(time.perf_counter() - start)
            attention.append(sum(calls))
            calls.clear()
            logits.append(last)
            if measure is not None and len(seconds) > 1:
                beside.append(measure())
    best = torch.cat(logits).float().topk(2)
    margins = (best.values[:, 0] - best.values[:, 1]).tolist()
    chosen = torch.cat(logits).argmax(-1).tolist()
    return Generation(chosen, margins, seconds[0], attention[0], seconds[1:], attention[1:], beside)


def measured(
    model: Any, ids: torch.Tensor, name: str, measure: Callable[[], float] | None = None
) -> tuple[Generation, float]:
    """`generate`, and the most memory that the process held meanwhile, in MiB (NaN but on Linux)."""
    process = Path("/proc/self")
    if not (process / "clear_refs").exists():
        return generate(model, ids, name, measure=measure), float("nan")
    (process / "clear_refs").write_text("5")  # forgets how large it has been
    made = generate(model, ids, name, measure=measure)
    peak = (process / "status").read_text().split("VmHWM:")[1].split()[0]
    return made, int(peak) / 1024


def agrees(ours: Generation, eager: Generation) -> bool:
    """Whether the tokens are eager's, up to the first of which rounding may choose another."""
    steps = zip(ours.tokens, eager.tokens, eager.margins, strict=True)
    return next((margin < TIE for token, other, margin in steps if token != other), True)


# What a row of the table tells of a prompt of so many tokens, and whether more is better.
ROWS: dict[str, tuple[bool, Callable[[int, Generation, float], float]]] = {
    "prompt, tokens a second": (True, lambda length, made, _: length / made.prefill),
    "its attention, ms": (False, lambda _, made, __: 1e3 * made.prefill_attention),
    "then, tokens a second": (True, lambda _, made, __: 1 / made.step),
    "attention of one, ms": (False, lambda _, made, __: 1e3 * statistics.median(made.attention)),
    "memory at most, MiB": (False, lambda _, __, memory: memory),
}


def compare_generation(model: Any, tokenizer: Any, console: Console) -> bool:
    """Print speed and memory; True where all tokens are eager's."""
    made: dict[int, dict[str, tuple[Generation, float]]] = {}
    with Progress(console=console, transient=True) as progress:
        steps = progress.add_task("generation with a cache", total=len(LENGTHS) * len(IMPLEMENTATIONS))
        for length in LENGTHS:
            ids = text(tokenizer, length)
            for name in IMPLEMENTATIONS:
                generate(model, ids[:, :16], name, 2)  # warm
                made.setdefault(length, {})[name] = measured(model, ids, name)
                progress.advance(steps)
    console.print(table(made))
    console.print(
        f"float32, threads: {torch.get_num_threads()}. Memory is all of the process, the model included. "
        "Eager's attention cannot be timed apart.",
        style="dim",
    )
    return all(agrees(one[name][0], one["eager"][0]) for one in made.values() for name in IMPLEMENTATIONS)


def table(made: dict[int, dict[str, tuple[Generation, float]]]) -> Table:
    """Rows of each prompt by its length, columns of implementations by their names."""
    drawn = Table(
        title="Generation: fastattn with its PagedCache, beside eager and sdpa", title_justify="left"
    )
    for heading in ("prompt", "", *IMPLEMENTATIONS, "over sdpa"):
        drawn.add_column(heading, justify="right" if heading else "left")
    for length, by_name in made.items():
        label = f"{length} tokens"
        for what, (more_is_better, measure) in ROWS.items():
            values = [measure(length, *by_name[name]) for name in IMPLEMENTATIONS]
            ratio = values[2] / values[1] if more_is_better else values[1] / values[2]
            cells = [f"{value:.{0 if value >= 100 else 1}f}" if value > 0 else "-" for value in values]
            drawn.add_row(label, what, *cells, f"{ratio:.2f}x" if ratio > 0 else "-")
            label = ""
        eager = by_name["eager"][0]
        verdicts = [agrees(by_name[name][0], eager) for name in IMPLEMENTATIONS[1:]]
        cells = ["[green]as eager's" if verdict else "[red]others" for verdict in verdicts]
        drawn.add_row("", f"{len(eager.tokens)} greedy tokens", "", *cells, "", end_section=True)
    return drawn
