"""The cases of flash-attention's public tests that have a cache, pages, or something that once went wrong."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.integrations import flash_attn as fl
from flash_reference import alibi, assert_as_good, attend, select, visible

HEAD_DIMS = [32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256]
FLAGS = [False, True]
LOW = [torch.float16, torch.bfloat16]
KV_HEADS = {"mha": 6, "gqa": 2, "mqa": 1}
BATCH, HEADS = 2, 6
CACHE_FEATURES: dict[str, Any] = {
    "head_dim": [32, 59, 64, 80, 128, 256],
    "heads": list(KV_HEADS),
    "causal": FLAGS,
    "local": [False, False, True],
    "alibi": [False, False, True],
    "new": [None, "as queries", "fewer"],
    "rotary": [0.0, 0.5, 1.0],
    "interleaved": FLAGS,
    "cache": ["plain", "page 256", "page 48", "leftpad", "batch_idx", "leftpad batch_idx"],
    "num_splits": [0, 1],
    "dtype": LOW,
}


@select(
    {
        "lengths": [(1, 128), (1, 339), (3, 1024), (64, 800), (64, 256), (3, 799), (64, 2048), (128, 128)],
        **CACHE_FEATURES,
    },
    quick=24,
    slow=240,
)
def test_with_kvcache(case: SimpleNamespace) -> None:
    check_with_kvcache(case)


@pytest.mark.slow
@select(
    {"lengths": [(16, 20000), (1, 128 * 1024), (16, 128 * 1024)], **CACHE_FEATURES, "head_dim": [32, 59, 64]},
    quick=12,
    slow=12,
)
def test_with_long_kvcache(case: SimpleNamespace) -> None:
    check_with_kvcache(case)


def check_with_kvcache(case: SimpleNamespace) -> None:
    """What is written, and what is attended to, against caches that are put together row by row."""
    torch.manual_seed(0)
    (lq, lk), size, kv_heads, dtype = case.lengths, case.head_dim, KV_HEADS[case.heads], case.dtype
    added = {None: 0, "as queries": lq, "fewer": int(torch.randint(1, lq + 1, ()))}[case.new]
    q, k, v = (torch.randn(BATCH, n, h, size).to(dtype) for n, h in ((lq, HEADS), *[(added, kv_heads)] * 2))
    caches, where, read = draw_caches(case, kv_heads)
    # Queries turn by the angles of the rows behind the keys that were there, however many are new.
    before = torch.randint(0 if added else 1, lk - max(lq * bool(added), added) + 1, (BATCH,))
    starts = (before * torch.rand(BATCH)).long() if "leftpad" in case.cache else torch.zeros(BATCH).long()
    window = torch.randint(0, lk, (2,)) if case.local else torch.tensor([-1, -1])
    options: dict[str, Any] = {**where, "cache_leftpad": starts.int() if "leftpad" in case.cache else None}
    turned_q, turned_k = q, k
    width = int(case.rotary * size) // 16 * 16 if added else 0
    if width:
        angles = torch.rand(lk, width // 2) * 6.3
        options |= {"rotary_cos": angles.cos().to(dtype), "rotary_sin": angles.sin().to(dtype)}
        table = torch.complex(options["rotary_cos"].float(), options["rotary_sin"].float())
        step = int(case.causal or (case.local and bool((window < lk).any())))
        turned_q = turn(q, table, before[:, None] + step * torch.arange(lq), case.interleaved)
        turned_k = turn(k, table, before[:, None] + torch.arange(added), case.interleaved)
    exact_k, exact_v = (read(cache).clone() for cache in caches)
    for b in range(BATCH):
        exact_k[b, before[b] : before[b] + added] = turned_k[b]
        exact_v[b, before[b] : before[b] + added] = v[b]
    slopes = torch.rand(BATCH, HEADS) * 0.3 if case.alibi else None
    out, lse = fl.flash_attn_with_kvcache(
        q,
        *caches,
        *((k, v) if added else ()),
        cache_seqlens=before.int(),
        causal=case.causal,
        window_size=window,
        alibi_slopes=slopes,
        rotary_interleaved=case.interleaved,
        num_splits=case.num_splits,
        return_softmax_lse=True,
        **options,
    )
    torch.testing.assert_close(
        read(caches[0]), exact_k, atol=1e-3, rtol=1e-3 if dtype is torch.float16 else 8e-3
    )
    assert torch.equal(read(caches[1]), exact_v)
    lengths = torch.full((BATCH,), lq), before + added
    seen = visible(*lengths, (lq, lk), case.causal, window, starts)
    assert torch.equal(lse.isposinf(), ~seen.any(-1).expand_as(lse))
    bias = None if slopes is None else alibi(slopes, *lengths, (lq, lk))
    exact, low = (attend(turned_q, exact_k, exact_v, seen, low=low, bias=bias) for low in FLAGS)
    assert_as_good(out, exact, low, 2)


def draw_caches(case: SimpleNamespace, kv_heads: int) -> tuple[tuple[Tensor, Tensor], dict[str, Any], Any]:
    """Caches, the arguments that say where sequences lie in them, and a function that reads them."""
    rows = case.lengths[1]
    if case.cache.startswith("page"):
        page_size = int(case.cache.split()[1])
        slots = -(-rows // page_size)
        pages = torch.randperm(3 * BATCH * slots)[: BATCH * slots].view(BATCH, slots)
        shape: tuple[int, ...] = (3 * BATCH * slots, page_size)
        where = {"block_table": pages.int()}
    elif "batch_idx" in case.cache:
        pages, shape = torch.randperm(2 * BATCH)[:BATCH, None], (2 * BATCH, rows)
        where = {"cache_batch_idx": pages[:, 0].int()}
    else:
        pages, shape, where = torch.arange(BATCH)[:, None], (BATCH, rows), {}
    key, value = (torch.randn(*shape, kv_heads, case.head_dim).to(case.dtype) for _ in range(2))
    return (key, value), where, lambda cache: cache[pages].flatten(1, 2)[:, :rows]


def turn(x: Tensor, table: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """Columns as complex numbers, times those of the table."""
    width = 2 * table.shape[1]
    columns = x[..., :width].float()
    pairs = columns.unflatten(-1, (-1, 2) if interleaved else (2, -1))
    pairs = pairs if interleaved else pairs.transpose(-1, -2)
    product = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * table[positions][:, :, None])
    product = product if interleaved else product.transpose(-1, -2)
    return torch.cat([product.flatten(-2).to(x.dtype), x[..., width:]], -1)


@select(
    {
        "lengths": [(1, 239), (3, 799), (127, 512), (127, 513), (113, 203), (128, 217), (1, 500)],
        "head_dim": HEAD_DIMS,
        "local": FLAGS,
        "page_size": [256, 512, 48],
        "ragged": [True, True, False],
        "differs": FLAGS,
        "dtype": LOW,
    },
    quick=12,
    slow=120,
)
def test_varlen_func_reads_pages(case: SimpleNamespace) -> None:
    """Gathered where there is a graph or queries are ragged, where they lie if not; never written."""
    torch.manual_seed(0)
    (lq, lk), kv_heads = case.lengths, 2
    case.cache = f"page {case.page_size}"
    caches, where, read = draw_caches(case, kv_heads)
    k, v = (cache.requires_grad_(case.differs) for cache in caches)
    fewest = max(1, lq - 20) if case.ragged else lq
    lengths = torch.randint(fewest, lq + 1, (BATCH,)), torch.randint(max(1, lk - 20), lk + 1, (BATCH,))
    cu_seqlens = [torch.nn.functional.pad(length.cumsum(0), (1, 0)).int() for length in lengths]
    q = torch.randn(int(lengths[0].sum()), HEADS, case.head_dim).to(case.dtype).requires_grad_(case.differs)
    window = torch.randint(0, lk, (2,)) if case.local else (-1, -1)
    out, lse, signed = fl.flash_attn_varlen_func(
        *(q, k, v, *cu_seqlens, int(lengths[0].max()), int(lengths[1].max())),
        causal=True,
        window_size=window,
        return_attn_probs=True,
        **where,
    )
    assert signed.numel() == 0
    there = torch.arange(lq) < lengths[0][:, None]
    padded = q.new_zeros(BATCH, lq, HEADS, case.head_dim).index_put((there,), q)
    seen = visible(*lengths, (lq, lk), True, window)
    exact, low = (attend(padded, read(k), read(v), seen, low=low)[there] for low in FLAGS)
    assert torch.equal(lse.isposinf(), ~seen.any(-1)[:, 0][there].expand_as(lse))
    assert_as_good(out, exact, low, 2)
    if case.differs:
        upstream = torch.randn_like(exact)
        ours, theirs, lows = (
            torch.autograd.grad(result, (q, k, v), upstream.to(result.dtype), retain_graph=True)
            for result in (out, exact, low)
        )
        for gradient, wanted, rounded in zip(ours, theirs, lows, strict=True):
            assert_as_good(gradient, wanted, rounded, 3)


@pytest.mark.parametrize("appended", [0, 1])
def test_lengths_beyond_the_block_table_are_refused(appended: int) -> None:
    q, new = (torch.zeros(1, n, 1, 64, dtype=torch.float16) for n in (1, appended))
    pages = torch.zeros(4, 256, 1, 64, dtype=torch.float16)
    table = torch.zeros(1, 1, dtype=torch.int32)

    def call(length: int) -> Tensor:
        rows = (new, new) if appended else ()
        lengths = torch.tensor([length], dtype=torch.int32)
        return fl.flash_attn_with_kvcache(
            q, pages, pages.clone(), *rows, cache_seqlens=lengths, block_table=table
        )

    with pytest.raises(ValueError, match="cache_seqlens"):
        call(257 - appended)
    assert call(256 - appended).isfinite().all()


@pytest.mark.parametrize("causal", FLAGS)
@pytest.mark.parametrize(("rows", "size"), [(1, 16), (2, 64), (5, 32), (17, 16), (128, 64)])
def test_gradients_of_large_scores_do_not_overflow(rows: int, size: int, causal: bool) -> None:
    torch.manual_seed(0)
    drawn = (torch.randn(BATCH, rows, 5, size) * times for times in (5, 3, 3))
    q, k, v = (x.half().requires_grad_() for x in drawn)
    everything = torch.full((BATCH,), rows)
    seen = visible(everything, everything, (rows, rows), causal, (-1, -1))
    results = [fl.flash_attn_func(q, k, v, causal=causal), *(attend(q, k, v, seen, low=low) for low in FLAGS)]
    assert_as_good(*results, 2)
    upstream = torch.randn_like(results[0])
    gradients = [torch.autograd.grad(out, (q, k, v), upstream.to(out.dtype)) for out in results]
    for triple in zip(*gradients, strict=True):
        assert_as_good(*triple, 5, 1e-3)


@pytest.mark.parametrize("causal", FLAGS)
@pytest.mark.parametrize("size", [16, 64])
def test_gradients_of_sequences_with_hardly_a_key_are_finite(size: int, causal: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(rows, 5, size).mul(3).half().requires_grad_() for rows in (256, 3, 3))
    cu_seqlens = [torch.tensor(at, dtype=torch.int32) for at in ([0, 76, 110, 256], [0, 1, 2, 3])]
    fl.flash_attn_varlen_func(q, k, v, *cu_seqlens, 256, 3, causal=causal).sum().backward()
    for x in (q, k, v):
        assert x.grad is not None
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("rows", "size"), [(97, 64), (200, 128)])
def test_gradients_from_strided_ones(rows: int, size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(BATCH, rows, 2, size).to(dtype).requires_grad_() for _ in range(3))
    everything = torch.full((BATCH,), rows)
    seen = visible(everything, everything, (rows, rows), True, (-1, -1))
    results = [fl.flash_attn_func(q, k, v, causal=True), *(attend(q, k, v, seen, low=low) for low in FLAGS)]
    upstream = torch.randn(rows, 2 * BATCH, 2, size)[:, ::2]
    gradients = [
        torch.autograd.grad(out.transpose(0, 1), (q, k, v), upstream.to(out.dtype)) for out in results
    ]
    for triple in zip(*gradients, strict=True):
        assert_as_good(*triple, 2)


@pytest.mark.parametrize("causal", FLAGS)
@pytest.mark.parametrize("lengths", [(239, 1), (127, 513), (256, 256)])
def test_every_run_has_the_same_bits(lengths: tuple[int, int], causal: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(BATCH, rows, 4, 64).half().requires_grad_() for rows in (lengths[0], *lengths[1:] * 2)
    )

    def run() -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        out = fl.flash_attn_func(q, k, v, 0.17, causal=causal, deterministic=True)
        return out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    first = run()
    for _ in range(5):
        assert all(map(torch.equal, first, run()))
