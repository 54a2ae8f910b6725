"""Pictures of attention: the right cells under the right tokens, and errors that help."""

import itertools
import sys

import numpy as np
import pytest

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

from fastattn.viz import plot_attention, plot_heads  # noqa: E402

TOKENS = ["The", "Ġcat", "▁sat", "Ċ", "$x$", " "]
LABELS = ["The", "cat", "sat", "↵", r"\$x\$", "␣"]


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def weights(*shape):
    drawn = np.random.default_rng(0).random(shape, dtype=np.float32)
    return drawn / drawn.sum(-1, keepdims=True)


def test_cells_and_tokens():
    matrix = weights(4, 6)
    ax = plot_attention(matrix, TOKENS[:4], TOKENS, title="head 0")
    (image,) = ax.images
    np.testing.assert_array_equal(image.get_array(), matrix.astype(np.float64))
    assert [label.get_text() for label in ax.get_xticklabels()] == LABELS
    assert [label.get_text() for label in ax.get_yticklabels()] == LABELS[:4]
    assert ax.get_title(loc="left") == "head 0"


def test_keys_are_the_queries_by_default_and_ax_is_used():
    _, ax = plt.subplots()
    assert plot_attention(weights(6, 6), TOKENS, ax=ax) is ax


def test_a_large_picture_has_room_for_every_token():
    tokens = [f"word{number}" for number in range(60)]
    ax = plot_attention(weights(60, 60), tokens)
    ax.figure.canvas.draw()
    boxes = [label.get_window_extent() for label in ax.get_yticklabels()]
    assert all(upper.y0 >= lower.y1 - 1 for upper, lower in itertools.pairwise(boxes))


def test_heads_share_one_scale():
    figure = plot_heads(weights(5, 6, 6), TOKENS, title="layer 0")
    images = [ax.images[0] for ax in figure.axes if ax.images and ax.get_title()]
    assert len(images) == 5
    assert len({image.norm.vmax for image in images}) == 1
    figure.canvas.draw()


def test_a_torch_tensor_of_bfloat16():
    torch = pytest.importorskip("torch")
    plot_attention(torch.from_numpy(weights(6, 6)).bfloat16(), TOKENS)


def test_weights_of_zero_are_drawn():
    plot_attention(np.zeros((6, 6)), TOKENS).figure.canvas.draw()


@pytest.mark.parametrize("shape", [(6, 5), (2, 6, 6), (6,)])
def test_shapes_that_do_not_fit_the_tokens(shape):
    with pytest.raises(ValueError, match=r"weights: expected shape \(6, 6\) for 6 queries and 6 keys, got"):
        plot_attention(np.zeros(shape), TOKENS)
    with pytest.raises(ValueError, match=r"weights: expected shape \(heads, 6, 6\)"):
        plot_heads(np.zeros((6, 6)), TOKENS)


def test_no_heads():
    with pytest.raises(ValueError, match="weights: expected at least one head, got 0"):
        plot_heads(np.zeros((0, 6, 6)), TOKENS)


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"needs matplotlib: pip install 'fastattn\[viz\]'"):
        plot_attention(np.zeros((1, 1)), ["a"])
