"""The demo from end to end: text, tokens, speed and memory, embeddings, a picture."""

from __future__ import annotations

import os
import time
from pathlib import Path

from rich.console import Console
from rich.rule import Rule

from fastattn.demo import models


def run(console: Console, folder: Path) -> list[str]:
    """Run everything, and draw into `folder`; return what failed.

    Raises
    ------
    ModuleNotFoundError
        For a package that is missing, before anything is run; the message says how to install it.
    """
    models.check_installed("torch", "transformers", "gguf", "accelerate", "matplotlib")
    for package in (models.LANGUAGE_PACKAGE, models.EMBEDDING_PACKAGE):
        models.folder_of(package)
    start = time.perf_counter()
    with console.status("importing torch and transformers"):
        models.start_transformers()
        import torch

        import fastattn
        from fastattn.demo import chat, generation, picture, sentences
        from fastattn.integrations.transformers import register
    register()

    console.print(Rule("A language model through fastattn", align="left"))
    with console.status("loading SmolLM2-135M-Instruct (its GGUF file becomes float32)"):
        model, tokenizer = models.load_language_model()
    failures = []
    chat.answer(model, tokenizer, chat.prompts()[0], console)
    if not chat.compare_all(model, tokenizer, console):
        failures.append("greedy tokens differ from eager's")
    if not generation.compare_generation(model, tokenizer, console):
        failures.append("tokens generated with a cache differ from eager's")

    console.print(Rule("Sentence embeddings", align="left"))
    with console.status("loading all-MiniLM-L6-v2"):
        embedder = models.load_embedding_model()
    if not sentences.compare_embeddings(*embedder, console):
        failures.append("embeddings differ from eager's")

    console.print(Rule("What ran", align="left"))
    config = model.config
    query = torch.empty(1, config.num_attention_heads, max(generation.LENGTHS), config.head_dim)
    key = query[:, : config.num_key_value_heads]
    console.print(str(fastattn.explain(query, key, key, causal=True)), highlight=False, markup=False)
    path = picture.draw(model, tokenizer, folder)
    console.print(f"\nattention of one head, drawn: [bold]{os.path.relpath(path)}")
    for failure in failures:
        console.print(f"[red]failed: {failure}")
    console.print(f"{time.perf_counter() - start:.0f} s in all", style="dim")
    return failures
