"""Pictures of attention: the right numbers under the right tokens, and errors that help."""

import itertools
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from fastattn import viz

TOKENS = ["The", "Ġcat", "▁sat", "Ċ", "$x$", " "]
LABELS = ["The", "cat", "sat", "↵", "$x$", "␣"]


def weights(*shape, causal=False):
    drawn = np.random.default_rng(0).random(shape, dtype=np.float32)
    if causal:
        drawn *= np.tri(*shape[-2:], shape[-1] - shape[-2], dtype=np.float32)
    return drawn / drawn.sum(-1, keepdims=True)


def texts(labels):
    return [label.get_text() for label in labels]


def overlap(labels, axis):
    """Whether two neighbours of `labels` run into each other, along "x" or "y"."""
    boxes = sorted((getattr(box, axis + "0"), getattr(box, axis + "1")) for box in map(extent, labels))
    return any(one[1] > other[0] + 1 for one, other in itertools.pairwise(boxes))


def extent(label):
    return label.get_window_extent()


def top_k(matrix, k):
    """An insight of (H, Lq, Lk), with a batch of one."""
    keys = np.argsort(-matrix, axis=-1, kind="stable")[..., :k]
    return SimpleNamespace(keys=keys[None], weights=np.take_along_axis(matrix, keys, -1)[None])


def test_cells_and_tokens():
    matrix = weights(4, 6)
    figure = viz.heatmap(matrix, TOKENS[:4], TOKENS, title="head of $5 or $6")
    (ax, _) = figure.axes
    (image,) = ax.images
    np.testing.assert_array_equal(image.get_array(), matrix.astype(np.float64))
    assert texts(ax.get_xticklabels()) == LABELS
    assert texts(ax.get_yticklabels()) == LABELS[:4]
    assert figure.get_suptitle() == "head of $5 or $6"
    for text in (*ax.get_xticklabels(), figure._suptitle):
        assert not text.get_parse_math()


def test_every_head_or_one_or_the_average():
    matrix = weights(1, 3, 4, 6)
    grid = [ax for ax in viz.heatmap(matrix).axes if ax.get_title()]
    assert [ax.get_title() for ax in grid] == ["head 0", "head 1", "head 2"]
    for ax, head in zip(grid, matrix[0], strict=True):
        np.testing.assert_allclose(ax.images[0].get_array(), head)
    assert len({ax.images[0].norm.vmax for ax in grid}) == 1
    one = viz.heatmap(matrix, head=-1).axes[0].images[0]
    np.testing.assert_allclose(one.get_array(), matrix[0, 2])
    average = viz.heatmap(matrix, head="mean").axes[0].images[0]
    np.testing.assert_allclose(average.get_array(), matrix[0].mean(0, dtype=np.float64))


@pytest.mark.parametrize(("heads", "length"), [(1, 60), (1, 300), (2, 5), (2, 60), (2, 300)])
def test_labels_stay_apart(heads, length):
    figure = viz.heatmap(weights(heads, length, length), [f"word{number}" for number in range(length)])
    figure.set_dpi(50)
    figure.draw_without_rendering()
    assert max(figure.get_size_inches()) <= 21
    first, *others = [ax for ax in figure.axes if ax.images and ax.get_ylabel() != "attention weight"]
    lowest = others[-1] if others else first
    rows = [label for label in first.get_yticklabels() if label.get_visible()]
    columns = [label for label in lowest.get_xticklabels() if label.get_visible()]
    assert not overlap(rows, "y")
    assert not overlap(columns, "x")
    if length <= 60 and heads == 1:
        assert len(rows) == length
    elif length == 300:
        assert texts(rows)[1].split(": ")[1] == f"word{texts(rows)[1].split(':')[0]}"


