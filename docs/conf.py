"""The site, as `make docs` builds it: Sphinx, MyST for the pages, autodoc for the reference.

A built page fetches nothing. Formulas are MathML, which browsers draw themselves, and pictures are drawn by
`pictures.py` before the pages are read.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS))

import pictures  # noqa: E402

import fastattn  # noqa: E402

project = "fastattn"
author = copyright = "The fastattn authors"
release = version = fastattn.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
nitpicky = False  # types in docstrings are for readers: "(B, Hq) floats" is no name

html_theme = "furo"
html_static_path, html_css_files = ["_static"], ["site.css"]
html_title = f"fastattn {version}"
html_show_sphinx = html_show_sourcelink = html_copy_source = False
html_math_renderer = "mathml"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "none"  # types and shapes are in the text
autodoc_preserve_defaults = True
napoleon_google_docstring = False
napoleon_use_rtype = False

# Files outside this folder, by the page of the site that shows their text.
ROOT = DOCS.parent
PAGES = {
    "ARCHITECTURE.md": "project/architecture",
    "CONTRIBUTING.md": "project/contributing",
    "CHANGELOG.md": "project/changelog",
    "README.md": "performance",  # its tables alone, which `python -m bench figures` writes
    "examples/README.md": "examples",
}
_LINK = re.compile(r"(!?)\[([^]]*)\]\(([^)#\s]+)(#[^)]*)?\)")


def read_page(_: Sphinx, page: str, source: list[str]) -> None:
    """Take in the text of the file that a page shows; links lead on within the site where they can."""
    source[0] = mend_links(source[0], (DOCS / page).parent)
    for name in (name for name, shown in PAGES.items() if shown == page):
        text = (ROOT / name).read_text()
        if name == "README.md":
            source[0] += mend_links(re.split(r"<!-- /?figures -->", text)[1], ROOT)
        else:
            source[0] = mend_links(text, (ROOT / name).parent)


def mend_links(text: str, folder: Path) -> str:
    """Turn links that are right for a reader of the file, which lies in `folder`, into those of the site."""

    def mended(link: re.Match[str]) -> str:
        image, shown, path, anchor = link[1], link[2], link[3], link[4] or ""
        place = (folder / path).resolve()
        if not place.exists() or ROOT not in place.parents:
            return link[0]
        name = place.relative_to(ROOT).as_posix()
        if name in PAGES:
            return f"[{shown}](/{PAGES[name]}.md{anchor})"
        if DOCS in place.parents:
            return f"{image}[{shown}](/{place.relative_to(DOCS).as_posix()}{anchor})"
        return f"![{shown}](/../{name})" if image else f"{{download}}`{shown.strip('`')} </../{name}>`"

    return _LINK.sub(mended, text)


def mend_docstring(_: Sphinx, __: str, name: str, ___: object, ____: object, lines: list[str]) -> None:
    """Tell the footnotes of docstrings on one page apart, and a dimension, "D.", from an item of a list."""
    label = re.sub(r"\W", "-", name)
    for place, line in enumerate(lines):
        line = re.sub(r"\[(\d+)\]_", rf"[#{label}-\1]_", line)
        line = re.sub(r"^(\s*\.\. )\[(\d+)\]", rf"\1[#{label}-\2]", line)
        lines[place] = re.sub(r"^(\s*)([A-Z]\.)", r"\1\\\2", line)


def draw_pictures(_: Sphinx) -> None:
    """Draw what the pages show."""
    pictures.draw_all(DOCS / "_pictures")


def visit_math(translator: nodes.NodeVisitor, node: nodes.Element) -> None:
    """Formulas, inline or on lines of their own, as MathML."""
    block = isinstance(node, nodes.math_block)
    translator.body.append(tex2mathml(node.astext(), as_block=block))  # type: ignore[attr-defined]
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("builder-inited", draw_pictures)
    app.connect("source-read", read_page)
    app.connect("autodoc-process-docstring", mend_docstring, priority=400)  # before napoleon
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
