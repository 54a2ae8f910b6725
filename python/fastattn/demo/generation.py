"""Generation by eager attention, by sdpa and by fastattn with its cache: a prompt, then a token at a time."""

from __future__ import annotations

import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from packaging import version
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import DynamicCache

from fastattn.demo.chat import TIE, prompts
from fastattn.demo.speed import LENGTHS, clock
from fastattn.integrations.transformers import PagedCache

IMPLEMENTATIONS = ("eager", "sdpa", "fastattn")
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

    @property
    def step(self) -> float:
        """Median seconds a token."""
        return statistics.median(self.steps)


def text(tokenizer: Any, length: int) -> torch.Tensor:
    """(1, length): the demo's prompts, over and over."""
    ids: torch.Tensor = tokenizer(" ".join(prompts() * 100), return_tensors="pt").input_ids
    return ids[:, :length]


@torch.inference_mode()
def generate(model: Any, ids: torch.Tensor, name: str, tokens: int = TOKENS) -> Generation:
    """Go on from `ids`, (1, L), by `tokens` tokens, with the attention and the cache that go with `name`."""
    model.set_attn_implementation(name)
    cache = PagedCache(model.config) if name == "fastattn" else DynamicCache(config=model.config)
    logits, seconds, attention = [], [], []
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
    best = torch.cat(logits).float().topk(2)
    margins = (best.values[:, 0] - best.values[:, 1]).tolist()
    chosen = torch.cat(logits).argmax(-1).tolist()
    return Generation(chosen, margins, seconds[0], attention[0], seconds[1:], attention[1:])


def agrees(ours: Generation, eager: Generation) -> bool:
    """Whether the tokens are eager's, up to the first of which rounding may choose another."""
    steps = zip(ours.tokens, eager.tokens, eager.margins, strict=True)
    return next((margin < TIE for token, other, margin in steps if token != other), True)


def compare_generation(model: Any, tokenizer: Any, console: Console) -> bool:
    """Print tokens a second; True where all tokens are eager's."""
    made: dict[int, dict[str, Generation]] = {}
    with Progress(console=console, transient=True) as progress:
        steps = progress.add_task("generation with a cache", total=len(LENGTHS) * len(IMPLEMENTATIONS))
        for length in LENGTHS:
            ids = text(tokenizer, length)
            for name in IMPLEMENTATIONS:
                generate(model, ids[:, :16], name, 2)  # warm
                made.setdefault(length, {})[name] = generate(model, ids, name)
                progress.advance(steps)
    table = Table(
        title=f"Generation, float32, {torch.get_num_threads()} threads: tokens a second, fastattn with its "
        "PagedCache",
        title_justify="left",
    )
    for heading in ("prompt", "", *IMPLEMENTATIONS, "against sdpa"):
        table.add_column(heading, justify="right" if heading else "left")
    passed = True
    for length, by_name in made.items():
        same = all(agrees(by_name[name], by_name["eager"]) for name in IMPLEMENTATIONS)
        passed &= same
        for part, count in (("prefill", length), ("decode", 1)):
            rates = [
                count / (made_by.prefill if part == "prefill" else made_by.step)
                for made_by in map(by_name.__getitem__, IMPLEMENTATIONS)
            ]
            label = f"{length} tokens" if part == "prefill" else ""
            table.add_row(label, part, *(f"{rate:.0f}" for rate in rates), f"{rates[2] / rates[1]:.2f}x")
        verdict = "[green]the same[/]" if same else "[red]others[/]"
        table.add_row("", f"{TOKENS} greedy tokens: {verdict} in all", end_section=True)
    console.print(table)
    return passed