def test_one_cell_for_several_pairs_has_the_largest():
    matrix = np.zeros((3201, 4))
    matrix[3, 1], matrix[5, 1], matrix[3200, 2] = 0.5, 0.25, 1.0
    figure = viz.heatmap(matrix)
    cells = figure.axes[0].images[0].get_array()
    assert cells.shape == (641, 4)
    assert cells[0, 1] == 0.5
    assert cells[1, 1] == 0.25
    assert cells[-1, 2] == 1.0
    assert cells.sum() == 1.75
    assert figure.axes[1].get_ylabel() == "attention weight,\nthe largest of 5 x 1 pairs"


def test_more_is_darker():
    """For eyes of every kind, and in print: lightness falls all the way, by much."""
    from matplotlib import colormaps

    colour_map = viz.heatmap(np.eye(2)).axes[0].images[0].get_cmap()
    assert colour_map.name in colormaps
    lightness = colour_map(np.linspace(0, 1, 100))[:, :3] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) < 0).all()
    assert lightness[0] > 0.9 > 0.2 > lightness[-1]


LONG = "What the heads of a layer look at in a sentence that has more words than a picture has inches of room"
FLAT = np.ones((40, 400))
DRAWN = {
    **{f"distance, {heads} heads, {length} tokens":
        lambda heads=heads, length=length, **said: viz.distance(weights(heads, length, length), **said)
        for heads in (1, 2, 9) for length in (1, 13, 300)},
    "overlay, flat": lambda **said: viz.overlay(FLAT, weights(1, 2, 40)[0], (2, 20), **said),
    "overlay, tall": lambda **said: viz.overlay(FLAT.T, weights(1, 2, 40)[0], (20, 2), **said),
    "heatmap, small": lambda **said: viz.heatmap(weights(6, 6), **said),
    "heatmap, flat": lambda **said: viz.heatmap(weights(3, 3000), **said),
    "heatmap, grid": lambda **said: viz.heatmap(weights(2, 3, 3000), **said),
    "links": lambda **said: viz.links(weights(3, 6, 6), **said),
    "mass, bars": lambda **said: viz.mass(weights(30), **said),
    "mass, text": lambda **said: viz.mass(40 * weights(6), TOKENS, style="text", **said),
}  # fmt: skip


@pytest.mark.parametrize("drawn", DRAWN)
@pytest.mark.parametrize("title", [None, "Short", LONG])
def test_words_are_neither_cut_nor_on_one_another(drawn, title):
    figure = DRAWN[drawn](title=title)
    figure.draw_without_rendering()
    assert figure.get_suptitle() == (title or "")
    paper = figure.bbox_inches.padded(0.02)
    assert all(paper.contains(*corner) for corner in figure.get_tightbbox().corners())
    if (bar := figure.axes[-1]).get_label() == "<colorbar>":
        side = "x" if bar.get_xlabel() else "y"
        numbers = getattr(bar, f"get_{side}ticklabels")()
        assert len(numbers) >= 2
        assert not overlap(numbers, side)


@pytest.mark.parametrize("top", [1e-9, 0.027, 0.3, 0.87, 1.0, 9.4, 99.99, 100.0, 712.0])
def test_numbers_beside_colours(top):
    figure = viz.heatmap([[top, 0.0]])
    marks = figure.axes[1].get_yticks()
    assert [f"{mark:g}" for mark in marks] == texts(figure.axes[1].get_yticklabels())
    places = np.sqrt(marks / top)
    assert places[0] == 0.0
    assert 0.7 < places[-1] <= 1.0
    assert (np.diff(places) >= 0.249).all()
    assert 3 <= len(marks) <= 5


def test_an_axes_of_the_callers():
    from matplotlib.figure import Figure

    ax = Figure().add_subplot()
    assert viz.heatmap(weights(6, 6), TOKENS, title="this one", ax=ax) is ax.figure
    assert ax.get_title(loc="left") == "this one"
    assert viz.links(weights(6, 6), TOKENS, ax=ax) is ax.figure
    with pytest.raises(ValueError, match="ax: one axes holds one map, got 2 heads"):
        viz.heatmap(weights(2, 6, 6), TOKENS, ax=ax)


