"""The rules of attention, one class or test each, on every kernel, checked by equivalences.

What may be seen is said a second time here, as plain boolean matrices or as slices of the inputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bounds
import fastattn as fa
from bounds import as_float64
from kernels import Kernel, assert_same_bits
from shapes import Case, convert

Array = np.ndarray
WIDE = Case("wide", 37, 83, 24, batch=2, query_heads=4, kv_heads=2)
TALL = Case("tall", 83, 37, 24, batch=2, query_heads=4, kv_heads=2)
SQUARE = Case("square", 70, 70, 24, batch=2, query_heads=4, kv_heads=2)
FEW = Case("few", 3, 300, 24, batch=2, query_heads=4, kv_heads=2)
BLOCKS = Case(
    "blocks", 40, 530, 24, batch=2, query_heads=4, kv_heads=2
)  # more keys than a kernel takes at once
CASES = pytest.mark.parametrize("case", [WIDE, TALL, SQUARE, FEW, BLOCKS], ids=str)


def attend(kernel: Kernel, case: Case, **options: Any) -> tuple[Any, ...]:
    result: tuple[Any, ...] = fa.attention(
        *bounds.draw(case, kernel.dtype), return_lse=True, return_weights=True, **options
    )
    return result


def assert_sees(kernel: Kernel, case: Case, visible: Array, **options: Any) -> None:
    """`options` hide the same keys as the boolean matrix `visible` does as a mask, to the bit."""
    hidden = np.broadcast_to(~visible, case.scores_shape)
    result = attend(kernel, case, **options)
    assert not as_float64(result[2])[hidden].any()
    assert (as_float64(result[2])[~hidden] > 0).all()
    assert_same_bits(result, attend(kernel, case, mask=visible))


def diagonal(case: Case) -> Array:
    """Key minus query position from the top-left corner, (Lq, Lk)."""
    return np.arange(case.seqlen_k) - np.arange(case.seqlen_q)[:, None]


@CASES
class TestDiagonal:
    """Causal, window and ALiBi share one offset."""

    def test_causal_is_bottom_right(self, kernel: Kernel, case: Case) -> None:
        visible = diagonal(case) <= case.seqlen_k - case.seqlen_q
        assert_sees(kernel, case, visible, causal=True)
        assert_sees(kernel, case, visible, causal="bottom_right")

    def test_causal_top_left(self, kernel: Kernel, case: Case) -> None:
        assert_sees(kernel, case, diagonal(case) <= 0, causal="top_left")

    @pytest.mark.parametrize("offset", [0, 5, -7, 1000, -1000, 2**40, -(2**40)])
    def test_query_offset(self, kernel: Kernel, case: Case, offset: int) -> None:
        for causal in (True, "top_left"):
            assert_sees(kernel, case, diagonal(case) <= offset, causal=causal, query_offset=offset)
        window = (diagonal(case) >= offset - 9) & (diagonal(case) <= offset + 4)
        assert_sees(kernel, case, window, window=(9, 4), query_offset=offset)

    def test_query_offset_per_batch(self, kernel: Kernel, case: Case) -> None:
        offsets = np.array([3, -20])
        visible = diagonal(case) <= offsets.reshape(2, 1, 1, 1)
        assert_sees(kernel, case, visible, causal=True, query_offset=offsets)

    def test_kv_lengths_never_move_it(self, kernel: Kernel, case: Case) -> None:
        lengths = np.array([case.seqlen_k // 2, case.seqlen_k - 1])
        visible = diagonal(case) <= case.seqlen_k - case.seqlen_q
        exists = np.arange(case.seqlen_k) < lengths.reshape(2, 1, 1, 1)
        assert_sees(kernel, case, visible & exists, causal=True, kv_lengths=lengths)

    def test_alibi_measures_from_it(self, kernel: Kernel, case: Case) -> None:
        slopes = np.array([0.5, 0.25, 0.125, 1.0])
        for offset in (case.seqlen_k - case.seqlen_q, 4, -90):
            bias = -slopes[:, None, None] * abs(diagonal(case) - offset)
            expected = bounds.expect(*bounds.draw(case, kernel.dtype), bias=bias.astype(np.float32))
            out, lse, _ = map(as_float64, attend(kernel, case, alibi_slopes=slopes, query_offset=offset))
            assert (abs(out - expected.out) <= bounds.allowed(kernel, expected, sharp=True)).all()
            assert (abs(lse - expected.lse) <= bounds.allowed_lse(kernel, expected, sharp=True)).all()


@CASES
class TestWindow:
    @pytest.mark.parametrize("window", [(0, 0), (5, 0), (0, 5), (13, 29), (None, 3), (3, None)], ids=str)
    def test_both_sides(self, kernel: Kernel, case: Case, window: Any) -> None:
        left, right = (10**6 if bound is None else bound for bound in window)
        distance = diagonal(case) - (case.seqlen_k - case.seqlen_q)
        visible = (distance >= -left) & (distance <= right)
        assert_sees(kernel, case, visible, window=window)
        assert_sees(kernel, case, visible & (distance <= 0), window=window, causal=True)

    def test_none_is_unbounded(self, kernel: Kernel, case: Case) -> None:
        for window in ((None, None), (2**62, 2**70)):
            assert_sees(kernel, case, diagonal(case) == diagonal(case), window=window)


class TestMask:
    SHAPES = ((), (83,), (1, 83), (37, 1), (37, 83), (4, 1, 83), (4, 37, 83), (1, 37, 83))
    SHAPES += ((2, 1, 1, 83), (2, 1, 37, 83), (2, 4, 37, 1), (1, 4, 1, 1), (2, 4, 37, 83))

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_broadcasts(self, kernel: Kernel, rng: np.random.Generator, shape: tuple[int, ...]) -> None:
        mask = np.asarray(rng.random(shape) < 0.7)
        whole = np.broadcast_to(mask, WIDE.scores_shape).copy()
        result = attend(kernel, WIDE, mask=mask)
        assert_same_bits(result, attend(kernel, WIDE, mask=whole))
        seen = as_float64(result[2]) > 0
        np.testing.assert_array_equal(seen, whole)

    def test_meets_every_other_rule(self, kernel: Kernel, rng: np.random.Generator) -> None:
        mask = rng.random((37, 83)) < 0.5
        lengths = np.array([70, 30])
        visible = mask & (diagonal(WIDE) <= 30) & (diagonal(WIDE) >= 10)
        visible = visible & (np.arange(83) < lengths.reshape(2, 1, 1, 1))
        options = {"causal": True, "window": (20, None), "query_offset": 30, "kv_lengths": lengths}
        assert_sees(kernel, WIDE, visible, mask=mask, **options)


class TestBias:
    @pytest.mark.parametrize("own", [True, False], ids=["own dtype", "float32"])
    def test_minus_infinity_masks(self, kernel: Kernel, rng: np.random.Generator, own: bool) -> None:
        visible = rng.random((2, 1, 37, 83)) < 0.5
        zero = np.zeros((4, 1, 83))
        dtype = kernel.dtype if own else "float32"
        hiding = convert(np.where(visible, 0, -np.inf), dtype)
        result = attend(kernel, WIDE, bias=hiding)
        assert_same_bits(result, attend(kernel, WIDE, bias=convert(zero, dtype), mask=visible))
        np.testing.assert_array_equal(as_float64(result[2]) > 0, np.broadcast_to(visible, WIDE.scores_shape))

    @pytest.mark.parametrize("shape", [(83,), (37, 1), (4, 1, 83), (2, 1, 37, 83), (2, 4, 1, 1)], ids=str)
    def test_broadcasts(self, kernel: Kernel, rng: np.random.Generator, shape: tuple[int, ...]) -> None:
        bias = convert(rng.standard_normal(shape), kernel.dtype)
        whole = np.ascontiguousarray(np.broadcast_to(bias, WIDE.scores_shape))
        assert_same_bits(attend(kernel, WIDE, bias=bias), attend(kernel, WIDE, bias=whole))

    def test_rows_of_the_lowest_number_give_the_mean(self, kernel: Kernel) -> None:
        """finfo.min is a value: such a row is the mean of V, beside rows that have more to choose from."""
        finite = {"bfloat16": -3.3895314e38, "float16": -65504.0}
        lowest = finite.get(kernel.dtype) or float(np.finfo(kernel.dtype).min)
        bias = np.zeros((37, 83))
        bias[::3] = lowest
        bias[1::3, :70] = lowest  # left of the last keys, which alone count
        query, key, value = bounds.draw(WIDE, kernel.dtype)
        options = {"bias": convert(bias, kernel.dtype)}
        out, lse, weights = map(as_float64, attend(kernel, WIDE, **options))
        expected = bounds.expect(query, key, value, **options)
        exact = bounds.ulp(expected.out, kernel.dtype) + (1e-14 if kernel.dtype == "float64" else 1e-6)
        if kernel.rounds_probabilities:
            exact += 2.0**-8 * expected.mass
        if kernel.dtype == "float16":  # its lowest does not drown the scores, only most of their digits
            exact = bounds.allowed(kernel, expected, sharp=True)
        assert (abs(out - expected.out) <= exact).all()
        np.testing.assert_allclose(lse, expected.lse, rtol=1e-4 if kernel.rounds_probabilities else 1e-6)
        assert not weights[:, :, 1::3, :70].any()
        if kernel.dtype != "float16":
            mean = as_float64(value).mean(axis=2, keepdims=True).repeat(2, axis=1)
            assert (abs(out - mean) <= exact)[:, :, ::3].all()
            np.testing.assert_allclose(
                weights[:, :, ::3], 1 / 83, rtol=2**-8 if "16" in kernel.dtype else 1e-6
            )


class TestEmptyRows:
    """A row that may attend to nothing: output 0, lse its sink, or -inf without one."""

    WAYS = ("mask", "bias", "kv_lengths", "window", "causal")

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize(
        "sinks", [None, np.array([0.5, -3.0, -np.inf, 700.0])], ids=["no sinks", "sinks"]
    )
    def test_rows(self, kernel: Kernel, way: str, sinks: Any) -> None:
        empty = np.zeros((2, 1, 37, 1), bool)
        options: dict[str, Any] = {"sinks": sinks}
        if way == "mask":
            empty[:, :, [0, 5, 36]] = True
            options["mask"] = ~empty
        elif way == "bias":
            empty[:, :, 7] = True
            options["bias"] = convert(np.where(empty, -np.inf, 0.25), kernel.dtype)
        elif way == "kv_lengths":
            empty[1] = True
            options["kv_lengths"] = [83, 0]
        elif way == "window":
            empty[:, :, 20:] = True  # they stand past the last key by more than the window
            options |= {"window": (2, 0), "query_offset": 83 + 2 - 20}
        else:
            empty[:, :, :10] = True
            options |= {"causal": True, "query_offset": -10}
        empty = np.broadcast_to(empty[..., 0], (2, 4, 37))
        out, lse, weights = map(as_float64, attend(kernel, WIDE, **options))
        assert not out[empty].any() and not weights[empty].any()
        wanted = np.full(4, -np.inf) if sinks is None else sinks
        np.testing.assert_array_equal(lse[empty], np.broadcast_to(wanted[:, None], (2, 4, 37))[empty])
        assert np.isfinite(lse[~empty]).all() and weights[:, :3].any(axis=-1)[~empty[:, :3]].all()

    def test_hold_no_minus_zero(self, kernel: Kernel) -> None:
        query, key, value = bounds.draw(WIDE, kernel.dtype)
        out = fa.attention(query, key, -abs(value), mask=np.zeros((1, 1), bool))
        assert_same_bits(out, np.zeros_like(out))


class TestSinks:
    def test_is_one_more_key_without_a_value(self, kernel: Kernel) -> None:
        """As if a key of score `sink` and value 0 stood before the others."""
        query, key, value = bounds.draw(WIDE, kernel.dtype)
        sinks = np.array([0.0, 2.5, -1.5, 9.0])
        first = np.zeros((2, 2, 1, 24), key.dtype)
        bias = np.zeros((4, 1, 84), np.float32)
        bias[..., 0] = sinks[:, None]
        joined = [np.concatenate([first, x], axis=2) for x in (key, value)]
        expected = bounds.expect(query, *joined, bias=bias)
        out, lse, weights = map(as_float64, attend(kernel, WIDE, sinks=sinks))
        assert (abs(out - expected.out) <= bounds.allowed(kernel, expected)).all()
        assert (abs(lse - expected.lse) <= bounds.allowed_lse(kernel, expected)).all()
        assert (
            abs(weights - expected.weights[..., 1:]) <= bounds.allowed_weights(kernel, expected)[..., 1:]
        ).all()

    def test_minus_infinity_is_none(self, kernel: Kernel) -> None:
        assert_same_bits(attend(kernel, WIDE, sinks=[-np.inf] * 4), attend(kernel, WIDE))

    def test_of_any_height(self, kernel: Kernel) -> None:
        out, lse, _ = map(as_float64, attend(kernel, WIDE, sinks=[1e30, 800.0, -800.0, -1e30]))
        assert not out[:, :2].any() and out[:, 2:].all()
        np.testing.assert_allclose(lse[:, :2], np.broadcast_to([[1e30], [800]], (2, 2, 37)), rtol=1e-7)
        assert_same_bits(out[:, 2:], as_float64(attend(kernel, WIDE)[0])[:, 2:])


class TestLengths:
    def test_cut_keys(self, kernel: Kernel) -> None:
        """As if key and value ended there."""
        query, key, value = bounds.draw(WIDE, kernel.dtype)
        for length in (1, 8, 31, 32, 64, 82, 83):
            out, lse = fa.attention(query, key, value, kv_lengths=[length, length], return_lse=True)
            cut = fa.attention(query, key[:, :, :length], value[:, :, :length], return_lse=True)
            assert_same_bits((out, lse), cut)

    def test_differ_by_batch(self, kernel: Kernel) -> None:
        query, key, value = bounds.draw(WIDE, kernel.dtype)
        both = fa.attention(query, key, value, kv_lengths=np.array([5, 80], np.int32))
        for b, length in enumerate((5, 80)):
            alone = fa.attention(*(x[b : b + 1] for x in (query, key, value)), kv_lengths=[length])
            assert_same_bits(both[b : b + 1], alone)


class TestEmptyAxes:
    @pytest.mark.parametrize("shape", [(0, 5, 7), (2, 0, 7), (2, 5, 0), (0, 0, 0)], ids=str)
    @pytest.mark.parametrize("causal", [False, True])
    def test_are_valid(self, kernel: Kernel, shape: tuple[int, int, int], causal: bool) -> None:
        batch, seqlen_q, seqlen_k = shape
        case = Case(f"empty-{shape}", seqlen_q, seqlen_k, 8, 16, batch=batch, query_heads=4, kv_heads=2)
        out, lse, weights = attend(kernel, case, causal=causal, sinks=[1.0, 2.0, 3.0, -np.inf])
        assert out.shape == (batch, 4, seqlen_q, 16) and weights.shape == (batch, 4, seqlen_q, seqlen_k)
        assert not out.any()
        np.testing.assert_array_equal(lse, np.broadcast_to([[1], [2], [3], [-np.inf]], (batch, 4, seqlen_q)))


class TestSoftcap:
    def test_is_applied_before_bias_and_alibi(self, kernel: Kernel) -> None:
        """Scores far past the cap become the cap; what is added is not capped."""
        one = convert(np.ones((1, 1, 1, 1)), kernel.dtype)
        key = convert(np.array([300.0, -300.0, 300.0]).reshape(1, 1, 3, 1), kernel.dtype)
        bias = convert(np.array([0.0, 4.0, 1.0]), kernel.dtype)
        scores = np.array([2.0 - 0.5 * 2, -2.0 + 4.0 - 0.5, 2.0 + 1.0])
        options = {"softcap": 2.0, "bias": bias, "alibi_slopes": [0.5], "query_offset": 2}
        lse, weights = fa.attention(
            one, key, key, scale=1.0, return_lse=True, return_weights=True, **options
        )[1:]
        expected = np.exp(scores) / np.exp(scores).sum()
        np.testing.assert_allclose(
            as_float64(weights).ravel(), expected, rtol=2**-7 if "16" in kernel.dtype else 1e-6
        )
        np.testing.assert_allclose(as_float64(lse).ravel(), np.log(np.exp(scores).sum()), rtol=1e-4)

    @pytest.mark.parametrize("softcap", [0.01, 1.0, 30.0, 1e4])
    def test_over_all_scores(self, kernel: Kernel, softcap: float) -> None:
        """From the linear middle of the tangent to its flat ends."""
        query = convert(np.ones((1, 1, 2, 1)), kernel.dtype)
        key = convert(np.concatenate([np.linspace(-40, 40, 161), [-65000, 65000, 1e-3]]), kernel.dtype)
        key = key.reshape(1, 1, -1, 1)
        expected = bounds.expect(query, key, key, softcap=softcap, scale=1.0)
        out, lse = map(as_float64, fa.attention(query, key, key, softcap=softcap, scale=1.0, return_lse=True))
        size = np.full((1, 1, 2), 2 + min(softcap, 65000))
        expected = expected._replace(size=size)
        assert (abs(out - expected.out) <= bounds.allowed(kernel, expected, sharp=True)).all()
        assert (abs(lse - expected.lse) <= bounds.allowed_lse(kernel, expected, sharp=True)).all()


class TestLayout:
    def test_bshd_is_bhsd_with_axes_swapped(self, kernel: Kernel) -> None:
        tensors = bounds.draw(SQUARE, kernel.dtype)
        swapped = [np.ascontiguousarray(x.swapaxes(1, 2)) for x in tensors]
        options: dict[str, Any] = {"causal": True, "return_lse": True, "return_weights": True}
        out, *rest = fa.attention(*swapped, layout="bshd", **options)
        expected, *expected_rest = fa.attention(*tensors, **options)
        assert out.flags.c_contiguous
        assert_same_bits((out.swapaxes(1, 2), *rest), (expected, *expected_rest))


class TestReturns:
    def test_in_the_order_out_lse_weights(self, kernel: Kernel) -> None:
        tensors = bounds.draw(SQUARE, kernel.dtype)
        out, lse, weights = attend(kernel, SQUARE)
        assert lse.dtype == (np.float64 if kernel.dtype == "float64" else np.float32)
        assert out.dtype == weights.dtype == tensors[0].dtype
        assert_same_bits(fa.attention(*tensors), out)
        assert_same_bits(fa.attention(*tensors, return_lse=True), (out, lse))
        assert_same_bits(fa.attention(*tensors, return_weights=True), (out, weights))

    def test_into_out(self, kernel: Kernel) -> None:
        tensors = bounds.draw(SQUARE, kernel.dtype)
        expected = fa.attention(*tensors)
        memory = np.full((2, 4, 70, 30), 7, expected.dtype)
        out = memory[..., 3:27]
        assert fa.attention(*tensors, out=out) is out
        assert_same_bits(out, expected)
        assert (as_float64(memory[..., :3]) == 7).all() and (as_float64(memory[..., 27:]) == 7).all()


def test_equal_scores_are_equal_weights(kernel: Kernel) -> None:
    """key = value, one tensor for both."""
    key = bounds.draw(SQUARE, kernel.dtype)[1]
    same, copied = (fa.attention(key, key, value, causal=True) for value in (key, key.copy()))
    assert_same_bits(same, copied)
