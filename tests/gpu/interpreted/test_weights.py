"""The probabilities themselves, from the log-sum-exp of the forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bounds
import shapes
from fastattn.gpu.weights import weights
from portable import allowed_weights, attend, call_of
from shapes import Case

DTYPES = ("float32", pytest.param("float16", marks=pytest.mark.gpu_slow), "bfloat16")
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def check(case: Case, dtype: str, **more: Any) -> None:
    tensors, options = case.tensors(dtype, "torch"), case.options(dtype, "torch") | more
    actual = torch.full(case.scores_shape, torch.nan, dtype=tensors[0].dtype)
    weights(call_of(*tensors, **options), attend(*tensors, **options).lse, actual)
    expected = bounds.expect(*tensors, **options)
    bounds.assert_within(abs(actual.double().numpy() - expected.weights), allowed_weights(expected, dtype))
    assert not actual[torch.from_numpy(expected.weights == 0)].any()


@pytest.mark.parametrize("case", [*shapes.OPTIONS, *shapes.EMPTY, *shapes.LENGTHS[:4]], ids=str)
def test_every_feature(case: Case) -> None:
    check(case, "float32")


@pytest.mark.gpu_slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", shapes.OPTIONS, ids=str)
def test_every_feature_in_few_digits(case: Case, dtype: str) -> None:
    check(case, dtype)


@dtypes
def test_rows_of_the_lowest_number_are_even(dtype: str) -> None:
    """lse cannot tell how many keys share such a row: it is the bias, whatever their number."""
    bias = torch.zeros(37, 83, dtype=getattr(torch, dtype))
    bias[::3] = torch.finfo(bias.dtype).min
    bias[1::3, :70] = torch.finfo(bias.dtype).min
    bias[5] = -torch.inf
    check(Case("lowest", 37, 83, 24, query_heads=2), dtype, bias=bias)


@pytest.mark.parametrize("offset", [10_000, -10_000_000])
def test_alibi_far_from_the_keys(offset: int) -> None:
    case = Case("far", 20, 64, 16, query_heads=2)
    options = {"alibi_slopes": torch.tensor([0.5, 0.03]), "query_offset": offset}
    tensors = case.tensors("float32", "torch")
    actual = torch.empty(case.scores_shape)
    weights(call_of(*tensors, **options), attend(*tensors, **options).lse, actual)
    expected = bounds.expect(*tensors, **options).weights
    torch.testing.assert_close(actual.double(), torch.from_numpy(expected), rtol=2e-5, atol=1e-30)


@dtypes
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout(p: float, dtype: str) -> None:
    case = Case("dropout", 40, 77, 16, batch=2, query_heads=4, kv_heads=2, causal=True)
    check(case, dtype, dropout_p=p, dropout_seed=2**63 + 5, dropout_offset=9)
