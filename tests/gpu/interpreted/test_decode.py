"""Few queries to many keys: chunks of keys that are merged, and what may stand at their ends."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import shapes
from fastattn.gpu.configs import INTERPRETED, decode_chunk
from fastattn.gpu.decode import decode
from portable import DTYPES, attend, check_case
from shapes import Case

FEATURES = ("mask", "bias", "kv_lengths", "query_offset", "alibi_slopes", "sinks")

dtypes = pytest.mark.parametrize("dtype", DTYPES)


@dtypes
@pytest.mark.parametrize("case", [shapes.DECODE[0], *shapes.DECODE[3:5], *shapes.EMPTY], ids=str)
def test_every_shape(case: Case, dtype: str) -> None:
    check_case(case, dtype, run=decode)


@pytest.mark.gpu_slow
@dtypes
@pytest.mark.parametrize(
    "case", [*shapes.DECODE, *shapes.OPTIONS, *shapes.LENGTHS, shapes.GROUPS[-1]], ids=str
)
def test_more_shapes(case: Case, dtype: str) -> None:
    check_case(case, dtype, run=decode)


@dtypes
@pytest.mark.parametrize("arrays", [*((name,) for name in FEATURES), FEATURES], ids=str)
def test_every_feature_across_chunks(arrays: tuple[str, ...], dtype: str) -> None:
    softcap = 2.0 if arrays == FEATURES else 0.0
    case = Case("chunks", 3, 600, 24, 40, batch=2, query_heads=6, kv_heads=2, softcap=softcap, arrays=arrays)
    assert decode_chunk(case.seqlen_k) * 2 < case.seqlen_k
    check_case(case, dtype, run=decode)


@pytest.mark.parametrize("keys", [255, 256, 257, 511, 512, 513])
@pytest.mark.parametrize("rows", [1, 5])
def test_ends_of_chunks(rows: int, keys: int) -> None:
    for options in (
        {},
        {"causal": True, "window": (250, 0)},
        {"kv_lengths": [min(keys, 256)]},
        {"kv_lengths": [0]},
    ):
        check_case(Case("ends", rows, keys, 16), "float32", run=decode, **options)


@pytest.mark.parametrize("options", [{"softcap": 3.0}, {"scale": -0.2}, {"window": (300, None)}], ids=str)
def test_other_rules(options: dict[str, Any]) -> None:
    check_case(Case("rules", 4, 600, 16, query_heads=2), "float32", run=decode, **options)


def test_dropout_meets_the_place_of_each_key() -> None:
    case = Case("dropout", 5, 600, 16, batch=2, query_heads=4, kv_heads=2)
    check_case(case, "float32", run=decode, dropout_p=0.3, dropout_seed=7, dropout_offset=1)


@dtypes
def test_rows_of_the_lowest_number_give_the_mean(dtype: str) -> None:
    """A chunk whose scores are all finfo.min counts beside chunks like it, and for nothing beside others."""
    bias = torch.full((4, 600), torch.finfo(getattr(torch, dtype)).min, dtype=getattr(torch, dtype))
    bias[1, 300:] = 0
    bias[2, :256] = -torch.inf
    bias[3] = -torch.inf
    check_case(Case("lowest", 4, 600, 16), dtype, run=decode, bias=bias)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
def test_what_lies_past_a_length_changes_no_bit(poison: float) -> None:
    query, key, value = Case("poison", 2, 1100, 16, batch=2).tensors("float32", "torch")
    options = {"kv_lengths": [530, 7]}
    clean = attend(query, key, value, run=decode, **options)
    key[0, :, 530:], key[1, :, 7:], value[0, :, 530:], value[1, :, 7:] = (poison,) * 4
    for actual, expected in zip(attend(query, key, value, run=decode, **options), clean, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("ahead", [False, True])
def test_rows_over_several_tiles_change_no_bit(ahead: bool) -> None:
    """Nor do products that begin a turn before their exponentials."""
    tensors = Case("tiles", 5, 600, 16, batch=2, query_heads=6, kv_heads=2).tensors("float32", "torch")
    chosen, whole = INTERPRETED._replace(rows=8, ahead=ahead), INTERPRETED
    actual, expected = (attend(*tensors, run=partial(decode, tiles=x), causal=True) for x in (chosen, whole))
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def test_neighbours_change_no_bit() -> None:
    query, key, value = Case("batch", 2, 1100, 16, batch=3, query_heads=4, kv_heads=2).tensors(
        "float32", "torch"
    )
    whole = attend(query, key, value, run=decode)
    alone = attend(query[1:2, 2:], key[1:2, 1:], value[1:2, 1:], run=decode)
    for one, all_of_them in zip(alone, whole, strict=True):
        assert torch.equal(one, all_of_them[1:2, 2:])
