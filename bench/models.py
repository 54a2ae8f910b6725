"""The demo's models, whole: prompts through SmolLM2, sentences through MiniLM, by fastattn and by sdpa."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np

from bench.programs import Program, Read, Run

# What transformers calls the peers.
_IMPLEMENTATIONS = {"fastattn": "fastattn", "torch": "sdpa"}


@dataclass(frozen=True)
class ModelCase(Program):
    """One pass through a model."""

    unit: ClassVar[str] = "ktoken/s"
    model: str  # smollm2 or minilm
    batch: int
    tokens: int

    def work(self, mode: str) -> float:
        return self.batch * self.tokens / 1e3

    def tolerance(self, dtype: str) -> float:
        return 1e-4  # float32 rounding through 30 layers; a wrong mask is off by far more

    def prepare(self, peer: str, dtype: str, mode: str) -> tuple[Run, Read]:
        import torch

        model, inputs = _load(self.model)[0], _inputs(self)
        model.set_attn_implementation(_IMPLEMENTATIONS[peer])
        extra = {"use_cache": True} if self.model == "smollm2" else {}

        @torch.inference_mode()
        def run() -> Any:
            return model(**inputs, **extra)

        return run, _read

    def truth(self, dtype: str, mode: str) -> dict[str, np.ndarray]:
        """In float64, with the attention that transformers writes out."""
        import torch

        model = _load(self.model)[0].double()
        model.set_attn_implementation("eager")
        with torch.inference_mode():
            return _read(model(**_inputs(self)))


CASES = (
    ModelCase("smollm2-prefill-512", "smollm2", 1, 512),
    ModelCase("smollm2-prefill-2048", "smollm2", 1, 2048),
    ModelCase("minilm-encode-1x128", "minilm", 1, 128),
    ModelCase("minilm-encode-32x128", "minilm", 32, 128),  # of 32 to 128 tokens, padded
)


def _read(result: Any) -> dict[str, np.ndarray]:
    return {"states": result.last_hidden_state.double().numpy()}


def start_transformers() -> None:
    """Have it know fastattn and be still; to be called before anything else imports it."""
    from fastattn.demo import models

    models.start_transformers()
    from fastattn.integrations.transformers import register

    register()


@cache
def _load(name: str) -> tuple[Any, Any]:
    """The model without the head that makes words of its states, and the tokenizer."""
    start_transformers()
    from fastattn.demo import models

    if name == "smollm2":
        model, tokenizer = models.load_language_model()
        return model.model, tokenizer
    return models.load_embedding_model()


def _inputs(case: ModelCase) -> dict[str, Any]:
    """Text of the demo's prompts, over and over; in a batch, each sentence ends somewhere else."""
    import torch

    from fastattn.demo.chat import prompts

    tokenizer = _load(case.model)[1]
    text = tokenizer(" ".join(prompts() * 100), return_tensors="pt", truncation=False).input_ids[0]
    ids = text[: case.batch * case.tokens].view(case.batch, case.tokens)
    inputs = {"input_ids": ids}
    if case.batch > 1:
        lengths = torch.linspace(case.tokens // 4, case.tokens, case.batch).long()
        inputs["attention_mask"] = (torch.arange(case.tokens) < lengths[:, None]).long()
    return inputs
