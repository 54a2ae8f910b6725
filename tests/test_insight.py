"""What each query looks at, held against weights of the float64 oracle that are all in memory."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

import fastattn as fa
from bounds import Expected, allowed, as_float64, assert_within, expect, expect_case, relative_error
from fastattn import _core, reference
from fastattn.insights import Insight
from fastattn.problem import AttentionProblem
from kernels import KERNELS, Kernel, assert_same_bits
from processes import output_of
from shapes import DECODE, SMALL, Case, convert

EDGES = (-20, -1, 0, 1, 2, 4, 8, 16, 32, 64, 100)
CASES = (*SMALL, *DECODE, Case("blocks-causal", 600, 600, 32, query_heads=2, kv_heads=1, causal=True))
FEW = [
    case for case in CASES if case.name in ("everything", "padded-everything", "mqa-16", "tail-257-causal")
]


def visible_pairs(query: Any, key: Any, value: Any, **options: Any) -> np.ndarray:
    """(B, Hq, Lq, Lk)."""
    problem = AttentionProblem.from_arguments(query, key, value, **options)
    pairs = np.empty(problem.scores_shape, bool)
    for index in np.ndindex(pairs.shape[:2]):
        pairs[index] = reference.visible_keys(problem, *index)
    return pairs


def entropies(weights: np.ndarray, sinks: Any, lse: np.ndarray) -> np.ndarray:
    """Over the keys, and the sink as one more."""
    own = np.zeros((*weights.shape[:3], 1))
    if sinks is not None:
        logits = np.array([float(sink) for sink in sinks])[:, None, None]
        own = np.exp(logits - np.where(lse == -np.inf, np.inf, lse)[..., None])
    shares = np.concatenate([weights, own], 3)
    return -np.sum(shares * np.log(np.where(shares > 0, shares, 1)), 3)


def distance_masses(weights: np.ndarray, offset: Any, edges: tuple[int, ...]) -> np.ndarray:
    batch, _, seqlen_q, seqlen_k = weights.shape
    at = np.broadcast_to(offset, batch)[:, None, None, None] + np.arange(seqlen_q)[:, None]
    distance = np.broadcast_to(at - np.arange(seqlen_k), weights.shape)
    bounds = [-np.inf, *edges, np.inf]
    return np.stack(
        [
            np.where((distance >= low) & (distance < high), weights, 0).sum((2, 3))
            for low, high in pairwise(bounds)
        ],
        -1,
    )


def check_keys(look: Insight, expected: Expected, visible: np.ndarray, relative: np.ndarray) -> None:
    keys, weights = np.asarray(look.keys), as_float64(look.weights)
    top_k = keys.shape[3]
    there = keys >= 0
    np.testing.assert_array_equal(there.sum(3), np.minimum(visible.sum(3), top_k))
    assert (there[..., :-1] >= there[..., 1:]).all(), "-1 comes last"
    assert (weights[~there] == 0).all()
    padded = np.pad(expected.weights, [(0, 0)] * 3 + [(0, 1)])  # key -1
    own = np.take_along_axis(padded, keys, 3)
    seen = np.take_along_axis(np.pad(visible, [(0, 0)] * 3 + [(0, 1)]), keys, 3)
    assert (seen == there).all()
    ordered = np.sort(np.where(there, keys, -1 - np.arange(top_k)), 3)
    assert (ordered[..., :-1] != ordered[..., 1:]).all(), "a key comes twice"
    error = relative[..., None] * expected.weights.max(3, keepdims=True, initial=0) + 1e-35
    assert_within(abs(weights - own), relative[..., None] * own + 1e-35)
    largest = -np.sort(-padded, 3)[..., :top_k]
    largest = np.pad(largest, [(0, 0)] * 3 + [(0, top_k - largest.shape[3])])
    assert_within(abs(own - largest), error)


def check(look: Insight, expected: Expected, kernel: Kernel, call: tuple[Any, ...], options: dict) -> None:
    relative = relative_error(kernel, expected)
    check_keys(look, expected, visible_pairs(*call, **options), relative)
    entropy = entropies(expected.weights, options.get("sinks"), expected.lse)
    assert_within(abs(as_float64(look.entropy) - entropy), relative * (2 + entropy))
    mass = expected.weights.sum(2)
    worst = relative.max(2, keepdims=True, initial=0)
    assert_within(abs(as_float64(look.key_mass) - mass), worst * mass + 1e-35)
    if look.distance_mass is not None:
        seqlen_q, seqlen_k = expected.weights.shape[2:]
        given = options.get("query_offset")
        offset = 0 if options.get("causal") == "top_left" else seqlen_k - seqlen_q
        masses = distance_masses(expected.weights, offset if given is None else given, EDGES)
        # Such sums may have more terms than a float64 has room for.
        assert_within(abs(as_float64(look.distance_mass) - masses), (worst + 1e-12) * masses + 1e-35)
    if look.output is not None:
        assert_within(abs(as_float64(look.output) - expected.out), allowed(kernel, expected))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_case(case: Case, dtype: str) -> None:
    kernel = strongest(dtype)
    call, options = case.tensors(dtype), case.options(dtype)
    look = fa.insight(*call, **options, distances=EDGES)
    check(look, expect_case(case, dtype), kernel, call, options)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_every_kernel(case: Case, kernel: Kernel) -> None:
    call, options = case.tensors(kernel.dtype), case.options(kernel.dtype)
    for top_k in (1, 40):
        look = fa.insight(*call, **options, top_k=top_k, distances=EDGES)
        check(look, expect_case(case, kernel.dtype), kernel, call, options)


def strongest(dtype: str) -> Kernel:
    return [kernel for kernel in KERNELS if kernel.dtype == dtype][-1]


@pytest.mark.parametrize("backend", ["reference", "math"])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_other_backends(case: Case, backend: str) -> None:
    """As exact as float32 on the CPU, at least; some queries at a time, by operations of torch."""
    kernel, options = strongest("float32"), case.options("float32", "torch")
    look = fa.insight(*case.tensors("float32", "torch"), **options, distances=EDGES, backend=backend)
    plain = case.tensors("float32"), case.options("float32")
    check(look, expect_case(case, "float32"), kernel, *plain)


def test_operations_of_torch_take_some_queries_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.backends import math_insight

    case = next(case for case in FEW if case.name == "padded-everything")
    call = case.tensors("float64", "torch"), case.options("float64", "torch")
    whole = fa.insight(*call[0], **call[1], distances=EDGES, backend="math")
    monkeypatch.setattr(math_insight, "SCORES_AT_ONCE", 3 * 3 * 6 * 150)  # three queries
    parts = fa.insight(*call[0], **call[1], distances=EDGES, backend="math")
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_layouts_and_libraries(layout: Any, library: str) -> None:
    case = Case("layouts", 40, 50, 16, 24, batch=2, query_heads=4, kv_heads=2, causal=True)
    tensors = case.tensors("float32")
    plain = fa.insight(*tensors, causal=True)
    if layout == "bshd":
        tensors = tuple(np.ascontiguousarray(x.swapaxes(1, 2)) for x in tensors)
    if library == "torch":
        tensors = tuple(torch.from_numpy(x).requires_grad_() for x in tensors)
    look = fa.insight(*tensors, causal=True, layout=layout)
    for name, one, other in zip(Insight._fields, plain, look, strict=True):
        if one is None:
            assert other is None
            continue
        assert isinstance(other, np.ndarray if library == "numpy" else torch.Tensor)
        if library == "torch":
            assert not other.requires_grad
            other = other.numpy()
        if name == "output" and layout == "bshd":
            other = other.swapaxes(1, 2)
        np.testing.assert_array_equal(one, other)


def test_without_a_value(kernel: Kernel) -> None:
    """Bits are the same; a key of more columns than a value may have is none of the value's."""
    case = Case("no-value", 70, 300, 576, 8, query_heads=2, causal=True)
    query, key, value = case.tensors(kernel.dtype)
    both, one = fa.insight(query, key, value, causal=True), fa.insight(query, key, causal=True)
    assert one.output is None
    assert_same_bits(both[:4], one[:4])


