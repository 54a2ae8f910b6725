"""Pictures of the guide to `fastattn.viz`: the vectors are made up, the weights are those of fastattn."""

from __future__ import annotations

import re

import numpy as np
import torch
from matplotlib.figure import Figure

import fastattn as fa
from fastattn import viz
from fastattn.nn import alibi_slopes

__all__ = ["viz_distance", "viz_heads", "viz_links", "viz_mass", "viz_overlay"]

SENTENCE = re.findall(r"\S+", "The Law will never be perfect , but its application should be just")
TEXT = re.findall(
    r"\S+",
    """What should I look at ? A query asks , keys answer , and what they agree on decides : the softmax of
    their products makes weights of it , which add up to one , and the values are mixed by them . Nothing is
    remembered that is not looked up , and nothing is too far away to be looked at .""",
)
NOUNS, VERBS = {"Law", "application"}, {"will", "be", "should"}


def sentence_weights() -> np.ndarray:
    """Weights (1, 3, 13, 13): a head looks at kinds of words, one at the word before, one at the same."""
    query, key = np.zeros((2, 1, 3, len(SENTENCE), 16), np.float32)
    key[0, 0, :, :2] = [[word in NOUNS, word in VERBS] for word in SENTENCE]
    query[0, 0, :, :2] = [[2 + 12 * (word == "its"), 2 + 12 * (word in NOUNS)] for word in SENTENCE]
    place = np.arange(len(SENTENCE)) * np.pi / len(SENTENCE)
    key[0, 1, :, :2] = np.stack([np.sin(place), np.cos(place)], axis=1)
    query[0, 1, :, :2] = 400 * np.stack([np.sin(place - place[1]), np.cos(place - place[1])], axis=1)
    rng = np.random.default_rng(0)
    meanings = {word: rng.standard_normal(16) for word in SENTENCE}
    key[0, 2] = query[0, 2] = [meanings[word] for word in SENTENCE]
    return fa.attention(query, key, key, return_weights=True)[1]


def viz_heads() -> Figure:
    """Draw all heads of a sentence."""
    return viz.heatmap(sentence_weights(), SENTENCE, columns=3)


def viz_links() -> Figure:
    """Draw what one word looks at."""
    query = SENTENCE.index("its")
    return viz.links(sentence_weights(), SENTENCE, head=0, query=query, title="What does “its” see?")


def viz_overlay() -> Figure:
    """Draw two heads over a disc: one looks for light, one for edges."""
    y, x = np.mgrid[0:64, 0:96]
    image = np.clip(26 - np.hypot(x - 60, y - 28), 0, 6) / 6 + 0.15 * (y > 52)
    patches = image.reshape(8, 8, 12, 8).swapaxes(1, 2).reshape(96, 64)
    seen = np.stack([patches.mean(1), patches.std(1)], axis=1).astype(np.float32)
    query = np.array([[[[5.0, 0.0]], [[0.0, 12.0]]]], np.float32)
    key = np.broadcast_to(seen, (1, 2, 96, 2))
    _, weights = fa.attention(query, key, key, return_weights=True)
    return viz.overlay(image, weights[:, :, 0], (8, 12), columns=3)


def viz_mass() -> Figure:
    """Draw a text of which long words are looked at."""
    length = np.array([[len(word)] for word in TEXT], np.float32)
    _, weights = fa.attention(
        np.ones_like(length)[None, None], *2 * [length[None, None]], scale=0.5, return_weights=True
    )
    return viz.mass(weights.sum(axis=2), TEXT, style="text")


def viz_distance() -> Figure:
    """Draw eight heads with ALiBi, each of which looks twice as far as the one before."""
    rng = np.random.default_rng(0)
    query, key = rng.standard_normal((2, 1, 8, 512, 32), dtype=np.float32)
    slopes = alibi_slopes(8).to(torch.float32).numpy()
    _, weights = fa.attention(query, key, key, causal=True, alibi_slopes=slopes, return_weights=True)
    return viz.distance(weights)
