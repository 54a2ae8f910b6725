"""Embeddings of sentences of different lengths: padding, and attention that looks both ways."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from rich.table import Table

SENTENCES = (
    "A man is playing a guitar on stage.",
    "Someone performs music for an audience.",
    "The stock market fell sharply today.",
    "Shares dropped after the central bank, to everyone's surprise, raised its interest rates.",
    "Cats sleep.",
)
# Rounding in float32, through six layers.
TOLERANCE = 1e-5


@torch.inference_mode()
def embed(model: Any, tokenizer: Any, name: str) -> torch.Tensor:
    """(sentences, dimensions): the mean over a sentence's real tokens, scaled to length 1."""
    model.set_attn_implementation(name)
    inputs = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    states = model(**inputs).last_hidden_state
    weight = inputs["attention_mask"][..., None].to(states.dtype)
    return torch.nn.functional.normalize((states * weight).sum(1) / weight.sum(1), dim=-1)


def compare_embeddings(model: Any, tokenizer: Any, console: Console) -> bool:
    """Print how alike the sentences are; True where the vectors are eager's."""
    ours, eager = embed(model, tokenizer, "fastattn"), embed(model, tokenizer, "eager")
    similarity = ours @ ours.T
    table = Table(title="all-MiniLM-L6-v2: cosine similarity of sentences", title_justify="left")
    table.add_column("", justify="right")
    table.add_column("sentence", ratio=1)
    for number in range(1, len(SENTENCES) + 1):
        table.add_column(str(number), justify="right")
    for number, (sentence, row) in enumerate(zip(SENTENCES, similarity.tolist(), strict=True), 1):
        cells = [f"[{'bold green' if 0.4 < cosine < 0.999 else 'dim'}]{cosine:.2f}" for cosine in row]
        table.add_row(str(number), sentence, *cells)
    console.print(table)
    difference = float((ours - eager).abs().max())
    passed = difference < TOLERANCE
    console.print(f"largest difference from eager: [{'green' if passed else 'red'}]{difference:.1e}")
    return passed