@pytest.mark.parametrize("shape", [(1, 9), (40, 300), (3, 700)], ids=str)
def test_ties_go_to_the_lower_key(kernel: Kernel, shape: tuple[int, int]) -> None:
    """Keys of five kinds, so that most scores come many times: in any block, and across blocks."""
    rows, keys = shape
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 5, keys)
    query = convert(rng.standard_normal((1, 1, rows, 16)), kernel.dtype)
    key = convert(rng.standard_normal((5, 16))[kind][None, None], kernel.dtype)
    for top_k in (1, 8, 30, 200):
        look = fa.insight(query, key, causal=True, top_k=top_k)
        scores = as_float64(query)[0, 0] @ as_float64(key)[0, 0].T
        scores[np.arange(rows)[:, None] + keys - rows < np.arange(keys)] = -np.inf
        expected = np.argsort(-scores.round(3), 1, kind="stable")[:, :top_k]
        taken = np.take_along_axis(scores, expected, 1)
        expected = np.where(taken == -np.inf, -1, expected)
        expected = np.pad(expected, [(0, 0), (0, top_k - expected.shape[1])], constant_values=-1)
        np.testing.assert_array_equal(look.keys[0, 0], expected)


def test_order_is_that_of_scores_where_weights_are_0(kernel: Kernel) -> None:
    """Scores so far apart that all weights but one underflow: the keys are ranked all the same."""
    key = convert(np.arange(400.0).reshape(1, 1, 400, 1) % 101, kernel.dtype)
    query = convert(np.full((1, 1, 20, 1), 64.0), kernel.dtype)
    look = fa.insight(query, key, scale=100.0, top_k=5)
    np.testing.assert_array_equal(look.keys[0, 0], np.tile([100, 201, 302, 99, 200], (20, 1)))
    np.testing.assert_allclose(look.weights[0, 0], np.tile([1 / 3, 1 / 3, 1 / 3, 0, 0], (20, 1)), rtol=1e-6)
    np.testing.assert_allclose(look.entropy, np.log(3), rtol=1e-6)


