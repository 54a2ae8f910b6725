"""The interactive page: in a browser without a window, from disk."""

import base64
import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("plotly")

from fastattn import viz

RECORDED = re.compile(r'<script type="application/json" id="layers">(.*?)</script>')
TOKENS = ["The", "Ġcat", "▁sat", "</script><b>", "$x$", "&lt;"]
SHOWN = ["The", "cat", "sat", "</script><b>", "$x$", "&lt;"]


@pytest.fixture(scope="module")
def weights():
    return np.random.default_rng(0).dirichlet(np.full(6, 0.5), (2, 3, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def opened(browser, weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    viz.page(weights, TOKENS, path, title="A <page>")
    browser.open(path)
    return browser


def drawn(browser):
    """The weights that the heat map has."""
    return np.square(browser.run("return document.getElementById('map').data[0].z"))


def test_it_opens_in_peace_and_fetches_nothing(opened):
    assert opened.wait("return document.querySelectorAll('#map .hm image, #map image').length") == 1
    assert opened.run("return document.querySelectorAll('#links .scatterlayer .trace').length") > 2
    assert opened.complaints() == []
    assert opened.fetched() == []


def test_it_can_be_read_by_all(opened):
    assert opened.run("return [document.title, document.documentElement.lang]") == ["A <page>", "en"]
    assert opened.run("return document.querySelector('h1').textContent") == "A <page>"
    assert opened.run("return [...document.querySelectorAll('select')].every((menu) => menu.labels.length)")
    for picture in ("map", "links"):
        label = opened.run(f"return document.getElementById('{picture}').ariaLabel")
        assert "layer 0" in label


def test_menus_choose_layer_and_head(opened, weights):
    for layer in (1, 0):
        opened.choose("layer", f"layer {layer}")
        opened.choose("head", "average")
        np.testing.assert_allclose(drawn(opened), weights[layer].mean(0), atol=1e-5)
        for head in range(3):
            opened.choose("head", f"head {head}")
            np.testing.assert_allclose(drawn(opened), weights[layer, head], atol=1e-5)
    assert opened.complaints() == []


def test_tokens_are_text(opened):
    assert (
        opened.run(
            "return [...document.querySelectorAll('#map .ytick text')].map((tick) => tick.textContent)"
        )
        == SHOWN
    )
    assert opened.run("return document.querySelectorAll('#map b, #links b, main b').length") == 0


def hovered(browser, picture, x, y):
    """What is said where the mouse stands over a plot, at shares of its width and height."""
    area = f"document.querySelector('#{picture} .nsewdrag')"
    browser.run(f"{area}.scrollIntoView({{block: 'center'}})")
    box = browser.run(
        f"const box = {area}.getBoundingClientRect(); return [box.x, box.y, box.width, box.height]"
    )
    browser.hover(box[0] + x * box[2], box[1] + y * box[3])
    return browser.wait(f"return document.querySelector('#{picture} .hoverlayer').textContent")


def test_hovering_tells_the_weight(opened, weights):
    opened.choose("layer", "layer 1")
    opened.choose("head", "head 2")
    said = hovered(opened, "map", 2.5 / 6, 1.5 / 6)
    assert said == f"query cat (1)key sat (2)weight {weights[1, 2, 1, 2]:.3f}"


def test_one_query(opened, weights):
    opened.choose("layer", "layer 0")
    opened.choose("head", "head 1")
    opened.choose("query", "1: cat")
    row = weights[0, 1, 1]
    best = int(row.argmax())
    said = opened.run("return document.getElementById('strongest').textContent")
    assert said.startswith(f"cat (1) attends to: {SHOWN[best]} ({best}) {row[best]:.3f}, ")
    middle = ((1.5 + best + 0.5) / 2) / 6
    said = hovered(opened, "links", 0.5, middle)
    assert said == f"cat (1) → {SHOWN[best]} ({best})weight {row[best]:.3f}"
    opened.choose("query", "all")
    assert opened.run("return document.getElementById('strongest').textContent").startswith(
        "Strongest links: "
    )
    assert opened.complaints() == []


def test_a_long_text_of_its_strongest_keys(browser, tmp_path):
    """Only some queries are in the links; they follow the one chosen, and the map has all."""
    keys = np.full((1, 2, 700, 2), -1)  # the second head attends to nothing
    keys[0, 0, :, 0] = np.arange(700)
    keys[0, 0, 650] = [3, 699]
    weights = np.zeros((1, 2, 700, 2), np.float32)
    weights[0, 0, :, 0], weights[0, 0, 650] = 1.0, [0.75, 0.25]
    found = SimpleNamespace(keys=keys, weights=weights)
    viz.page(found, [f"w{place}" for place in range(700)], tmp_path / "a.html")
    browser.open(tmp_path / "a.html")
    cells = drawn(browser)
    assert cells.shape == (350, 350)
    # Queries 650 and 651 share a row of cells, whose diagonal is 651's.
    assert cells.sum() == pytest.approx((350 + 0.75 + 0.25) / 2, abs=1e-2)
    browser.choose("head", "head 0")
    assert drawn(browser).sum() == pytest.approx(350 + 0.75 + 0.25, abs=1e-2)
    labels = "return [...document.querySelectorAll('#links .textpoint')].map((text) => text.textContent)"
    assert "59: w59" in browser.run(labels)
    browser.choose("query", "650: w650")
    written = browser.run(labels)
    assert "650: w650" in written
    assert written[-2:] == ["3: w3", "699: w699"]
    assert browser.run("return document.getElementById('note').textContent").startswith("Kept are the 2 ")
    assert browser.complaints() == []
    assert browser.fetched() == []


def test_buttons_are_on_no_label(browser, tmp_path):
    for length, letters in ((20, 20), (8, 1), (150, 10)):
        tokens = [f"{place}".rjust(letters, "w") for place in range(length)]
        viz.page(np.eye(length), tokens, tmp_path / "a.html")
        browser.open(tmp_path / "a.html")
        found = browser.wait(
            """
            const box = (element) => element.getBoundingClientRect();
            const map = document.querySelector("#map"), written = [...map.querySelectorAll("svg text")];
            const page = box(map), buttons = box(map.querySelector(".modebar"));
            const apart = (one, other) => one.right <= other.left || other.right <= one.left
              || one.bottom <= other.top || other.bottom <= one.top;
            return written.length > 0 && {
              inside: buttons.top >= page.top && buttons.bottom <= page.bottom,
              covered: written.filter((text) => !apart(box(text), buttons)).map((text) => text.textContent),
            };"""
        )
        assert found == {"inside": True, "covered": []}


def layers_in(page):
    """What a page carries, decoded: (layer, weights, keys)."""
    for layer in json.loads(RECORDED.search(page)[1]):
        weights = np.frombuffer(base64.b64decode(layer["weights"]), "<u2") / 65535
        shape = (layer["heads"], len(layer["queryTokens"]), layer["topK"] or len(layer["keyTokens"]))
        keys = np.frombuffer(base64.b64decode(layer["keys"]), "<u4").astype(np.int32)
        yield layer, weights.reshape(shape), keys.reshape(shape) if layer["topK"] else None


def layer(name, weights, insight=None, call=0):
    return SimpleNamespace(name=name, weights=weights, insight=insight, causal=True, call=call)


def test_a_recording():
    rng = np.random.default_rng(1)
    prompt, step = rng.dirichlet(np.ones(4), (1, 2, 4)), rng.dirichlet(np.ones(5), (1, 2, 1))
    strong = SimpleNamespace(
        keys=np.array([[[[1, -1]]]]), weights=np.array([[[[1.0, 0.0]]]]), key_mass=np.ones((1, 1, 6))
    )
    layers = [layer("first", prompt), layer("first", step, call=1), layer("last", None, strong)]
    recording = SimpleNamespace(tokens=list("abcdef"), layers=layers)
    (one, dense, _), (two, row, _), (three, weights, keys) = layers_in(viz.page(recording))
    assert [one["name"], two["name"], three["name"]] == ["first, call 0", "first, call 1", "last"]
    assert (one["queryTokens"], one["keyTokens"]) == (list("abcd"), list("abcd"))
    assert (two["queryTokens"], two["keyTokens"]) == (["e"], list("abcde"))
    assert three["keyTokens"] == list("abcdef")
    np.testing.assert_allclose(dense, prompt[0], atol=1e-5)
    np.testing.assert_allclose(row, step[0], atol=1e-5)
    np.testing.assert_array_equal(keys, [[[1, -1]]])
    np.testing.assert_array_equal(weights, [[[1, 0]]])


def test_an_encoder_and_a_decoder():
    layers = [np.full((1, 2, *shape), 0.1) for shape in ((5, 5), (3, 3), (3, 5))]
    found = [layer for layer, *_ in layers_in(viz.page(layers, list("abc"), key_tokens=list("vwxyz")))]
    assert ["".join(layer["queryTokens"]) for layer in found] == ["vwxyz", "abc", "abc"]
    assert ["".join(layer["keyTokens"]) for layer in found] == ["vwxyz", "abc", "vwxyz"]


def test_how_large_it_is(monkeypatch):
    """Twelve layers of twelve heads over 60 tokens take 1.4 MB; what would take too much is cut."""
    weights = np.random.default_rng(2).dirichlet(np.full(60, 0.2), (12, 12, 60))
    bare = len(viz.page(np.eye(2)))
    assert 4e6 < bare < len(viz.page(weights)) < bare + 1.5e6
    # As much as nine keys of each query need.
    monkeypatch.setattr("fastattn.viz._page_data._MOST_BYTES", 12 * 12 * 60 * 6 * 9)
    page = viz.page(weights)
    assert len(page) < bare + 0.7e6
    for (layer, kept, keys), whole in zip(layers_in(page), weights, strict=True):
        assert layer["topK"] == 9
        np.testing.assert_allclose(kept, -np.sort(-whole, axis=-1)[..., :9], atol=1e-5)
        np.testing.assert_allclose(kept, np.take_along_axis(whole, keys, -1), atol=1e-5)


def test_numbers_are_exact_enough():
    weights = np.random.default_rng(3).random((7, 9))
    ((_, found, _),) = layers_in(viz.page(weights))
    np.testing.assert_allclose(found[0], weights, atol=0.51 / 65535)


def test_what_is_ours_names_no_address():
    """The rest is plotly.js, which the page forbids to fetch anything."""
    from plotly.offline import get_plotlyjs

    ours = viz.page(np.eye(2)).replace(get_plotlyjs(), "")
    assert not re.search(r"https?:|src=|href=", ours)
    assert "default-src 'none'" in ours


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: viz.page(np.zeros(3)), r"weights: expected shape .* got \(3,\)"),
        (lambda: viz.page(np.zeros((2, 2, 3, 4, 4))), r"weights: expected shape .* got \(2, 2, 3, 4, 4\)"),
        (lambda: viz.page(np.eye(3), ["a", "b"]), "tokens: 'attention' has 3 queries, got 2 tokens"),
        (lambda: viz.page(np.zeros((2, 3)), ["a", "b"], key_tokens=["c"]), "has 3 keys, got 1 and 2 tokens"),
        (lambda: viz.page(SimpleNamespace(layers=[])), "recording: expected at least one layer, got none"),
        (
            lambda: viz.page(SimpleNamespace(layers=[layer("x", None)])),
            "recording: layer 'x' has neither weights nor an insight",
        ),
    ],
)
def test_wrong_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_without_plotly_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ImportError, match=r"needs plotly: pip install 'fastattn\[viz\]'"):
        viz.page(np.eye(3))
