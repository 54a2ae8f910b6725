"""Generation: an answer, streamed, and greedy tokens beside those of eager attention."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

TOKENS = 64
# Two logits this close may change places by rounding alone: no two implementations need agree from there on.
TIE = 1e-3


def prompts() -> list[str]:
    """What is asked, a line each."""
    return Path(__file__).with_name("prompts.txt").read_text().splitlines()


def encode(tokenizer: Any, *asked: str) -> Any:
    """Prompts as the model was taught to be asked, a row each; shorter ones are padded on the left."""
    tokenizer.padding_side = "left"
    return tokenizer.apply_chat_template(
        [[{"role": "user", "content": prompt}] for prompt in asked],
        add_generation_prompt=True,
        padding=True,
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
    console.print()


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


def compare(model: Any, tokenizer: Any, asked: list[str]) -> list[Comparison]:
    """Generate `TOKENS` tokens twice for all that is asked, in one batch that is padded on the left.

    The end of the text is forbidden, so that there are as many.
    """
    inputs = encode(tokenizer, *asked)
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
        tokens[name], scores[name] = result.sequences[:, length:], torch.stack(result.scores, 1)
    same = (tokens["eager"] == tokens["fastattn"]).int().cumprod(1).sum(1).tolist()
    best = scores["eager"].topk(2, dim=-1).values
    rows = []
    for prompt, equal, margins in zip(asked, same, best[..., 0] - best[..., 1], strict=True):
        ties = torch.nonzero(margins < TIE)
        tie = int(ties[0]) if len(ties) else None
        rows.append(
            Comparison(prompt, equal, tie, float(margins[: tie + 1 if tie is not None else None].min()))
        )
    return rows


def compare_all(model: Any, tokenizer: Any, console: Console) -> bool:
    """Print how many tokens agree for every prompt; True where all of them do."""
    with console.status(f"greedy tokens beside eager's: {TOKENS} each of {len(prompts())} prompts, twice"):
        rows = compare(model, tokenizer, prompts())
    table = Table(
        title=f"Greedy tokens, fastattn beside eager: {TOKENS} a prompt, in one padded batch",
        title_justify="left",
    )
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