def test_more_keys_than_a_panel_keeps(kernel: Kernel) -> None:
    """Past 65536 keys probabilities are computed again; rising scores move the shifts all the way."""
    case = Case("many-keys", 3, 66000, 8, causal=True)
    query, key, value = case.tensors(kernel.dtype)
    bias = np.linspace(0, 20, 66000).astype(np.float32)
    for options in ({}, {"bias": bias}):
        options = {"causal": True, **options}
        expected = expect(query, key, value, **options)
        look = fa.insight(query, key, value, **options, distances=EDGES)._replace(output=None)
        check(look, expected, kernel, (query, key, value), options)


def test_few_queries_whose_scores_are_too_many_to_stay() -> None:
    """64 heads of 12 queries on one of 22,000 keys go the way of many queries; eight heads of them do not."""
    rng = np.random.default_rng(3)
    query, key = (
        rng.standard_normal((1, 64, 12, 4), np.float32),
        rng.standard_normal((1, 1, 22000, 4), np.float32),
    )
    whole = fa.insight(query, key, top_k=3)
    for first in (0, 40):
        heads = slice(first, first + 8)
        part = fa.insight(query[:, heads], key, top_k=3)
        for name in ("weights", "entropy", "key_mass"):
            np.testing.assert_allclose(getattr(whole, name)[:, heads], getattr(part, name), rtol=1e-5)


def test_rows_that_see_nothing(kernel: Kernel) -> None:
    case = Case("nothing", 40, 30, 16, query_heads=2, causal=True)  # ten rows stand before all keys
    for sinks in (None, [0.5, -np.inf]):
        look = fa.insight(*case.tensors(kernel.dtype), causal=True, sinks=sinks)
        assert (look.keys[:, :, :10] == -1).all()
        for array in (look.weights, look.entropy):
            assert (array[:, :, :10] == 0).all()
        assert (as_float64(look.output)[:, :, :10] == 0).all()


def test_a_sink_is_one_more_key() -> None:
    """Four equal scores and a sink of the same: a fifth each."""
    query = np.zeros((1, 1, 1, 8), np.float32)
    look = fa.insight(query, np.zeros((1, 1, 4, 8), np.float32), sinks=[0.0])
    np.testing.assert_allclose(look.weights[0, 0, 0], [0.2] * 4 + [0] * 4, rtol=1e-6)
    np.testing.assert_allclose(look.entropy[0, 0, 0], np.log(5), rtol=1e-6)
    np.testing.assert_allclose(look.key_mass[0, 0], 0.2, rtol=1e-6)
    everything = fa.insight(query, np.zeros((1, 1, 4, 8), np.float32), sinks=[1e6])
    assert everything.entropy[0, 0, 0] == 0
    assert (everything.weights == 0).all()
    assert everything.keys[0, 0, 0].tolist() == [0, 1, 2, 3, -1, -1, -1, -1]


