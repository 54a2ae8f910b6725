"""`install`: what ``import flash_attn`` finds, and that nothing else is disturbed."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastattn.integrations import flash_attn as fl


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    fl.uninstall()
    assert fl._FINDER not in sys.meta_path
    assert not [name for name in sys.modules if name.split(".")[0] == "flash_attn"]


def test_names_are_found() -> None:
    fl.install()
    fl.install()
    package = importlib.import_module("flash_attn")
    interface = importlib.import_module("flash_attn.flash_attn_interface")
    padding = importlib.import_module("flash_attn.bert_padding")
    assert package.flash_attn_interface is interface
    assert package.bert_padding is padding
    for name in fl.__all__:
        if name.startswith("flash_attn"):
            assert getattr(package, name) is getattr(interface, name) is getattr(fl, name)
    assert {"index_first_axis", "pad_input", "unpad_input"} <= set(dir(padding))
    assert pickle.loads(pickle.dumps(package.flash_attn_func)) is fl.flash_attn_func
    with pytest.raises(ModuleNotFoundError, match=r"flash_attn\.layers"):
        importlib.import_module("flash_attn.layers.rotary")


def test_checks_for_the_package_pass() -> None:
    before = set(importlib.metadata.packages_distributions())
    fl.install()
    for name in ("flash_attn", "flash_attn.bert_padding", "flash_attn.flash_attn_interface"):
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.name == name
    version = importlib.import_module("flash_attn").__version__
    assert version.split(".") >= ["2", "8"]
    assert importlib.metadata.version("flash-attn") == importlib.metadata.version("Flash_Attn") == version
    assert importlib.metadata.metadata("flash_attn")["Name"] == "flash-attn"
    distributions = importlib.metadata.packages_distributions()
    assert distributions["flash_attn"] == ["flash-attn"]
    assert set(distributions) == before | {"flash_attn"}
    fl.uninstall()
    assert importlib.util.find_spec("flash_attn") is None
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("flash-attn")


def test_transformers_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it would where there is a GPU, without which it does not look."""
    utils = pytest.importorskip("transformers.utils.import_utils")
    monkeypatch.setattr(utils, "is_torch_cuda_available", lambda: True)
    found = utils.is_flash_attn_2_available.__wrapped__, utils.is_flash_attn_greater_or_equal.__wrapped__
    for installed in (False, True):
        utils._package_distribution_mapping.cache_clear()
        assert found[0]() is found[1]("2.8.0") is installed
        fl.install()
    fl.uninstall()
    utils._package_distribution_mapping.cache_clear()


@pytest.mark.parametrize("loaded", [False, True])
def test_another_flash_attn_stays_unless_forced(
    loaded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("__version__ = '2.0'\n")
    (tmp_path / "flash_attn" / "layers.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    theirs = [importlib.import_module(name) for name in ("flash_attn", "flash_attn.layers") if loaded]
    with pytest.raises(RuntimeError, match=r"force=True"):
        fl.install()
    assert [sys.modules.get("flash_attn")] == (theirs[:1] or [None])
    fl.install(force=True)
    ours = importlib.import_module("flash_attn")
    assert ours.__version__ == importlib.metadata.version("flash_attn") != "2.0"
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("flash_attn.layers")
    fl.uninstall()
    assert [sys.modules.get("flash_attn"), sys.modules.get("flash_attn.layers")] == (theirs or [None, None])
    assert importlib.import_module("flash_attn").__version__ == "2.0"
    for name in ("flash_attn", "flash_attn.layers"):
        sys.modules.pop(name, None)
