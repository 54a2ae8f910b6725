"""NaN, Inf and 1e30: where masked they change no bit, where valid they reach exactly who attends to them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bounds
import fastattn as fa
from bounds import as_float64
from kernels import Kernel, assert_same_bits, bits
from shapes import Case, convert

POISONS = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "1e30": 1e30}
CASES = (
    Case("one-block", 37, 83, 24, 40, batch=2, query_heads=4, kv_heads=2),
    Case("blocks", 70, 530, 24, 33, query_heads=2, kv_heads=1),
    Case("few", 3, 300, 24, 40, batch=2, query_heads=4, kv_heads=2),
    Case("one", 1, 300, 64, query_heads=4, kv_heads=1),
    Case("odd", 20, 45, 7, 5),
)
HIDING = (
    "mask",
    "shared mask",
    "bias",
    "kv_lengths",
    "kv_starts",
    "segments",
    "causal",
    "window",
    "everything",
)


def hide(case: Case, way: str, rng: np.random.Generator) -> tuple[dict[str, Any], np.ndarray]:
    """Options that hide keys, and which keys no query of a batch sees, (B, Lk)."""
    unseen = np.zeros((case.batch, case.seqlen_k), bool)
    if way == "mask":
        # Each key is hidden from some rows at least; every fifth from all.
        visible = rng.random((case.batch, 1, case.seqlen_q, case.seqlen_k)) < 0.6
        visible[..., ::5] = False
        return {"mask": visible}, unseen | (np.arange(case.seqlen_k) % 5 == 0)
    if way == "shared mask":
        visible = rng.random((case.batch, 1, 1, case.seqlen_k)) < 0.6
        return {"mask": visible}, ~visible[:, 0, 0]
    if way == "bias":
        bias = rng.standard_normal((case.seqlen_q, case.seqlen_k)).astype(np.float32)
        bias[:, 3::4] = -np.inf
        return {"bias": bias}, unseen | (np.arange(case.seqlen_k) % 4 == 3)
    if way == "kv_lengths":
        lengths = np.arange(case.batch) + case.seqlen_k // 2
        return {"kv_lengths": lengths}, np.arange(case.seqlen_k) >= lengths[:, None]
    if way == "kv_starts":
        starts = np.arange(case.batch) + case.seqlen_k // 2
        return {"kv_starts": starts}, np.arange(case.seqlen_k) < starts[:, None]
    if way == "segments":  # every seventh key is of nobody's, and so is the last half
        key_ids = np.where(
            np.arange(case.seqlen_k) % 7 == 0, 2, np.arange(case.seqlen_k) * 2 // case.seqlen_k
        )
        ids = [np.tile(of, (case.batch, 1)) for of in (np.zeros(case.seqlen_q, int), key_ids)]
        return {"segment_ids": tuple(ids)}, ids[1] != 0
    last = case.seqlen_k // 3 + case.seqlen_q - 1
    past = unseen | (np.arange(case.seqlen_k) > last)
    if way == "causal":
        return {"causal": True, "query_offset": case.seqlen_k // 3}, past
    before = unseen | (np.arange(case.seqlen_k) < case.seqlen_k // 3 - 4)
    if way == "window":
        return {"window": (4, 0), "query_offset": case.seqlen_k // 3}, past | before
    options, hidden = hide(case, "mask", rng)
    options |= {"window": (4, 0), "query_offset": case.seqlen_k // 3, "sinks": np.zeros(case.query_heads)}
    options |= {"softcap": 5.0, "alibi_slopes": np.ones(case.query_heads)}
    return options, hidden | past | before


@pytest.mark.parametrize("seqlen_q", [1, 4, 13, 63, 64])
def test_rows_without_keys_have_weights_of_zero(seqlen_q: int, rng: np.random.Generator) -> None:
    """Whatever an earlier call has left in memory that is used again: here NaN."""
    for head_dim in (8, 64, 128):
        query, key, value = (
            rng.standard_normal((1, 2, length, head_dim)) for length in (seqlen_q, 1300, 1300)
        )
        mask = np.ones((seqlen_q, 1), bool)
        mask[-1] = False
        for dtype in "float32", "bfloat16":
            tensors = [convert(tensor, dtype) for tensor in (query, key, value)]
            fa.attention(*tensors[:2], convert(np.full_like(value, np.nan), dtype), return_weights=True)
            out, lse, weights = fa.attention(*tensors, mask=mask, return_lse=True, return_weights=True)
            for result, empty in (out, 0), (lse, -np.inf), (weights, 0):
                assert (result[:, :, -1] == empty).all()


def poisoned(tensor: np.ndarray, where: np.ndarray, poison: float) -> np.ndarray:
    """A copy of key or value (B, H, Lk, D) with poison at `where` (B, Lk); in half of the columns only."""
    copy = tensor.copy()
    batch, key = np.nonzero(where)
    with np.errstate(over="ignore"):
        copy[batch, :, key, ::2] = np.asarray(poison).astype(tensor.dtype)
    return copy


@pytest.mark.parametrize("case", CASES, ids=str)
class TestHidden:
    """Compared with finite numbers in the same places, bit by bit."""

    @pytest.mark.parametrize("way", HIDING)
    def test_from_every_row(self, kernel: Kernel, case: Case, way: str, rng: np.random.Generator) -> None:
        query, key, value = bounds.draw(case, kernel.dtype)
        options, unseen = hide(case, way, rng)
        options |= {"return_lse": True, "return_weights": True}
        assert unseen.any()
        clean = fa.attention(query, key, value, **options)
        assert np.isfinite(as_float64(clean[0])).all() and as_float64(clean[0]).any()
        for poison in POISONS.values():
            bad_key, bad_value = poisoned(key, unseen, poison), poisoned(value, unseen, poison)
            assert_same_bits(fa.attention(query, bad_key, bad_value, **options), clean)

    @pytest.mark.parametrize("target", ["key", "value"])
    def test_from_some_rows(self, kernel: Kernel, case: Case, target: str, rng: np.random.Generator) -> None:
        """Rows that do not attend to a poisoned key keep every bit, beside rows that do."""
        tensors = dict(zip(("query", "key", "value"), bounds.draw(case, kernel.dtype), strict=True))
        visible = rng.random((case.batch, 1, case.seqlen_q, case.seqlen_k)) < 0.7
        for at in (0, case.seqlen_k // 2, case.seqlen_k - 1):
            where = np.zeros((case.batch, case.seqlen_k), bool)
            where[:, at] = True
            spared = np.broadcast_to(~visible[..., at], case.scores_shape[:3])
            clean = fa.attention(**tensors, mask=visible, return_lse=True)
            for poison in POISONS.values():
                bad = tensors | {target: poisoned(tensors[target], where, poison)}
                out, lse = fa.attention(**bad, mask=visible, return_lse=True)
                np.testing.assert_array_equal(bits(out)[spared], bits(clean[0])[spared])
                np.testing.assert_array_equal(bits(lse)[spared], bits(clean[1])[spared])

    def test_by_the_causal_rule_from_earlier_rows(self, kernel: Kernel, case: Case) -> None:
        query, key, value = bounds.draw(case, kernel.dtype)
        clean = fa.attention(query, key, value, causal=True)
        for later in range(1, case.seqlen_q, 9):
            at = case.seqlen_k - later  # attended to by the last `later` rows
            where = np.broadcast_to(np.arange(case.seqlen_k) == at, (case.batch, case.seqlen_k))
            bad = fa.attention(
                query, poisoned(key, where, np.nan), poisoned(value, where, np.inf), causal=True
            )
            assert_same_bits(bad[:, :, :-later], clean[:, :, :-later])
            assert np.isnan(as_float64(bad[:, :, -later:])).all()

    def test_in_a_bias_under_a_mask(self, kernel: Kernel, case: Case, rng: np.random.Generator) -> None:
        query, key, value = bounds.draw(case, kernel.dtype)
        visible = rng.random((case.seqlen_q, case.seqlen_k)) < 0.6
        bias = rng.standard_normal((case.seqlen_q, case.seqlen_k)).astype(np.float32)
        clean = fa.attention(query, key, value, mask=visible, bias=bias, return_lse=True)
        for poison in (np.nan, np.inf):
            bad = np.where(visible, bias, np.float32(poison))
            assert_same_bits(fa.attention(query, key, value, mask=visible, bias=bad, return_lse=True), clean)


def nan_payload(dtype: str, quiet: bool) -> Any:
    """A NaN with payload bits set, which arithmetic on its bits could turn into something else."""
    patterns = {"float64": (64, 0x7FF0, 48), "float32": (32, 0x7F80, 16), "bfloat16": (16, 0x7F80, 0)}
    width, high, shift = patterns.get(dtype, (16, 0x7C00, 0))
    everything = (1 << (width - 1)) - 1  # 0x7fffffff in float32
    pattern = everything if quiet else (high << shift) | 1
    return np.array([pattern], f"u{width // 8}").view(convert(np.zeros(1), dtype).dtype)[0]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("quiet", [True, False], ids=["all ones", "signalling"])
class TestValidNan:
    def test_in_a_key_reaches_the_rows_that_attend_to_it(
        self, kernel: Kernel, case: Case, quiet: bool, rng: np.random.Generator
    ) -> None:
        query, key, value = bounds.draw(case, kernel.dtype)
        visible = rng.random((case.seqlen_q, case.seqlen_k)) < 0.7
        at = case.seqlen_k // 2
        bad = key.copy()
        bad[0, 0, at, -1] = nan_payload(kernel.dtype, quiet)
        out, lse, weights = fa.attention(
            query, bad, value, mask=visible, return_lse=True, return_weights=True
        )
        reached = np.zeros(case.scores_shape[:3], bool)
        reached[0, : case.query_heads // case.kv_heads] = visible[:, at]
        np.testing.assert_array_equal(np.isnan(as_float64(out)).all(axis=-1), reached)
        np.testing.assert_array_equal(np.isnan(as_float64(out)).any(axis=-1), reached)
        np.testing.assert_array_equal(np.isnan(as_float64(lse)), reached)
        np.testing.assert_array_equal(np.isnan(as_float64(weights)).any(axis=-1), reached)

    @pytest.mark.parametrize("masked", [True, False], ids=["masked", "full"])
    def test_in_a_value_reaches_their_column(
        self, kernel: Kernel, case: Case, quiet: bool, masked: bool, rng: np.random.Generator
    ) -> None:
        query, key, value = bounds.draw(case, kernel.dtype)
        visible = (rng.random((case.seqlen_q, case.seqlen_k)) < 0.7) | (not masked)
        at, column = case.seqlen_k - 1, case.value_dim - 1
        bad = value.copy()
        bad[-1, -1, at, column] = nan_payload(kernel.dtype, quiet)
        options = {"mask": visible} if masked else {}
        out, lse = fa.attention(query, key, bad, return_lse=True, **options)
        reached = np.zeros(case.scores_shape[:3], bool)
        reached[-1, -(case.query_heads // case.kv_heads) :] = visible[:, at]
        np.testing.assert_array_equal(np.isnan(as_float64(out[..., column])), reached)
        assert not np.isnan(as_float64(out[..., :column])).any()
        assert np.isfinite(lse).all()

    def test_in_a_query_reaches_its_row(self, kernel: Kernel, case: Case, quiet: bool) -> None:
        query, key, value = bounds.draw(case, kernel.dtype)
        clean = fa.attention(query, key, value)
        bad = query.copy()
        bad[0, 0, case.seqlen_q // 2, 0] = nan_payload(kernel.dtype, quiet)
        out, lse, weights = fa.attention(bad, key, value, return_lse=True, return_weights=True)
        reached = np.zeros(case.scores_shape[:3], bool)
        reached[0, 0, case.seqlen_q // 2] = True
        for result in (out, weights):
            np.testing.assert_array_equal(np.isnan(as_float64(result)).all(axis=-1), reached)
        np.testing.assert_array_equal(np.isnan(as_float64(lse)), reached)
        np.testing.assert_array_equal(bits(out)[~reached], bits(clean)[~reached])

    def test_in_a_bias_reaches_its_row(self, kernel: Kernel, case: Case, quiet: bool) -> None:
        query, key, value = bounds.draw(case, kernel.dtype)
        bias = convert(np.zeros((case.seqlen_q, case.seqlen_k)), kernel.dtype)
        bias[-1, case.seqlen_k // 3] = nan_payload(kernel.dtype, quiet)
        out = as_float64(fa.attention(query, key, value, bias=bias))
        assert np.isnan(out[:, :, -1]).all() and np.isfinite(out[:, :, :-1]).all()


def test_infinite_value_in_a_valid_place(kernel: Kernel, rng: np.random.Generator) -> None:
    """It is infinite for the rows that attend to it, and nothing for the others."""
    case = CASES[1]
    query, key, value = bounds.draw(case, kernel.dtype)
    visible = rng.random((case.seqlen_q, case.seqlen_k)) < 0.7
    bad = value.copy()
    bad[..., 100, :] = np.inf
    out = as_float64(fa.attention(query, key, bad, mask=visible))
    np.testing.assert_array_equal(out == np.inf, np.broadcast_to(visible[:, 100, None], out.shape))
    assert np.isfinite(out[:, :, ~visible[:, 100]]).all()
