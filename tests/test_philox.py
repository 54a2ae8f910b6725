"""Dropout: the random numbers, and that one seed and offset drop the same weights wherever they are asked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import fastattn as fa
import shapes
from fastattn import reference
from fastattn.philox import kept, multiplier, philox4x32

CASE = shapes.Case("dropout", 19, 23, 8, 6, batch=2, query_heads=6, kv_heads=2)
DROP: dict[str, Any] = {"dropout_p": 0.3, "dropout_seed": 2**40 + 5, "dropout_offset": 3}


def words(*values: int) -> Any:
    return tuple(np.uint64(value) for value in values)


# The known answers that Random123 publishes for philox4x32-10 (kat_vectors); the third are digits of pi.
@pytest.mark.parametrize(
    "counter, key, answer",
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]) -> None:
    assert philox4x32(words(*counter), key) == answer


def test_every_place_has_its_word() -> None:
    """Word j % 4 for the counter (i, j // 4, head, offset), the seed's low word first in the key."""
    seed, offset = 0x0123456789ABCDEF, 77
    places = kept(0.5, seed, offset, np.array([4, 9]), 3, 10)
    assert places.shape == (2, 3, 10)
    for (n, i, j), stays in np.ndenumerate(places):
        block = philox4x32(words(i, j // 4, (4, 9)[n], offset), (0x89ABCDEF, 0x01234567))
        assert stays == (block[j % 4] >= 2**31)


def test_the_threshold_is_exact() -> None:
    """Word 0 of the first block is 0x6627e8d5: kept at p = that / 2^32, dropped just above."""
    one = np.zeros((), np.int64)
    assert kept(0x6627E8D5 / 2**32, 0, 0, one, 1, 1).all()
    assert not kept(0x6627E8D6 / 2**32, 0, 0, one, 1, 1).any()
    assert kept(0.0, 0, 0, one, 30, 30).all()
    assert not kept(1.0, 0, 0, one, 30, 30).any()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_statistics(p: float) -> None:
    """The share that is dropped, and that neighbours in no direction know of each other."""
    places = kept(p, 1234, 0, np.arange(8), 200, 201).astype(np.float64)
    others = kept(p, 1234, 1, np.arange(8), 200, 201), kept(p, 1235, 0, np.arange(8), 200, 201)
    deviation = np.sqrt(p * (1 - p))
    assert abs(places.mean() - (1 - p)) < 5 * deviation / np.sqrt(places.size)
    pairs = [(places[1:], places[:-1]), (places[:, 1:], places[:, :-1])]
    pairs += [(places[..., step:], places[..., :-step]) for step in (1, 2, 4)]
    pairs += [(places, other) for other in others]
    for a, b in pairs:
        correlation = ((a - (1 - p)) * (b - (1 - p))).mean() / deviation**2
        assert abs(correlation) < 5 / np.sqrt(a.size)


def test_multiplier_keeps_the_mean() -> None:
    factors = multiplier(0.25, 7, 0, np.arange(4), 300, 300)
    assert set(np.unique(factors)) == {0, 1 / 0.75}
    assert abs(factors.mean() - 1) < 0.005
    assert not multiplier(1.0, 7, 0, np.arange(4), 30, 30).any()


def test_weights_come_after_dropout_and_lse_before() -> None:
    tensors = CASE.tensors("float64")
    plain, dropped = (reference.attention(*tensors, causal=True, **options) for options in ({}, DROP))
    np.testing.assert_array_equal(dropped.lse, plain.lse)
    heads = np.arange(12).reshape(2, 6)
    stays = kept(DROP["dropout_p"], DROP["dropout_seed"], DROP["dropout_offset"], heads, 19, 23)
    np.testing.assert_allclose(dropped.weights, np.where(stays, plain.weights / 0.7, 0), rtol=1e-14)
    value = tensors[2].repeat(3, 1)
    np.testing.assert_allclose(dropped.out, dropped.weights @ value, atol=1e-13)


@pytest.mark.parametrize(
    "backend, library", [("reference", "numpy"), ("reference", "torch"), ("math", "torch")]
)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_one_mask_for_every_backend_and_layout(backend: str, library: str, layout: str) -> None:
    expected = reference.attention(*CASE.tensors("float64"), **DROP)
    tensors = CASE.tensors("float64", library)
    if layout == "bshd":
        tensors = tuple(tensor.swapaxes(1, 2) for tensor in tensors)
    returns = {"return_weights": True, "return_lse": True}
    out, lse, weights = fa.attention(*tensors, backend=backend, layout=layout, **DROP, **returns)
    out = out.swapaxes(1, 2) if layout == "bshd" else out
    for found, wanted in zip((out, lse, weights), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-12)
    np.testing.assert_array_equal(np.asarray(weights) == 0, expected.weights == 0)


@pytest.mark.parametrize("backend", ["reference", "math"])
def test_everything_dropped(backend: str) -> None:
    tensors = CASE.tensors("float32", "torch")
    plain = fa.attention(*tensors, backend=backend, return_lse=True)[1]
    returns = {"return_weights": True, "return_lse": True}
    out, lse, weights = fa.attention(*tensors, backend=backend, dropout_p=1, **returns)
    assert not out.any() and not weights.any()
    assert lse.equal(plain)


def test_without_a_seed_numpy_draws_anew() -> None:
    tensors = CASE.tensors()
    first, second = (fa.attention(*tensors, backend="reference", dropout_p=0.5) for _ in range(2))
    assert (first != second).any()


@pytest.mark.parametrize("backend", ["reference", "math"])
def test_without_a_seed_torch_is_asked(backend: str) -> None:
    tensors = CASE.tensors("float32", "torch")

    def draw() -> Any:
        return fa.attention(*tensors, backend=backend, dropout_p=0.5)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        first, second = draw(), draw()
        torch.manual_seed(3)
        assert draw().equal(first) and draw().equal(second) and not first.equal(second)


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.0}, DROP], ids=["none", "zero", "seeded"])
@pytest.mark.parametrize("backend", ["reference", "math"])
def test_nothing_is_drawn_for_nothing(backend: str, options: dict[str, Any]) -> None:
    tensors = CASE.tensors("float32", "torch")
    state = torch.get_rng_state()
    fa.attention(*tensors, backend=backend, **options)
    fa.explain(*tensors, backend=backend, dropout_p=0.5)  # computes nothing, so draws nothing
    assert torch.get_rng_state().equal(state)


def test_the_offset_tells_calls_apart() -> None:
    tensors = CASE.tensors()
    results = [
        fa.attention(*tensors, backend="reference", **DROP | {"dropout_offset": n}) for n in (0, 1, 2**32 - 1)
    ]
    assert (results[0] != results[1]).any() and (results[1] != results[2]).any()