def test_a_torch_tensor_of_bfloat16():
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(weights(2, 6, 6)).bfloat16().requires_grad_()
    image = viz.heatmap(tensor, TOKENS, head=1).axes[0].images[0]
    np.testing.assert_array_equal(image.get_array(), tensor[1].double().detach().numpy())


def test_pyplot_is_not_touched():
    code = (
        "import sys, numpy as np; from fastattn import viz; assert 'matplotlib' not in sys.modules;"
        "viz.heatmap(np.eye(3)); viz.links(np.eye(3)); print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def drawn_lines(figure):
    """{(query, key): opacity} of the lines, whose ends say which."""
    (ax,) = figure.axes
    (lines,) = ax.collections
    return [tuple(segment[:, 1]) for segment in lines.get_segments()], lines.get_colors()[:, 3]


def test_a_line_for_every_pair():
    matrix = np.array([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    places, opacity = drawn_lines(viz.links(matrix, ["a", "b"], ["x", "$y$", "z"]))
    rows, columns = [0.25, 0.75], [1 / 6, 3 / 6, 5 / 6]
    expected = {(rows[0], columns[0]): 0.5, (rows[0], columns[1]): 0.5, (rows[1], columns[2]): 1.0}
    assert dict(zip(places, opacity, strict=True)) == pytest.approx(expected)


def test_the_strongest_keys_are_as_good_as_all():
    matrix = weights(3, 6, 6)
    for head in (1, "mean"):
        dense = drawn_lines(viz.links(matrix, TOKENS, head=head))
        sparse = drawn_lines(viz.links(top_k(matrix, 6), TOKENS, head=head))
        np.testing.assert_allclose(sparse[0], dense[0])
        np.testing.assert_allclose(sparse[1], dense[1])


def test_no_key_is_no_line():
    found = SimpleNamespace(keys=np.array([[[1, -1]]]), weights=np.array([[[1.0, 0.0]]]))
    places, _ = drawn_lines(viz.links(found, ["a"], ["x", "y"]))
    assert places == [(0.5, 0.75)]


def test_what_is_drawn_of_several_heads_is_said():
    def said(array, **options):
        return viz.links(array, **options).axes[0].get_xlabel()

    matrix = weights(3, 6, 6)
    for source in (matrix, top_k(matrix, 2)):
        assert said(source) == said(source, query=1) == "average of the heads"
        assert said(source, head=2) == "head 2"
    assert said(matrix[0]) == said(top_k(matrix[:1], 2)) == ""


def test_positions_are_not_written_twice():
    matrix = np.zeros((400, 400))
    matrix[123, [7, 361]] = 0.75, 0.25
    written = texts(viz.links(top_k(matrix[None], 2), query=123).axes[0].texts)
    assert {"123", "7  0.75", "361  0.25"} <= set(written)
    assert not any(":" in text for text in written)


def test_one_query():
    matrix = np.full((4, 4), 0.25)
    matrix[2] = [0.0, 0.125, 0.875, 0.0]
    figure = viz.links(matrix, ["a", "b", "c", "d"], query=-2)
    places, _ = drawn_lines(figure)
    assert sorted(places) == [(0.625, 0.375), (0.625, 0.625)]
    written = texts(figure.axes[0].texts)
    assert written == ["a", "b", "c", "d", "a", "b  0.12", "c  0.88", "d"]


def test_one_query_of_a_long_text_names_its_keys():
    matrix = np.zeros((400, 400))
    matrix[123, [7, 361]] = 0.75, 0.25
    figure = viz.links(matrix, [f"word{number}" for number in range(400)], query=123)
    figure.draw_without_rendering()
    written = figure.axes[0].texts
    assert {"123: word123", "7: word7  0.75", "361: word361  0.25"} <= set(texts(written))
    for side in ("left", "right"):
        assert not overlap([text for text in written if text.get_ha() == side], "y")


def test_patches_lie_over_the_image():
    image = np.random.default_rng(1).random((8, 12, 3))
    attention = weights(2, 6)
    figure = viz.overlay(image, attention, (2, 3), title="what is seen")
    plain, *heads, bar = (ax for ax in figure.axes if ax.axison or ax.images)
    np.testing.assert_allclose(plain.images[0].get_array(), image @ [0.299, 0.587, 0.114])
    assert [ax.get_title() for ax in heads] == ["head 0", "head 1"]
    for ax, head in zip(heads, attention, strict=True):
        below, above = ax.images
        np.testing.assert_allclose(above.get_array(), head.reshape(2, 3))
        assert tuple(above.get_extent()) == tuple(below.get_extent()) == (-0.5, 11.5, 7.5, -0.5)
    assert bar.get_xlabel() == "attention weight of a patch"
    average = viz.overlay(image[..., 0], attention[None, :, :4], head="mean").axes[1]
    np.testing.assert_allclose(average.images[1].get_array().ravel(), attention[:, :4].mean(0), rtol=1e-6)


def test_bars_of_mass():
    received = weights(2, 6, 6).sum(1)
    (ax,) = viz.mass(received, TOKENS, head=1).axes
    np.testing.assert_allclose([bar.get_height() for bar in ax.patches], received[1])
    assert texts(ax.get_xticklabels()) == LABELS
    long = np.zeros(2000)
    long[1001] = 3.0
    (ax,) = viz.mass(long).axes
    (peak,) = [bar for bar in ax.patches if bar.get_height()]
    assert peak.get_x() <= 1001 <= peak.get_x() + peak.get_width()
    assert ax.get_ylabel() == "attention received\n(highest of 3 keys)"


def test_shaded_text_is_the_text():
    tokens = ["Ġhello", "Ġwor", "ld", ".", "Ċ", "$2$", "Ġis", "Ġ$3$"] * 30
    received = np.arange(len(tokens), dtype=float)
    figure = viz.mass(received, tokens, style="text")
    figure.set_dpi(50)
    figure.draw_without_rendering()
    ax = figure.axes[0]
    lines = {}
    for text in ax.texts:
        x, y = text.get_position()
        line = lines.setdefault(y, "")
        lines[y] = line.ljust(round(x)) + text.get_text()
    assert list(lines.values())[:2] == ["hello world.↵", "$2$ is $3$ hello world.↵"]
    room = ax.get_window_extent()
    assert all(extent(text).x1 <= room.x1 + 1 for text in ax.texts)
    lightness = [np.dot(patch.get_facecolor()[:3], [0.299, 0.587, 0.114]) for patch in ax.patches]
    assert lightness[0] > 0.9 > 0.3 > lightness[-1]


def test_distances_by_hand():
    matrix = np.array([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25, 0.25, 0.5, 0], [0.125, 0, 0.125, 0.75]])
    (ax, _) = viz.distance(matrix).axes
    # Distance 0, 1, 2 and 3, of four queries whose weights add up to 1.
    expected = [100 * 2.75 / 4, 100 * 0.875 / 4, 100 * 0.375 / 4]
    np.testing.assert_allclose(ax.images[0].get_array(), [expected])
    assert texts(ax.get_xticklabels()) == ["0", "1", "≥ 2"]
    late = viz.distance(matrix[2:]).axes[0].images[0]
    np.testing.assert_allclose(late.get_array(), [[62.5, 18.75, 18.75]])
    moved = viz.distance(matrix, query_offset=1).axes[0]
    np.testing.assert_allclose(moved.images[0].get_array()[0, :2], [0.0, 100 * (1 + 0.5 + 0.5 + 0.75) / 4])


def test_mass_by_distance():
    found = SimpleNamespace(distance_mass=np.array([[[1.0, 2.0, 1.0], [0.0, 0.0, 0.0]]]))
    (ax, _) = viz.distance(found, distances=[-2, 4]).axes
    np.testing.assert_allclose(ax.images[0].get_array(), [[25, 50, 25], [0, 0, 0]])
    assert texts(ax.get_xticklabels()) == ["< -2", "-2 to 3", "≥ 4"]


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("b/c.svg", b"<?xml")])
def test_files(tmp_path, name, start):
    figures = [viz.links(weights(6, 6), TOKENS) for _ in range(2)]
    written = [
        viz.save(figure, tmp_path / str(place) / name).read_bytes() for place, figure in enumerate(figures)
    ]
    assert written[0].startswith(start)
    assert written[0] == written[1]


