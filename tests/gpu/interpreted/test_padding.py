"""Keys and queries that do not exist, and segments: who may look at what, and which tiles are passed by."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_backward_kernels import check_options, differentiate
from torch import Tensor

import bounds
from fastattn.gpu.call import segments_of
from fastattn.gpu.decode import decode
from fastattn.gpu.forward import forward
from fastattn.gpu.weights import weights
from portable import allowed_weights, attend, call_of, check_case
from shapes import Case

CASE = Case("padding", 40, 100, 16, 24, batch=3, query_heads=2, kv_heads=1)
CHUNKS = Case("chunks", 3, 530, 24, 40, batch=3, query_heads=4, kv_heads=2)
RICH = ("mask", "bias", "kv_lengths", "alibi_slopes", "sinks")


def documents(*lengths: int) -> Tensor:
    """The ids 7, 14, .. of documents of these lengths."""
    return torch.repeat_interleave(7 * torch.arange(1, len(lengths) + 1), torch.tensor(lengths))


def rules(case: Case) -> dict[str, dict[str, Any]]:
    """Padding and segments of all kinds, for the three sequences of a case."""
    rows, keys = case.seqlen_q, case.seqlen_k
    packed = torch.stack([documents(33, 30, keys - 63), documents(keys), documents(1, 1, 64, keys - 66)])
    mixed = torch.randint(-(2**40), -(2**40) + 3, (3, keys), generator=torch.Generator().manual_seed(0))
    starts, lengths = [0, keys // 2 + 3, keys], [rows, rows // 2, 0]
    return {
        "starts": {"kv_starts": starts},
        "starts and lengths": {"kv_starts": [5, 64, 90], "kv_lengths": [keys, 96, 90]},
        "starts under a window": {"kv_starts": starts, "window": (40, 3)},
        "lengths of queries": {"query_lengths": lengths},
        "both, causal": {"kv_starts": starts, "query_lengths": lengths, "causal": True},
        "segments": {"segment_ids": (packed[:, -rows:], packed)},
        "segments, causal": {"segment_ids": (packed[:, -rows:], packed), "causal": True},
        "segments under a window": {"segment_ids": (packed[:, :rows], packed), "window": (30, 9)},
        "segments in no order": {"segment_ids": (mixed[:, :rows], mixed), "causal": True},
        "segments apart": {"segment_ids": (packed[:, :rows] + 1000, packed)},
        "all": {
            "segment_ids": (packed[:, -rows:], packed),
            "kv_starts": [3, 50, 70],
            "query_lengths": [rows, rows - 1, 2],
            "causal": True,
        },
    }


KINDS = tuple(rules(CASE))


def kinds(*quick: str) -> Any:
    """All of them, of which every run of the tests takes some."""
    thorough = [pytest.param(kind, marks=pytest.mark.gpu_slow) for kind in KINDS if kind not in quick]
    return pytest.mark.parametrize("kind", [*quick, *thorough])


@kinds("starts", "starts under a window", "lengths of queries", "segments, causal", "segments in no order")
def test_forward(kind: str) -> None:
    check_case(CASE, "float32", **rules(CASE)[kind])


@kinds("starts and lengths", "both, causal", "segments", "segments apart")
def test_decode(kind: str) -> None:
    check_case(CHUNKS, "float32", run=decode, **rules(CHUNKS)[kind])


@pytest.mark.parametrize(("run", "dtype"), [(forward, "float16"), (decode, "bfloat16")])
def test_beside_the_other_rules(run: Any, dtype: str) -> None:
    case = replace(CHUNKS if run is decode else CASE, arrays=RICH, softcap=3.0)
    check_case(case, dtype, run=run, dropout_p=0.2, dropout_seed=3, **rules(case)["all"])


@kinds("all")
def test_weights(kind: str) -> None:
    tensors, options = CASE.tensors("float32", "torch"), rules(CASE)[kind]
    actual = torch.full(CASE.scores_shape, torch.nan)
    weights(call_of(*tensors, **options), attend(*tensors, **options).lse, actual)
    expected = bounds.expect(*tensors, **options)
    bounds.assert_within(
        abs(actual.double().numpy() - expected.weights), allowed_weights(expected, "float32")
    )
    assert not actual[torch.from_numpy(expected.weights == 0)].any()


@kinds("both, causal", "segments", "segments in no order")
def test_backward(kind: str) -> None:
    check_options(CASE, "float32", **rules(CASE)[kind])


@pytest.mark.parametrize(
    ("shape", "dtype"), [((3, 2, 40, 100), "bfloat16"), ((100,), "float32"), ((40, 1), "float32")], ids=str
)
def test_backward_beside_the_other_rules(shape: tuple[int, ...], dtype: str) -> None:
    case = replace(CASE, arrays=("kv_lengths", "alibi_slopes", "sinks"))
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    check_options(case, dtype, bias=bias, **rules(case)["all"])


@pytest.mark.parametrize("run", [forward, decode, None], ids=["forward", "decode", "backward"])
def test_what_does_not_exist_changes_no_bit(run: Any) -> None:
    """NaN and infinities before the first key, and past the last query."""
    query, key, value = Case("poison", 3, 270, 16, batch=3, query_heads=2, kv_heads=1).tensors(
        "float32", "torch"
    )
    starts, lengths = [40, 100, 0], [1, 2, 0]
    options = {"kv_starts": starts, "query_lengths": lengths, "softcap": 2.0}

    def results() -> tuple[Tensor, ...]:
        if run is None:
            return differentiate(call_of(query, key, value, **options))[:3]
        return attend(query, key, value, run=run, **options)

    clean = results()
    for b, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        key[b, :, :start] = value[b, :, :start] = torch.nan
        query[b, :, length:] = torch.inf
    for one, other in zip(results(), clean, strict=True):
        assert torch.equal(one, other)


def test_tiles_of_other_documents_are_not_read() -> None:
    """NaN in them would reach the sums."""
    ids = documents(64, 64, 64)[None]
    query, key, value = Case("tiles", 192, 192, 16).tensors("float32", "torch")
    clean = differentiate(call_of(query, key, value, segment_ids=(ids, ids)))
    for tensor in query, key, value:
        tensor[:, :, 128:] = torch.nan
    dirty = differentiate(call_of(query, key, value, segment_ids=(ids, ids)))
    for one, other in zip(dirty[:3], clean[:3], strict=True):
        assert torch.equal(one[:, :, :128], other[:, :, :128])


def test_least_and_greatest_ids() -> None:
    ids = torch.tensor([[5] * 64 + [9, 2, 4]])
    bounds_of_spans = segments_of(ids, ids[:, :1]).query_bounds
    assert bounds_of_spans.tolist() == [[[5, 5], [2, 9]]]


@pytest.mark.parametrize("number", [-(2**63), 2**63 - 1])
def test_whatever_numbers_on_a_device_hold(number: int) -> None:
    """They are clamped to the rows there are."""
    tensors = CASE.tensors("float32", "torch")
    call = call_of(*tensors)._replace(
        kv_starts=torch.tensor([number] * 3), query_lengths=torch.tensor([-number - 1] * 3)
    )
    out, lse = torch.full((3, 2, 40, 24), torch.nan), torch.full((3, 2, 40), torch.nan)
    forward(call, out, lse)
    expected = attend(*tensors).out if number < 0 else torch.zeros_like(out)
    assert torch.equal(out, expected)
