"""The probabilities themselves, from the log-sum-exp of the forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bounds
import shapes
from fastattn.gpu.weights import weights
from portable import DTYPES, allowed_weights, attend, call_of
from shapes import Case

dtypes = pytest.mark.parametrize("dtype", DTYPES)


def check(case: Case, dtype: str, **more: Any) -> None:
    tensors, options = case.tensors(dtype, "torch"), case.options(dtype, "torch") | more
    actual = torch.full(case.scores_shape, torch.nan, dtype=tensors[0].dtype)
    weights(call_of(*tensors, **options), attend(*tensors, **options).lse, actual)
    expected = bounds.expect(*tensors, **options)
    bounds.assert_within(abs(actual.double().numpy() - expected.weights), allowed_weights(expected, dtype))
    assert not actual[torch.from_numpy(expected.weights == 0)].any()


@dtypes
@pytest.mark.parametrize("case", [*shapes.OPTIONS, *shapes.EMPTY, *shapes.LENGTHS[:4]], ids=str)
def test_every_feature(case: Case, dtype: str) -> None:
    check(case, dtype)


@dtypes
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout(p: float, dtype: str) -> None:
    case = Case("dropout", 40, 77, 16, batch=2, query_heads=4, kv_heads=2, causal=True)
    check(case, dtype, dropout_p=p, dropout_seed=2**63 + 5, dropout_offset=9)
