"""attention_with_kvcache against the oracle: what is written into the caches, and what is attended to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bounds
import fastattn as fa
from caches import FEATURES, HKV, LARGEST, ROOM, Call, D, Setting, as_numpy, expected, make
from fastattn import cache_problem
from kernels import KERNELS, Kernel, assert_same_bits
from shapes import convert

PAGES = (0, 1, 7, 16, 256)
APPENDING: dict[str, dict[str, Any]] = {
    "append": {"added": 3},
    "append-halves": {"added": 3, "rotary": "halves"},
    "append-interleaved": {"added": 3, "rotary": "interleaved"},
    "no-append": {"added": 0, "lengths": (3, 5, 37)},
    "decode": {"added": 1, "seqlen_q": 1, "rotary": "halves"},
    "verify": {"added": 1, "seqlen_q": 4, "rotary": "interleaved", "lengths": (4, 5, 37)},
    "prefill": {"added": 9, "seqlen_q": 2, "rotary": "halves"},
}
STRONGEST = {kernel.dtype: kernel for kernel in KERNELS}


def check(setting: Setting, kernel: Kernel, rng: np.random.Generator, **changes: Any) -> None:
    """The caches hold the very bits they should, and out and lse are within what any call's are."""
    call, after = make(setting, rng)
    results = call.run(fa.attention_with_kvcache, return_lse=True, **changes)
    for name, array in after.items():
        assert_same_bits(in_order(call, as_numpy(call.arrays[name])), as_numpy(array))
    check_results(call, kernel, *results)


def in_order(call: Call, array: np.ndarray) -> np.ndarray:
    """With axes (B, L, H, ...) whatever the layout."""
    return np.swapaxes(array, 1, 2) if call.setting.layout == "bhsd" else array


def check_results(call: Call, kernel: Kernel, out: Any, lse: Any) -> None:
    out = np.swapaxes(in_order(call, as_numpy(out)), 1, 2)
    for b, wanted in enumerate(expected(call)):
        bounds.assert_within(abs(out[b] - wanted.out[0]), bounds.allowed(kernel, wanted)[0])
        allowed = bounds.allowed_lse(kernel, wanted)[0]
        bounds.assert_lse_within(as_numpy(lse)[b], wanted._replace(lse=wanted.lse[0]), allowed)


@pytest.mark.parametrize("appending", APPENDING)
@pytest.mark.parametrize("page_size", PAGES)
class TestOracle:
    @pytest.mark.parametrize("library", ["numpy", "torch"])
    def test_caches_in_the_dtype_of_query(
        self, kernel: Kernel, library: str, page_size: int, appending: str, rng: np.random.Generator
    ) -> None:
        setting = Setting(kernel.dtype, page_size=page_size, library=library, **APPENDING[appending])
        check(setting, kernel, rng)

    @pytest.mark.parametrize("cache_dtype", LARGEST)
    def test_quantised_caches(
        self, cache_kernel: Kernel, cache_dtype: str, page_size: int, appending: str, rng: np.random.Generator
    ) -> None:
        library = "torch" if page_size % 2 else "numpy"
        setting = Setting(cache_kernel.dtype, cache_dtype, page_size, library=library, **APPENDING[appending])
        check(setting, cache_kernel, rng)


@pytest.mark.parametrize("appending", ["append-halves", "no-append"])
@pytest.mark.parametrize("cache_dtype, page_size", [("", 0), ("", 7), ("int8", 7)])
@pytest.mark.parametrize("feature", FEATURES)
def test_features(
    kernel: Kernel, cache_dtype: str, feature: str, page_size: int, appending: str, rng: np.random.Generator
) -> None:
    options = FEATURES[feature]
    setting = Setting(kernel.dtype, cache_dtype, page_size, options=options, **APPENDING[appending])
    check(setting, kernel, rng)


@pytest.mark.parametrize("page_size, seqlen", [(0, 1), (0, 4), (1, 4), (7, 4), (16, 1)])
@pytest.mark.parametrize("cache_dtype", ["", "float8_e4m3fn"])
def test_a_ring(
    kernel: Kernel, page_size: int, cache_dtype: str, seqlen: int, rng: np.random.Generator
) -> None:
    """Lengths before the ring is full, where it wraps, and long after."""
    options = {"window": (ROOM - seqlen, 0), "alibi_slopes": FEATURES["alibi"]["alibi_slopes"]}
    lengths = (2, ROOM - 1, ROOM, 2 * ROOM - 2, 5 * ROOM + 13)
    calls = {"added": seqlen, "seqlen_q": seqlen, "lengths": lengths, "rolling": True, "options": options}
    check(Setting(kernel.dtype, cache_dtype, page_size, **calls), kernel, rng)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("page_size", [0, 7])