def test_extreme_scores(kernel: Kernel) -> None:
    """The lowest number as a bias hides nothing; rising and falling scores move the shift all the way."""
    case = Case("extreme", 50, 600, 16, query_heads=1)
    query, key, value = case.tensors(kernel.dtype, spread=30)
    biases = {
        "lowest": np.full((50, 1), np.finfo(np.float32).min),
        "rising": np.linspace(-300, 300, 600),
        "falling": np.linspace(300, -300, 600),
    }
    for bias in biases.values():
        options = {"bias": bias.astype(np.float32)}
        expected = expect(query, key, value, **options)
        check(fa.insight(query, key, **options), expected, kernel, (query, key, value), options)


def test_nan_reaches_the_rows_that_see_it(kernel: Kernel) -> None:
    """And through them the mass of the keys that they see, of no other."""
    case = Case("nan", 60, 60, 16, causal=True)
    query, key, value = case.tensors(kernel.dtype)
    clean = fa.insight(query, key, value, causal=True)
    key[0, 0, 40] = np.nan
    look = fa.insight(query, key, value, causal=True)
    assert np.isnan(look.entropy[0, 0, 40:]).all()
    assert_same_bits(look.entropy[:, :, :40], clean.entropy[:, :, :40])
    assert_same_bits(look.keys[:, :, :40], clean.keys[:, :, :40])
    assert (look.keys != 40).all()
    hidden = fa.insight(query, key, value, causal=True, mask=np.arange(60) != 40)
    assert not np.isnan(hidden.key_mass).any()
    key = case.tensors(kernel.dtype)[1]
    query[0, 0, 30] = np.nan
    look = fa.insight(query, key, value, causal=True)
    np.testing.assert_array_equal(np.isnan(look.key_mass[0, 0]), np.arange(60) <= 30)


@pytest.mark.parametrize("backend", ["reference", "math"])
def test_nan_is_the_mass_of_what_is_seen_elsewhere_too(backend: str) -> None:
    query, key, value = Case("nan", 40, 63, 16, causal=True).tensors("float32")
    query[0, 0, 10] = np.nan
    options = {"causal": True, "query_offset": 20, "distances": [0, 5]}
    expected = fa.insight(query, key, value, **options)
    arrays = (query, key, value) if backend == "reference" else map(torch.from_numpy, (query, key, value))
    look = fa.insight(*arrays, **options, backend=backend)
    for found, right in ((look.key_mass, expected.key_mass), (look.distance_mass, expected.distance_mass)):
        np.testing.assert_array_equal(np.isnan(np.asarray(found)), np.isnan(right))
    assert np.isnan(expected.key_mass).sum() == 31


@pytest.mark.parametrize("bound", [2**62 - 1, 2**62 - 16, 2**61])
def test_windows_of_any_size(bound: int) -> None:
    """Their sum may exceed 64 bits."""
    query, key, _ = Case("far", 40, 5000, 16).tensors("float32")
    look = fa.insight(query, key, window=(bound, bound))
    expected = fa.insight(query, key)
    assert_same_bits((look.keys, look.key_mass), (expected.keys, expected.key_mass))


