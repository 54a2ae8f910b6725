"""The interactive page: in a browser without a window, from disk."""

import numpy as np
import pytest

pytest.importorskip("plotly")

from fastattn import viz

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
