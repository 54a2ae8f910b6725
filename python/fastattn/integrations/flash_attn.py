"""flash-attention by its own names, computed by fastattn on the CPU and on GPUs.

Import a function from here, and one line of a program changes; `install`, and none does: it puts all of them
where ``import flash_attn`` finds them.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from fastattn.integrations import flash_attn_padding
from fastattn.integrations.flash_attn_functions import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from fastattn.integrations.flash_attn_kvcache import flash_attn_with_kvcache

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "install",
    "uninstall",
]

# The release whose functions these are; what follows the plus sign says that they are not its own.
VERSION = "2.8.3+fastattn"

_FUNCTIONS = [name for name in __all__ if name.startswith("flash_attn")]
_PADDING = ["index_first_axis", "index_put_first_axis", "pad_input", "unpad_input"]
_replaced: dict[str, ModuleType] = {}


def install(*, force: bool = False) -> None:
    """Let ``import flash_attn`` find the functions of this module, in this process.

    There are then ``flash_attn``, ``flash_attn.flash_attn_interface`` and ``flash_attn.bert_padding`` (with
    `unpad_input`, `pad_input`, `index_first_axis` and `index_put_first_axis`), and metadata of a distribution
    ``flash-attn``: `importlib.util.find_spec` and `importlib.metadata.version` find them. Other modules of
    flash-attention raise ModuleNotFoundError. Does nothing the second time.

    Call it before libraries look: many do so once, when they are imported.

    Parameters
    ----------
    force : bool
        Also in the place of another ``flash_attn``, until `uninstall`. Names imported from there stay.

    Raises
    ------
    RuntimeError
        If there is another ``flash_attn``, loaded or to be found, and `force` is False.

    Examples
    --------
    >>> from fastattn.integrations import flash_attn
    >>> flash_attn.install()
    >>> from flash_attn import flash_attn_func
    >>> flash_attn_func is flash_attn.flash_attn_func
    True
    >>> flash_attn.uninstall()
    """
    if _is_installed():
        return
    if not force and ("flash_attn" in sys.modules or importlib.util.find_spec("flash_attn") is not None):
        raise RuntimeError("there is another flash_attn; install(force=True) takes its place")
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        _replaced[name] = sys.modules.pop(name)
    functions = {name: globals()[name] for name in _FUNCTIONS}
    padding = {name: getattr(flash_attn_padding, name) for name in _PADDING}
    interface = _module("flash_attn.flash_attn_interface", functions)
    bert_padding = _module("flash_attn.bert_padding", padding)
    parts = {"flash_attn_interface": interface, "bert_padding": bert_padding}
    package = _module("flash_attn", {"__version__": VERSION, "__path__": [], **functions, **parts})
    sys.modules.update({module.__name__: module for module in (package, interface, bert_padding)})
    sys.meta_path.insert(0, _FINDER)


def uninstall() -> None:
    """Undo `install`; what was there before is there again."""
    if not _is_installed():
        return
    sys.meta_path.remove(_FINDER)
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        del sys.modules[name]
    sys.modules.update(_replaced)
    _replaced.clear()


class _Metadata(Distribution):
    """What `importlib.metadata` says of a distribution without files."""

    def read_text(self, filename: str) -> str | None:
        return {
            "METADATA": f"Metadata-Version: 2.1\nName: flash-attn\nVersion: {VERSION}\n",
            "top_level.txt": "flash_attn\n",
        }.get(str(filename))

    def locate_file(self, path: Any) -> Path:
        return Path(path)


_EVERYWHERE = DistributionFinder.Context()


class _Finder(DistributionFinder):
    """Finds the metadata. The modules need no finder: they are there."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        return None

    def find_distributions(self, context: DistributionFinder.Context = _EVERYWHERE) -> Iterator[Distribution]:
        elsewhere = "path" in vars(context)  # a search of certain folders
        name = context.name and re.sub(r"[-_.]+", "-", context.name).lower()
        if not elsewhere and name in (None, "flash-attn"):
            yield _Metadata()


_FINDER = _Finder()


def _is_installed() -> bool:
    return _FINDER in sys.meta_path


def _module(name: str, contents: dict[str, Any]) -> ModuleType:
    module = ModuleType(name, __doc__)
    module.__spec__ = ModuleSpec(name, None, origin=__file__, is_package="__path__" in contents)
    module.__package__ = name if "__path__" in contents else name.rpartition(".")[0]
    module.__file__ = __file__
    vars(module).update(contents)
    return module