@pytest.mark.parametrize("cache_dtype", ["", "int8"])
def test_the_other_layout(library: str, page_size: int, cache_dtype: str, rng: np.random.Generator) -> None:
    kernel = STRONGEST["float32"]
    setting = Setting("float32", cache_dtype, page_size, library=library, layout="bhsd", rotary="halves")
    check(setting, kernel, rng)


@pytest.mark.parametrize("page_size", [0, 7])
@pytest.mark.parametrize("backend", ["math", "reference"])
@pytest.mark.parametrize("cache_dtype", ["", *LARGEST])
@pytest.mark.parametrize("rolling", [False, True])
def test_other_backends(
    backend: str, cache_dtype: str, page_size: int, rolling: bool, rng: np.random.Generator
) -> None:
    options = {"window": (20, 0)} if rolling else {}
    setting = Setting(
        "float64" if backend == "reference" and not cache_dtype else "float32",
        cache_dtype,
        page_size,
        library="torch",
        rotary="" if backend == "reference" and cache_dtype else "halves",  # it turns in float64
        lengths=(0, 40, 90) if rolling else (0, 5, 37),
        rolling=rolling,
        options=options,
    )
    check(setting, STRONGEST[setting.dtype], rng, backend=backend)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("page_size", [0, 7])
@pytest.mark.parametrize("cache_dtype", ["", *LARGEST])
@pytest.mark.parametrize("feature", ["plain", "all"])
def test_the_short_way_has_the_bits_of_the_long_one(
    library: str,
    dtype: str,
    page_size: int,
    cache_dtype: str,
    feature: str,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And it is taken, but for what NumPy has no own type for."""
    setting = Setting(
        dtype, cache_dtype, page_size, library=library, rotary="halves", options=FEATURES[feature]
    )
    state = rng.bit_generator.state
    long, _ = make(setting, rng)
    rng.bit_generator.state = state
    short, _ = make(setting, rng)
    assert long.setting == short.setting
    expected_out = long.run(fa.attention_with_kvcache, backend="cpu")
    if library == "torch" or not cache_dtype.startswith("float8"):
        monkeypatch.setattr(cache_problem, "from_arguments", None)
    assert_same_bits(as_numpy(short.run(fa.attention_with_kvcache)), as_numpy(expected_out))
    for name, array in long.arrays.items():
        assert_same_bits(as_numpy(short.arrays[name]), as_numpy(array))


def test_keys_and_values_in_one_array(kernel: Kernel, rng: np.random.Generator) -> None:
    """Caches with any strides: here both in one array, heads in between."""
    call, after = make(Setting(kernel.dtype, added=2, seqlen_q=2), rng)
    caches = {name: call.arrays[name] for name in ("key_cache", "value_cache")}
    both = np.zeros((len(call.rows), ROOM, HKV, 2, 2 * D), caches["key_cache"].dtype)
    views = {
        "key_cache": both[..., 0, :D],
        "value_cache": both[..., 1, ::2][..., : after["value_cache"].shape[3]],
    }
    for name, view in views.items():
        view[...] = caches[name]
    out = fa.attention_with_kvcache(**(call.arrays | views), return_lse=True)
    check_results(call, kernel, *out)
    for name, view in views.items():
        assert_same_bits(as_numpy(view.copy()), as_numpy(after[name]))
    assert not as_numpy(both[..., 0, D:].copy()).any()  # and nothing between them


@pytest.mark.parametrize("queries", [2, 14])
def test_quantised_rows_need_not_be_adjacent(kernel: Kernel, queries: int, rng: np.random.Generator) -> None:
    setting = Setting(kernel.dtype, "int8", added=2, seqlen_q=queries, lengths=(12, 20, 37))
    call, after = make(setting, rng)
    copies = {name: array.copy() for name, array in call.arrays.items()}
    expected_out = fa.attention_with_kvcache(**copies, **call.options)
    for name in ("key_cache", "value_cache"):
        cache = call.arrays[name]
        call.arrays[name] = np.full((*cache.shape, 3), 99, np.int8)[..., 0]
        call.arrays[name][...] = cache
    assert_same_bits(call.run(fa.attention_with_kvcache), expected_out)
    for name, array in after.items():
        assert_same_bits(call.arrays[name].copy(), array)


def test_small_probabilities_keep_their_sum(kernel: Kernel) -> None:
    """A key of probability 1 and many of e^-11 and less, all of one value, which is then the output."""
    dim, rows = 16, 1024
    query = convert(np.eye(1, dim).reshape(1, 1, 1, dim), kernel.dtype)
    key = np.full((1, rows, 1, dim), -100, np.int8)
    value, value_scale = np.full((1, rows, 1, dim), 127, np.int8), np.full((1, rows, 1), 1 / 127, np.float32)
    for score in np.linspace(-11.5, -10.5, 6, dtype=np.float32):
        key_scale = np.full((1, rows, 1), -score / 100, np.float32)
        key_scale[:, 0] = 0
        scales = {"key_scale": key_scale, "value_scale": value_scale, "scale": 1.0}
        out = fa.attention_with_kvcache(query, key, value, **scales)
        np.testing.assert_allclose(as_numpy(out), 1, atol=2.0**-8 if "16" in kernel.dtype else 1e-4)


def test_a_table_is_read_as_far_as_it_is_used(rng: np.random.Generator) -> None:
    query, key, value = rng.standard_normal((3, 1, 1, 2, 8), np.float32)
    narrow, wide = np.zeros((1, 1), np.int64), np.broadcast_to(np.int64(0), (1, 2**40))
    outs = []
    for table in (narrow, wide):
        caches = np.ones((2, 1, 4, 2, 8), np.float32)
        new = {"new_key": key, "new_value": value, "cache_seqlens": 3}
        outs.append((fa.attention_with_kvcache(query, *caches, **new, block_table=table), caches))
    assert_same_bits(*outs)


def test_defaults_of_lengths(rng: np.random.Generator) -> None:
    """None: nothing with new keys, everything without; an int for all sequences."""
    query, keys, values = (rng.standard_normal((2, 6, 2, 8)).astype(np.float32) for _ in range(3))
    caches = np.zeros((2, 2, 9, 2, 8), np.float32)
    prompt = fa.attention_with_kvcache(query, *caches, new_key=keys, new_value=values)
    whole = fa.attention(query, keys, values, causal=True, layout="bshd")
    np.testing.assert_allclose(prompt, whole, atol=1e-6)
    assert_same_bits(
        fa.attention_with_kvcache(query, keys, values),
        fa.attention_with_kvcache(query, keys, values, cache_seqlens=6),
    )
    again = np.zeros((2, 2, 9, 2, 8), np.float32)
    fa.attention_with_kvcache(query, *again, new_key=keys[:, :4], new_value=values[:, :4], cache_seqlens=0)
    out = fa.attention_with_kvcache(
        query, *again, new_key=keys[:, 4:], new_value=values[:, 4:], cache_seqlens=4
    )
    assert_same_bits((out, again), (prompt, caches))


@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 0, 2), (2, 3, 0)])
def test_nothing_at_all(shape: tuple[int, int, int]) -> None:
    """No sequence, no query, no new row."""
    batch, rows, added = shape
    caches, new = np.zeros((2, batch, 5, 1, 4), np.float32), np.ones((2, batch, added, 1, 4), np.float32)
    query = np.ones((batch, rows, 1, 4), np.float32)
    out = fa.attention_with_kvcache(query, *caches, new_key=new[0], new_value=new[1], cache_seqlens=1)
    assert out.shape == query.shape
    assert (caches[:, :, 1 : 1 + added] == 1).all()
    assert caches.sum() == caches[:, :, 1 : 1 + added].size


def test_out_is_written_and_returned(rng: np.random.Generator) -> None:
    call, _ = make(Setting(), rng)
    expected_out = call.run(fa.attention_with_kvcache)
    out = np.full_like(expected_out, np.nan)
    assert call.run(fa.attention_with_kvcache, out=out) is out
    assert_same_bits(out, expected_out)
