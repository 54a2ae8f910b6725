"""The demo's models, whole: prompts through SmolLM2, sentences through MiniLM, by fastattn and by sdpa."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

# What transformers calls the peers.
_IMPLEMENTATIONS = {"fastattn": "fastattn", "torch": "sdpa"}
# Of the states, root mean square: float32 rounding through 30 layers; a wrong mask is off by far more.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class ModelCase:
    """One pass through a model."""

    name: str
    model: str  # smollm2 or minilm
    batch: int
    tokens: int

    def __str__(self) -> str:
        return self.name


CASES = (
    ModelCase("smollm2-prefill-512", "smollm2", 1, 512),
    ModelCase("smollm2-prefill-2048", "smollm2", 1, 2048),
    ModelCase("minilm-encode-1x128", "minilm", 1, 128),
    ModelCase("minilm-encode-32x128", "minilm", 32, 128),  # of 32 to 128 tokens, padded
)


def prepare(case: ModelCase, peer: str) -> tuple[Callable[[], Any], Callable[[Any], np.ndarray]]:
    """A pass with the attention of `peer`, and what makes float64 states of its result."""
    import torch

    model, inputs = _load(case.model)[0], _inputs(case)
    model.set_attn_implementation(_IMPLEMENTATIONS[peer])
    extra = {"use_cache": True} if case.model == "smollm2" else {}

    @torch.inference_mode()
    def run() -> Any:
        return model(**inputs, **extra)

    return run, states


def truth(case: ModelCase) -> np.ndarray:
    """The same pass in float64, with the attention that transformers writes out."""
    import torch

    model = _load(case.model)[0].double()
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        return states(model(**_inputs(case)))


def states(result: Any) -> np.ndarray:
    out: np.ndarray = result.last_hidden_state.double().numpy()
    return out


@cache
def _load(name: str) -> tuple[Any, Any]:
    """The model without the head that makes words of its states, and the tokenizer."""
    # The models are on disk, and loaders' bars would break into ours.
    os.environ["HF_HUB_OFFLINE"] = os.environ["TQDM_DISABLE"] = "1"
    import transformers

    from demo import models
    from fastattn.integrations.transformers import register

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    register()
    try:
        if name == "smollm2":
            model, tokenizer = models.load_language_model()
            return model.model, tokenizer
        return models.load_embedding_model()
    except SystemExit as missing:
        raise ModuleNotFoundError(str(missing).split(":")[0]) from None


def _inputs(case: ModelCase) -> dict[str, Any]:
    """Text of the demo's prompts, over and over; in a batch, each sentence ends somewhere else."""
    import torch

    from demo.chat import prompts

    tokenizer = _load(case.model)[1]
    text = tokenizer(" ".join(prompts() * 100), return_tensors="pt", truncation=False).input_ids[0]
    ids = text[: case.batch * case.tokens].view(case.batch, case.tokens)
    inputs = {"input_ids": ids}
    if case.batch > 1:
        lengths = torch.linspace(case.tokens // 4, case.tokens, case.batch).long()
        inputs["attention_mask"] = (torch.arange(case.tokens) < lengths[:, None]).long()
    return inputs
