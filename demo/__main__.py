"""The demo from end to end: text, tokens, speed, embeddings, a picture."""

from __future__ import annotations

import os
import sys
import time

# Before transformers is imported: the models are on disk, and nothing is to be asked of the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"  # bars of the loaders, that would break into ours
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from rich.console import Console
from rich.rule import Rule


def main() -> int:
    """Run everything; the exit status counts what failed."""
    console = Console(width=None if sys.stdout.isatty() else 110)
    start = time.perf_counter()
    with console.status("importing torch and transformers"):
        import torch
        import transformers

        import fastattn
        from demo import chat, generation, models, picture, sentences, speed
        from fastattn.integrations.transformers import register
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    register()

    console.print(Rule("A language model through fastattn", align="left"))
    with console.status("loading SmolLM2-135M-Instruct (its GGUF file becomes float32)"):
        model, tokenizer = models.load_language_model()
    failures = []
    chat.answer(model, tokenizer, chat.prompts()[0], console)
    if not chat.compare_all(model, tokenizer, console):
        failures.append("greedy tokens differ from eager's")
    speed.compare_speed(model, tokenizer, console)
    if not generation.compare_generation(model, tokenizer, console):
        failures.append("tokens generated with a cache differ from eager's")

    console.print(Rule("Sentence embeddings", align="left"))
    with console.status("loading all-MiniLM-L6-v2"):
        embedder = models.load_embedding_model()
    if not sentences.compare_embeddings(*embedder, console):
        failures.append("embeddings differ from eager's")

    console.print(Rule("What ran", align="left"))
    config = model.config
    query = torch.empty(1, config.num_attention_heads, max(speed.LENGTHS), config.head_dim)
    key = query[:, : config.num_key_value_heads]
    console.print(str(fastattn.explain(query, key, key, causal=True)), highlight=False, markup=False)
    path = picture.draw(model, tokenizer)
    console.print(f"\nattention of one head, drawn: [bold]{os.path.relpath(path)}")
    for failure in failures:
        console.print(f"[red]failed: {failure}")
    console.print(f"{time.perf_counter() - start:.0f} s in all", style="dim")
    return len(failures)


if __name__ == "__main__":
    sys.exit(main())