def test_other_files(tmp_path):
    with pytest.raises(ValueError, match=r"path: expected a name that ends in \.png or \.svg, got 'a\.pdf'"):
        viz.save(viz.heatmap(np.eye(2)), tmp_path / "a.pdf")


EMPTY = np.zeros(3000)
WRONG = {
    r"weights: expected shape \(queries, keys\), .* got \(6,\)": lambda: viz.heatmap(np.zeros(6)),
    r"weights: expected shape .* got \(2, 1, 6, 6\)": lambda: viz.heatmap(np.zeros((2, 1, 6, 6))),
    "query_tokens: expected 6 tokens, .* got 5": lambda: viz.heatmap(np.zeros((6, 6)), TOKENS[:5]),
    "key_tokens: expected 5 tokens, .* got 6": lambda: viz.heatmap(np.zeros((6, 5)), TOKENS, TOKENS),
    "weights: expected at least one head, got 0": lambda: viz.heatmap(np.zeros((0, 6, 6))),
    "no number below 0, got -1; scores need a softmax": lambda: viz.links(-np.eye(3)),
    "weights: expected finite numbers": lambda: viz.distance(np.full((2, 2), np.nan)),
    "head: expected one of the 2 of weights, 0 to 1, got 2": lambda: viz.heatmap(np.zeros((2, 3, 3)), head=2),
    "columns: expected at least 1, got -1": lambda: viz.heatmap(np.zeros((2, 3, 3)), columns=-1),
    "query: expected a position from 0 to 2, got 3": lambda: viz.links(np.eye(3), query=3),
    "expected one for every key up to 5, got 3": lambda: viz.links(top_k(weights(1, 3, 6), 6), list("abc")),
    "65 patches are no square; leave out .* class token": lambda: viz.overlay(np.eye(8), np.zeros(65)),
    "grid: expected rows and columns of 6 patches, got 2": lambda: viz.overlay(np.eye(8), EMPTY[:6], (2, 2)),
    r"image: expected shape .* got \(8, 8, 2\)": lambda: viz.overlay(np.zeros((8, 8, 2)), np.zeros(4)),
    "style: expected 'bars' or 'text', got 'pie'": lambda: viz.mass(np.zeros(3), style="pie"),
    "tokens: they fill 3000 lines": lambda: viz.mass(EMPTY, ["\n"] * 3000, style="text"),
    "mass: expected 3 bins for 2 edges, got 4": lambda: viz.distance(EMPTY[:4], distances=[1, 2]),
    "distance_mass: there is none": lambda: viz.distance(SimpleNamespace(distance_mass=None), distances=[1]),
    r"distances: expected rising integers, .* \[2, 1\]": lambda: viz.distance(EMPTY[:3], distances=[2, 1]),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_wrong_values(message):
    with pytest.raises(ValueError, match=message):
        WRONG[message]()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: viz.heatmap(np.eye(3), "abc"), "query_tokens: expected a sequence of strings"),
        (lambda: viz.heatmap(np.eye(3), head="max"), "head: expected an integer or 'mean', got 'max'"),
        (lambda: viz.links(np.eye(3), query="its"), "query: expected the position of a query"),
        (lambda: viz.mass("mass"), "key_mass: expected an array of numbers, got str"),
        (
            lambda: viz.heatmap(top_k(np.eye(3)[None], 1)),
            "weights: .* got SimpleNamespace, .* links and page",
        ),
        (lambda: viz.mass(top_k(np.eye(3)[None], 1)), "key_mass: .* mass takes its key_mass"),
        (lambda: viz.distance(top_k(np.eye(3)[None], 1)), "distance takes it with the same distances"),
    ],
)
def test_wrong_types(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"needs matplotlib: pip install 'fastattn\[viz\]'"):
        viz.heatmap(np.eye(3))
