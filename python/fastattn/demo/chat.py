"""Generation: an answer, streamed, and greedy tokens beside those of eager attention."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

TOKENS = 64
# Two logits this close may change places by rounding alone: no two implementations need agree from there on.
TIE = 1e-3


def prompts() -> list[str]:
    """What is asked, a line each."""
    return Path(__file__).with_name("prompts.txt").read_text().splitlines()


def encode(tokenizer: Any, prompt: str) -> Any:
    """`prompt` as the model was taught to be asked."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )


class Printer(transformers.TextStreamer):
    """Writes text to the console as it is generated."""

    def __init__(self, tokenizer: Any, console: Console) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.console = console

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print what has become whole words."""
        self.console.print(text, end="\n" if stream_end else "", style="cyan", markup=False, highlight=False)


def answer(model: Any, tokenizer: Any, prompt: str, console: Console) -> None:
    """Ask `prompt` and print the answer while it is made."""
    console.print(f"[bold]{prompt}")
    model.set_attn_implementation("fastattn")
    inputs = encode(tokenizer, prompt)
    model.generate(**inputs, max_new_tokens=120, do_sample=False, streamer=Printer(tokenizer, console))


@dataclass(frozen=True)
class Comparison:
    """Greedy tokens of one prompt, with fastattn and with eager."""

    prompt: str
    same: int  # leading tokens in common
    tie: int | None  # the first step at which eager's two best logits are within TIE
    margin: float  # smallest distance of eager's two best logits, over the steps compared

    @property
    def passed(self) -> bool:
        """Whether tokens agree up to the first of which rounding may choose another."""
        return self.same >= (TOKENS if self.tie is None else self.tie)


def compare(model: Any, tokenizer: Any, prompt: str) -> Comparison:
    """Generate `TOKENS` tokens twice; the end of the text is forbidden, so that there are as many."""
    inputs = encode(tokenizer, prompt)
    length = inputs["input_ids"].shape[1]
    tokens, scores = {}, {}
    for name in ("eager", "fastattn"):
        model.set_attn_implementation(name)
        result = model.generate(
            **inputs,
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
        tokens[name], scores[name] = result.sequences[0, length:], torch.cat(result.scores)
    best = scores["eager"].topk(2, dim=-1).values
    margins = best[:, 0] - best[:, 1]
    ties = torch.nonzero(margins < TIE)
    tie = int(ties[0]) if len(ties) else None
    same = int((tokens["eager"] == tokens["fastattn"]).int().cumprod(0).sum())
    return Comparison(prompt, same, tie, float(margins[: tie + 1 if tie is not None else None].min()))


def compare_all(model: Any, tokenizer: Any, console: Console) -> bool:
    """Print how many tokens agree for every prompt; True where all of them do."""
    with Progress(console=console, transient=True) as progress:
        rows = [
            compare(model, tokenizer, prompt)
            for prompt in progress.track(prompts(), description="greedy tokens beside eager's")
        ]
    table = Table(title=f"Greedy tokens, fastattn beside eager, {TOKENS} a prompt", title_justify="left")
    table.add_column("prompt", ratio=1)
    table.add_column("identical", justify="right")
    table.add_column("smallest margin", justify="right")
    for row in rows:
        verdict = f"[green]{row.same}/{TOKENS}" if row.passed else f"[red]{row.same}/{TOKENS}"
        if row.tie is not None:
            verdict += f" [yellow]tie at {row.tie}"
        table.add_row(row.prompt, verdict, f"{row.margin:.1e}")
    console.print(table)
    console.print(
        "margin: how far eager's two best logits are apart at the closest step; "
        f"below {TIE:.0e} (a tie) rounding may choose.",
        style="dim",
    )
    return all(row.passed for row in rows)