def test_bits_do_not_depend_on_threads_batch_or_heads(kernel: Kernel) -> None:
    rows = 40 if kernel.isa == "scalar" else 300
    case = Case("bits", rows, 2 * rows, 32, batch=2, query_heads=4, kv_heads=2, causal=True)
    call = case.tensors(kernel.dtype)
    whole = fa.insight(*call, causal=True, distances=EDGES)
    try:
        for threads in (1, 3):
            fa.set_num_threads(threads)
            assert_same_bits(tuple(whole), tuple(fa.insight(*call, causal=True, distances=EDGES)))
    finally:
        fa.set_num_threads(None)
    query, key, value = call
    for b, h in np.ndindex(2, 4):
        one = [x[b : b + 1, i : i + 1] for x, i in ((query, h), (key, h // 2), (value, h // 2))]
        alone = fa.insight(*one, causal=True, distances=EDGES)
        assert_same_bits(tuple(x[b : b + 1, h : h + 1] for x in whole), tuple(alone))


@pytest.mark.parametrize("seed", range(40))
def test_random_calls(seed: int) -> None:
    from random_calls import draw_legal

    kernel, call = draw_legal(np.random.default_rng(seed))
    for name in ("out", "return_lse", "return_weights", "dropout_p", "dropout_seed", "dropout_offset"):
        call.pop(name, None)
    tensors = call.pop("query"), call.pop("key"), call.pop("value")
    with kernel.forced():
        look = fa.insight(*tensors, **call, top_k=4)
    expected = expect(*tensors, **call)
    if call["layout"] == "bshd":
        look = look._replace(output=look.output.swapaxes(1, 2))
    sharp = look._replace(output=None)
    check(sharp, expected, kernel, tensors, call)
    assert_within(abs(as_float64(look.output) - expected.out), allowed(kernel, expected, sharp=True))


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "dropout": ({"dropout_p": 0.1}, ValueError, "before dropout: dropout_p must be 0, got 0.1"),
    "top_k-0": ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
    "top_k-float": ({"top_k": 8.0}, TypeError, "top_k must be an integer, got float"),
    "top_k-bool": ({"top_k": True}, TypeError, "top_k must be an integer, got bool"),
    "top_k-huge": ({"top_k": 2**62}, ValueError, "keys of shape .* would take"),
    "distances-type": ({"distances": 8}, TypeError, "distances must be a sequence of integers, got int"),
    "distances-float": ({"distances": [0.5]}, TypeError, "distances must hold integers, got float"),
    "distances-fall": ({"distances": [0, 4, 4]}, ValueError, r"distances must rise .* got \[0, 4, 4\]"),
    "distances-huge": ({"distances": [2**62]}, ValueError, "distances must be within 62 bits"),
    "key": ({"key": [1.0]}, TypeError, "key must be a NumPy array"),
    "dtype": ({"key": np.ones((1, 1, 4, 8))}, TypeError, "one dtype"),
    "backend": ({"backend": "triton"}, NotImplementedError, "no backend can run this call"),
    "mask": ({"mask": np.ones((3, 4), np.float32)}, TypeError, "mask must be bool"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    changes, error, message = BAD[name]
    ones = np.ones((1, 1, 4, 8), np.float32)
    with pytest.raises(error, match=message):
        fa.insight(**{"query": ones, "key": ones, **changes})


def test_a_seed_changes_nothing_without_dropout() -> None:
    call = Case("seed", 20, 30, 8).tensors()
    assert_same_bits(
        tuple(fa.insight(*call))[:5], tuple(fa.insight(*call, dropout_seed=3, dropout_offset=1))[:5]
    )


def test_a_compiled_function_calls_it() -> None:
    query, key, _ = Case("compiled", 20, 30, 8).tensors("float32", "torch")
    compiled = torch.compile(lambda query, key: fa.insight(2 * query, key, top_k=3).keys + 1, backend="eager")
    torch.testing.assert_close(compiled(query, key), fa.insight(2 * query, key, top_k=3).keys + 1)


def memory(dtype: str, length: int, call: str) -> float:
    """MiB that a look at two heads adds to the peak of a process that holds its tensors."""
    code = f"""
        import numpy as np
        import fastattn as fa
        from shapes import convert

        def peak():
            lines = open("/proc/self/status").read().splitlines()
            return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024

        rng = np.random.default_rng(0)
        query, key, value = (convert(rng.standard_normal((1, 2, {length}, 64), np.float32), {dtype!r})
                             for _ in range(3))
        small = [x[:, :, :64] for x in (query, key, value)]
        fa.insight(*small)
        open("/proc/self/clear_refs", "w").write("5")  # the peak from here on
        before = peak()
        look = {call}
        assert abs(look.key_mass.sum() / (2 * {length}) - 1) < 1e-5
        print(peak() - before)
    """
    return float(output_of(code, timeout=600))


def test_memory_grows_with_the_length_alone() -> None:
    """16384 rows under a window: their scores would take 2 GiB; results take 7 MiB, the output 8."""
    assert memory("float32", 16384, "fa.insight(query, key, value, window=(256, 0))") < 60


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_memory_of_65536_rows(dtype: str) -> None:
    assert memory(dtype, 65536, "fa.insight(query, key, value, causal=True)") < 300


def test_no_tier_is_without_it() -> None:
    """Forced by name, each tier of this machine looks, and says the same."""
    call = Case("tiers", 33, 70, 16).tensors()
    found = []
    for isa in _core.available_isas():
        _core.select_isa(isa)
        try:
            found.append(fa.insight(*call).keys)
        finally:
            _core.select_isa(None)
    for keys in found:
        np.testing.assert_array_equal(keys, found[0])
