"""Where a language model looks while it reads: one head, drawn from the weights that fastattn returns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastattn import viz

SENTENCE = "The animal did not cross the street because it was too tired."
# Found by looking: verbs, and the pronoun, look back at their subject.
LAYER, HEAD = 13, 8


@torch.inference_mode()
def draw(model: Any, tokenizer: Any, folder: Path) -> Path:
    """Write the picture into `folder` and return where."""
    model.set_attn_implementation("fastattn")
    inputs = tokenizer(SENTENCE, return_tensors="pt")
    weights = model(**inputs, output_attentions=True).attentions[LAYER][0, HEAD]
    tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    figure = viz.heatmap(weights, tokens, title=f"SmolLM2-135M, layer {LAYER}, head {HEAD}")
    return viz.save(figure, folder / "attention.png", dpi=200)
