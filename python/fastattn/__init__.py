"""Exact, fast attention for NumPy arrays and PyTorch tensors."""

from importlib.metadata import version

from fastattn._config import show_config
from fastattn._threads import get_num_threads, set_num_threads
from fastattn.explanation import Explanation, explain
from fastattn.functional import attention
from fastattn.merge import merge_states

__version__ = version("fastattn")

__all__ = [
    "Explanation",
    "__version__",
    "attention",
    "explain",
    "get_num_threads",
    "merge_states",
    "set_num_threads",
    "show_config",
]
