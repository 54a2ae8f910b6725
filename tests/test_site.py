"""The site of the documents, built whole: no warning, every public name, pages that need no network."""

from __future__ import annotations

import importlib
import zlib
from pathlib import Path

import pytest

from browser import Browser

pytest.importorskip("sphinx", reason="no Sphinx: pip install '.[docs]'")
pytest.importorskip("furo")
pytest.importorskip("myst_parser")

from sphinx.cmd.build import build_main

from test_docs import PUBLIC, ROOT

# Warnings of Python are Sphinx's own: those about pages are in its log, and errors.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    trees = tmp_path_factory.mktemp("trees")
    options = ["-q", "-E", "-W", "--keep-going", "-d", str(trees)]
    assert build_main([*options, str(ROOT / "docs"), str(folder)]) == 0
    return folder


def test_every_public_name_has_an_entry(site: Path) -> None:
    inventory = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    entries = {line.split(" ", 1)[0] for line in zlib.decompress(inventory).decode().splitlines()}
    for module in PUBLIC:
        names = set(importlib.import_module(module).__all__) - {"__version__"}
        assert {f"{module}.{name}" for name in names} <= entries


def test_a_browser_shows_every_page(site: Path, browser: Browser) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        browser.open(page)
        missing = "return [...document.images].filter(x => x.complete && !x.naturalWidth).map(x => x.src)"
        assert browser.run(missing) == [], page
        assert browser.complaints() == [], page
        assert [address for address in browser.fetched() if not address.startswith("file:")] == [], page
