"""What does a word look at in a trained model? Every layer and head of MiniLM, as links and as a page.

    python examples/word_links.py --text "The cup broke because it was thin" --word it

The model is all-MiniLM-L6-v2: six layers of twelve heads, which look both ways [1]. It runs as ever, through
transformers with fastattn as its attention, and viz.record keeps what each layer looks at.

Some heads look at one place, as at the word before. Some find what a pronoun stands for, which nobody taught
them. And many look at [CLS] and [SEP], the marks of beginning and end: shares add up to 1, and a head that
finds nothing of its own has to put them somewhere. A link says what is looked at, not what becomes of it.

[1] Wang et al., "MiniLM: Deep Self-Attention Distillation", 2020.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastattn import viz
from fastattn.demo.models import EMBEDDING_PACKAGE, folder_of, load_folder
from fastattn.integrations.transformers import register

SENTENCES = [
    ("The Law will never be perfect, but its application should be just", "its"),
    ("The animal didn't cross the street because it was too tired", "it"),
]
MARKS = ("[CLS]", "[SEP]")


def load(folder: Path | None) -> tuple[Any, Any]:
    """The model, with fastattn as its attention, and its tokenizer; MiniLM comes in a package."""
    register()
    model, tokenizer = load_folder(folder or folder_of(EMBEDDING_PACKAGE) / "model")
    model.set_attn_implementation("fastattn")
    return model, tokenizer


@torch.no_grad()
def look(model: Any, tokenizer: Any, sentence: str) -> viz.Recording:
    """The attention of every layer while the model reads the sentence."""
    inputs = tokenizer(sentence, return_tensors="pt")
    tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    with viz.record(model, tokens=tokens) as recording:
        model(**inputs)
    return recording


def explain(tokens: Sequence[str], weights: np.ndarray, query: int) -> None:
    """Print what the word looks at: the word that each head prefers, and the average over all.

    Parameters
    ----------
    tokens : sequence of str
    weights : array, shape (layers, heads, queries, keys)
    query : int
        The place of the word.
    """
    shares = weights[:, :, query]  # (layers, heads, keys)
    words = [place for place, token in enumerate(tokens) if token not in MARKS]
    print("   the word that each head looks at most, a line a layer:")
    for layer, heads in enumerate(shares):
        best = [tokens[words[place]] for place in heads[:, words].argmax(axis=-1)]
        print(f"   {layer}  " + " ".join(f"{token[:9]:<9}" for token in best))
    others = [place for place in words if place != query]
    order = np.argsort(-shares[..., others], axis=None, kind="stable")[:5]
    print("   the strongest of these links, but for those to itself:")
    for layer, head, place in zip(*np.unravel_index(order, shares[..., others].shape), strict=True):
        target = others[place]
        print(f"   layer {layer}, head {head:>2}: {shares[layer, head, target]:.2f} at {tokens[target]!r}")
    mean = shares.mean(axis=(0, 1))
    ranked = sorted(words, key=lambda place: -mean[place])[:4]
    named = ", ".join(f"{tokens[place]!r} {mean[place]:.2f}" for place in ranked)
    print(f"   over all layers and heads: {named}; the marks {1 - mean[words].sum():.2f}")


def draw(tokens: Sequence[str], maps: np.ndarray, query: int, names: Sequence[str], title: str) -> Any:
    """A picture of several maps, (maps, queries, keys): the links of one query in each."""
    from matplotlib.figure import Figure

    columns = 3 if len(maps) <= 6 else 4
    rows = -(-len(maps) // columns)
    size = (0.3 + 3.4 * columns, 0.6 + rows * (0.5 + 0.19 * len(tokens)))
    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(wspace=0.12)  # the numbers of one map keep clear of the words of the next
    for axes, matrix, name in zip(figure.subplots(rows, columns).flat, maps, names, strict=False):
        viz.links(matrix, tokens, query=query, title=name, ax=axes)
    figure.suptitle(title, fontweight="bold")
    return figure


def show(recording: viz.Recording, sentence: str, word: str, layer: int, out: Path, name: str) -> None:
    """Print and draw what `word` looks at."""
    tokens = recording.tokens or []
    query = tokens.index(word)
    weights = np.stack([recorded.weights[0] for recorded in recording.layers])  # (layers, heads, L, L)
    print(f"\n{sentence}\n   what does {word!r} look at?\n")
    explain(tokens, weights, query)
    places = [f"layer {number}" for number in range(len(weights))]
    layers = draw(tokens, weights.mean(axis=1), query, places, f"{word!r}, by layer, heads averaged")
    places = [f"head {number}" for number in range(weights.shape[1])]
    heads = draw(tokens, weights[layer], query, places, f"{word!r} in layer {layer}, by head")
    print(f"   pictures: {viz.save(layers, out / f'{name}_layers.png')}", end=", ")
    print(viz.save(heads, out / f"{name}_heads.png"), end=", ")
    viz.page(recording, path=out / f"{name}.html", title=sentence)
    print(f"and all layers and heads to explore: {out / f'{name}.html'}")


def main(argv: Sequence[str] | None = None) -> list[viz.Recording]:
    """Show the sentences, and return their recordings."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--text", default="The cup broke because it was thin", help="a sentence of your own")
    parser.add_argument("--word", default="it", help="the word of it whose attention is shown (default: it)")
    parser.add_argument("--layer", type=int, default=3, help="of which heads are drawn (default: 3)")
    parser.add_argument("--model", type=Path, help="a folder with another model (default: MiniLM)")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).with_name("output"), help="folder for pictures and pages"
    )
    arguments = parser.parse_args(argv)
    model, tokenizer = load(arguments.model)
    if not 0 <= arguments.layer < model.config.num_hidden_layers:
        last = model.config.num_hidden_layers - 1
        parser.error(f"--layer: expected 0 to {last}, got {arguments.layer}")
    cases = [*SENTENCES, (arguments.text, arguments.word.lower())]
    recordings = [look(model, tokenizer, sentence) for sentence, _ in cases]
    if cases[-1][1] not in recordings[-1].tokens:
        words = " ".join(token for token in recordings[-1].tokens if token not in MARKS)
        parser.error(f"--word: expected one of: {words}; got {arguments.word!r}")
    for number, ((sentence, word), recording) in enumerate(zip(cases, recordings, strict=True), 1):
        show(recording, sentence, word, arguments.layer, arguments.out, f"word_links_{number}")
    return recordings


if __name__ == "__main__":
    main()
