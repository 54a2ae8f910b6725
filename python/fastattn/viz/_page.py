"""One page of HTML that shows attention and needs nothing besides."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from fastattn.viz._page_data import layers_of

_SCRIPT = Path(__file__).with_name("page.js")
# The page may run what it carries, and fetch nothing.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.45 system-ui, sans-serif; color: #222; background: #fff; margin: 1rem auto;
  max-width: 90rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; }
.menus { display: flex; flex-wrap: wrap; gap: 0.5rem 1.5rem; }
.menus label[hidden] { display: none; }
select, input { font: inherit; max-width: 16rem; }
.views { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 34rem), 1fr)); gap: 1rem; }
.views > div { min-width: 0; }
/* Plotly's buttons: in the margin below, where the labels of the map leave them room. */
#map .modebar-container { top: auto !important; bottom: 30px; }
"""
_BODY = """<main>
<h1>{title}</h1>
<div class="menus" role="group" aria-label="What is shown">
<label>Layer <select id="layer"></select></label>
<label>Head <select id="head"></select></label>
<label>Query <select id="query"></select></label>
<label>Links from query <input id="first" type="number" min="0" value="0"></label>
</div>
<p id="strongest" aria-live="polite"></p>
<div class="views"><div id="map" role="img"></div><div id="links" role="img"></div></div>
<p>A row of the map is a query and adds up to 1; colours run with the square root of the weight. A line is a
pair of query and key, the stronger the wider. Hover over either for the weight; click a query to see its
links alone, again for all. <span id="note"></span></p>
<noscript>This page draws with JavaScript, which is switched off.</noscript>
</main>"""


def page(
    recording: Any,
    tokens: Sequence[str] | None = None,
    path: str | PathLike[str] | None = None,
    *,
    key_tokens: Sequence[str] | None = None,
    title: str = "Attention",
) -> str:
    """Make one HTML page to explore attention on: menus for layer, head and query, weights by hovering.

    Parameters
    ----------
    recording : Recording, array, Insight, or list of either
        What ``fastattn.viz.record`` gave: anything whose `layers` have a `name` and `weights` (H, Lq, Lk) or,
        where those are None, an `insight`. Or probabilities themselves, (Lq, Lk), (H, Lq, Lk), (1, H, Lq, Lk)
        or (layers, H, Lq, Lk), or what ``fastattn.insight`` returns. Or a list with one of these a layer, as
        are the `attentions` of a model of transformers'. A batch has one sequence.
    tokens : sequence of str, optional
        The queries, and the keys if there are as many; those of the recording, or positions, by default. A
        causal layer of a recording may have fewer: its queries are then the last of its keys.
    path : path-like, optional
        Where to write the page; folders that are missing are made.
    key_tokens : sequence of str, optional
        The keys, where they are others. In an encoder with a decoder, each side of a layer has those tokens
        of the two that are as many.
    title : str
        Of the page.

    Returns
    -------
    str
        The page, some 5 MB of which are plotly.js; it fetches nothing and works from disk. Weights are kept
        in 16 bits, and above 1 (after dropout) count as 1. Where all weights need more than 12 MB, the
        strongest keys of each query are kept, as many as fit, and the page says so.

    Raises
    ------
    ImportError
        Without plotly.
    TypeError
        Where an argument is no array or no sequence of strings.
    ValueError
        Where shapes do not fit, numbers are negative, or a layer has neither weights nor an insight.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError("fastattn.viz.page needs plotly: pip install 'fastattn[viz]'") from error
    # A token may say </script>.
    data = json.dumps(layers_of(recording, tokens, key_tokens), separators=(",", ":")).replace("<", "\\u003c")
    name = html.escape(title)
    text = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{_BODY.format(title=name)}\n"
        f'<script type="application/json" id="layers">{data}</script>\n'
        f"<script>{get_plotlyjs()}</script>\n<script>\n{_SCRIPT.read_text(encoding='utf-8')}</script>\n"
        f"</body>\n</html>\n"
    )
    if path is not None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return text
