"""The portable forward against the float64 oracle: every argument, dtype and shape."""

from __future__ import annotations

import pytest

import shapes
from portable import DTYPES, check_case
from shapes import Case

LARGEST = 256
CASES = tuple(case for case in shapes.SMALL if max(case.head_dim, case.value_dim) <= LARGEST)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_shape(case: Case, dtype: str) -> None:
    check_case(case, dtype)
