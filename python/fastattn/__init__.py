"""Exact, fast attention for NumPy arrays and PyTorch tensors."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fastattn._config import show_config
from fastattn._threads import get_num_threads, set_num_threads
from fastattn.explanation import Explanation, explain
from fastattn.functional import attention
from fastattn.insights import Insight, insight
from fastattn.kvcache import attention_with_kvcache
from fastattn.merge import merge_states
from fastattn.paged_cache import OutOfPagesError, PagedKVCache
from fastattn.varlen import attention_varlen

if TYPE_CHECKING:
    from fastattn.integrations.torch_sdpa import scaled_dot_product_attention as scaled_dot_product_attention
    from fastattn.integrations.torch_sdpa_patch import patch_sdpa as patch_sdpa

__version__ = version("fastattn")

__all__ = [
    "Explanation",
    "Insight",
    "OutOfPagesError",
    "PagedKVCache",
    "__version__",
    "attention",
    "attention_varlen",
    "attention_with_kvcache",
    "explain",
    "get_num_threads",
    "insight",
    "merge_states",
    "set_num_threads",
    "show_config",
]

_NEED_TORCH = {  # so they are imported when asked for, and `from fastattn import *` does not ask
    "patch_sdpa": "fastattn.integrations.torch_sdpa_patch",
    "scaled_dot_product_attention": "fastattn.integrations.torch_sdpa",
}


def __getattr__(name: str) -> Any:
    if name not in _NEED_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_NEED_TORCH[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_NEED_TORCH})


if hasattr(sys.modules.get("torch"), "library"):  # loaded: compiled code is to find the operators
    import_module("fastattn.torch")
