"""flash-attention's arguments, one by one: what each means here, and which are refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastattn as fa
from fastattn.integrations import flash_attn as fl
from fastattn.integrations import flash_attn_functions
from fastattn.integrations.flash_attn_padding import index_first_axis, pad_input, unpad_input

RULES = ["dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes", "deterministic"]
LENGTHS = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
PARAMETERS = {
    "flash_attn_func": ["q", "k", "v", *RULES, "return_attn_probs"],
    "flash_attn_kvpacked_func": ["q", "kv", *RULES, "return_attn_probs"],
    "flash_attn_qkvpacked_func": ["qkv", *RULES, "return_attn_probs"],
    "flash_attn_varlen_func": ["q", "k", "v", *LENGTHS, *RULES, "return_attn_probs", "block_table"],
    "flash_attn_varlen_kvpacked_func": ["q", "kv", *LENGTHS, *RULES, "return_attn_probs"],
    "flash_attn_varlen_qkvpacked_func": ["qkv", "cu_seqlens", "max_seqlen", *RULES, "return_attn_probs"],
    "flash_attn_with_kvcache": [
        *(
            "q",
            "k_cache",
            "v_cache",
            "k",
            "v",
            "rotary_cos",
            "rotary_sin",
            "cache_seqlens",
            "cache_batch_idx",
        ),
        *("cache_leftpad", "block_table", "softmax_scale", "causal", "window_size", "softcap"),
        *("rotary_interleaved", "alibi_slopes", "num_splits", "return_softmax_lse"),
    ],
}
DEFAULTS = {
    "dropout_p": 0.0,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "deterministic": False,
    "return_attn_probs": False,
    "rotary_interleaved": True,
    "num_splits": 0,
    "return_softmax_lse": False,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_positions_and_defaults_are_those_of_flash_attention_2(name: str) -> None:
    parameters = inspect.signature(getattr(fl, name)).parameters.values()
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in positional] == PARAMETERS[name]
    given = {p.name: p.default for p in positional if p.default not in (None, p.empty)}
    assert given == {key: value for key, value in DEFAULTS.items() if key in PARAMETERS[name]}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def rows(count: int, heads: int = 4, size: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, count, heads, size, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_arguments_reach_attention(dtype: torch.dtype) -> None:
    """Beyond what flash-attention takes: float32, float64, values of another size."""
    q, k, v = rows(5, dtype=dtype), rows(9, 2, dtype=dtype), rows(9, 2, 24, dtype)
    slopes, sink = torch.rand(4), torch.randn(4)
    out = fl.flash_attn_func(
        q, k, v, 0.0, 0.3, True, (3, -1), 20.0, slopes, learnable_sink=sink, return_attn_probs=True
    )
    options: dict[str, Any] = {"alibi_slopes": slopes, "sinks": sink, "softcap": 20.0, "scale": 0.3}
    wanted = fa.attention(q, k, v, causal=True, window=(3, None), layout="bshd", return_lse=True, **options)
    assert torch.equal(out[0], wanted[0])
    assert torch.equal(out[1], wanted[1])
    assert out[2].shape == (0,)


def test_rows_that_attend_to_nothing_have_a_lse_of_plus_infinity() -> None:
    q, k = rows(5), rows(3, 2)
    _, lse, _ = fl.flash_attn_func(q, k, k, causal=True, return_attn_probs=True)
    assert torch.equal(lse.isposinf(), torch.arange(5).expand(2, 4, 5) < 2)
    none = k[:, :0]
    out, lse, _ = fl.flash_attn_func(q, none, none, return_attn_probs=True)
    assert lse.isposinf().all()
    assert not out.any()
    out, lse = fl.flash_attn_with_kvcache(q, k, k, cache_seqlens=0, return_softmax_lse=True)
    assert lse.isposinf().all()
    assert not out.any()


def test_lse_has_a_gradient() -> None:
    q, k = rows(5).requires_grad_(), rows(3)
    _, lse, _ = fl.flash_attn_func(q, k, k, causal=True, return_attn_probs=True)
    lse[..., 2:].sum().backward()
    assert q.grad is not None
    assert q.grad[:, 2:].any()
    assert not q.grad[:, :2].any()


def test_signed_probabilities_are_those_of_the_call() -> None:
    """Their positive part makes the output, before the same seed's dropout they are the weights."""
    q, k, v = rows(20), rows(30, 2), rows(30, 2)
    torch.manual_seed(5)
    out, _, signed = fl.flash_attn_func(q, k, v, 0.3, causal=True, return_attn_probs=True)
    weights = fa.attention(q, k, v, causal=True, layout="bshd", return_weights=True)[1]
    torch.testing.assert_close(signed.abs(), weights)
    made = torch.einsum("bhqk,bkhd->bqhd", signed.clamp(min=0) / 0.7, v.repeat_interleave(2, 2))
    torch.testing.assert_close(out, made)
    torch.manual_seed(5)
    assert torch.equal(fl.flash_attn_func(q, k, v, 0.3, causal=True, return_attn_probs=True)[0], out)
    assert not torch.equal(fl.flash_attn_func(q, k, v, 0.3, causal=True), out)


def test_packed_heads_of_grouped_queries() -> None:
    qkv = torch.randn(2, 6, 4 + 2 * 2, 16)
    out = fl.flash_attn_qkvpacked_func(qkv, causal=True, num_heads_q=4)
    assert torch.equal(out, fl.flash_attn_func(qkv[:, :, :4], qkv[:, :, 4:6], qkv[:, :, 6:], causal=True))
    with pytest.raises(ValueError, match="num_heads_q is 3"):
        fl.flash_attn_qkvpacked_func(qkv, num_heads_q=3)


def calls() -> dict[str, Callable[..., Any]]:
    x, cu_seqlens = rows(4), torch.tensor([0, 1, 4], dtype=torch.int32)
    kv, qkv = torch.stack([x, x], 2), torch.stack([x, x, x], 2)
    lengths = (cu_seqlens, cu_seqlens, 3, 3)
    return {
        "func": lambda **more: fl.flash_attn_func(x, x, x, **more),
        "kvpacked": lambda **more: fl.flash_attn_kvpacked_func(x, kv, **more),
        "qkvpacked": lambda **more: fl.flash_attn_qkvpacked_func(qkv, **more),
        "varlen": lambda **more: fl.flash_attn_varlen_func(x[0], x[0], x[0], *lengths, **more),
        "varlen kvpacked": lambda **more: fl.flash_attn_varlen_kvpacked_func(x[0], kv[0], *lengths, **more),
        "varlen qkvpacked": lambda **more: fl.flash_attn_varlen_qkvpacked_func(qkv[0], cu_seqlens, 3, **more),
        "with_kvcache": lambda **more: fl.flash_attn_with_kvcache(x, x, x, **more),
    }


@pytest.mark.parametrize("name", calls())
def test_what_flash_attention_3_adds(name: str) -> None:
    call = calls()[name]
    out = call()
    for hint in {"num_splits": 4}, {"pack_gqa": True, "sm_margin": 8}, {"qv": None, "attention_chunk": 0}:
        assert torch.equal(call(**hint), out)
    for refused in ("qv", "q_descale", "k_descale", "v_descale", "attention_chunk", "seqused_k"):
        with pytest.raises(NotImplementedError, match=f"{refused} is not supported here: "):
            call(**{refused: torch.ones(1)})
    with pytest.raises(TypeError, match="unexpected keyword argument 'scale'"):
        call(scale=1.0)
    sink = torch.full((4,), 1e4)
    torch.testing.assert_close(call(learnable_sink=sink), torch.zeros_like(out))


def test_what_does_not_fit_is_refused() -> None:
    x = rows(4)
    with pytest.raises(TypeError, match="k must be a torch tensor, got ndarray"):
        fl.flash_attn_func(x, np.zeros((2, 4, 4, 16)), x)
    with pytest.raises(ValueError, match="kv must have shape"):
        fl.flash_attn_kvpacked_func(x, torch.stack([x, x, x], 2))
    with pytest.raises(ValueError, match="qkv must have shape"):
        fl.flash_attn_varlen_qkvpacked_func(torch.stack([x, x, x], 2), torch.tensor([0, 2, 4]), 2)
    with pytest.raises(ValueError, match="cu_seqlens_k"):
        fl.flash_attn_varlen_func(x[0], x[0], x[0], torch.tensor([0, 4]), torch.tensor([0, 5]), 4, 5)
    for window in None, 4, (2.0, 0), (1, None), (1, 1, 1):
        with pytest.raises((TypeError, ValueError), match=r"window_size must be two integers .*, got "):
            fl.flash_attn_func(x, x, x, window_size=window)
    with pytest.raises(TypeError, match="causal must be a bool, got str"):
        fl.flash_attn_func(x, x, x, causal="no")
    with pytest.raises(ValueError, match=r"attention_mask must have the shape .* \(2, 4\), got \(2, 3\)"):
        unpad_input(x, torch.ones(2, 3))


def pages() -> dict[str, Any]:
    cache = torch.randn(6, 3, 4, 16)
    return {"k": cache, "v": cache.flip(0), "block_table": torch.tensor([[4, 1], [0, 5]])}


def test_pages_are_read_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where sequences have as many queries and nothing has a gradient."""
    where, cu_seqlens = pages(), (torch.tensor([0, 2, 4]), torch.tensor([0, 4, 10]))
    q, sink = torch.randn(4, 4, 16), torch.randn(4, requires_grad=True)
    k, v = (where[name][where["block_table"]].flatten(1, 2) for name in "kv")
    loose = [torch.cat([x[0, :4], x[1, :6]]) for x in (k, v)]
    options: dict[str, Any] = {"causal": True, "learnable_sink": sink, "return_attn_probs": True}

    def call(k: Tensor, v: Tensor, **paged: Tensor) -> Any:
        return fl.flash_attn_varlen_func(q, k, v, *cu_seqlens, 2, 6, **paged, **options)

    wanted, gathered = call(*loose), call(**where)
    assert torch.equal(gathered[0], wanted[0])
    gathered[0].sum().backward()
    assert sink.grad is not None
    monkeypatch.setattr(flash_attn_functions, "_gathered", None)
    with torch.no_grad():
        read = call(**where)
    torch.testing.assert_close(read[0], wanted[0])
    torch.testing.assert_close(read[1], wanted[1])
    assert read[2].shape == (0,)


@pytest.mark.parametrize("lengths", [[0, 2, 4], [0, 1, 4]])
def test_pages_that_are_not_there_are_named(lengths: list[int]) -> None:
    where = pages()
    where["block_table"][1, 1] = 6
    arguments = (torch.randn(4, 4, 16), where["k"], where["v"], torch.tensor(lengths))
    with pytest.raises(ValueError, match=r"from 0 to 5 .* got 6 for sequence 1, slot 1"):
        fl.flash_attn_varlen_func(
            *arguments, torch.tensor([0, 4, 10]), 3, 6, block_table=where["block_table"]
        )
    unused = torch.tensor([0, 4, 7])
    assert (
        fl.flash_attn_varlen_func(*arguments, unused, 3, 4, block_table=where["block_table"]).isfinite().all()
    )


@pytest.mark.parametrize("starts_q", [[0, 2, 4], [0, 1, 4]])
@pytest.mark.parametrize(
    "starts_k, longest, error, message",
    [
        ([1, 4, 10], 6, ValueError, "cu_seqlens_k must start at 0, got 1"),
        ([0, 4, 2], 6, ValueError, "cu_seqlens_k must never fall, got 2 after 4"),
        ([0, 4, 10], 5, ValueError, "max_seqlen_k must be at least the longest sequence's 6, got 5"),
        ([0, 4, 10], 6.5, TypeError, "max_seqlen_k must be an integer, got 6.5"),
    ],
)
def test_lengths_of_pages_are_checked(
    starts_q: list[int], starts_k: list[int], longest: Any, error: type[Exception], message: str
) -> None:
    """Whether pages are read where they lie or gathered."""
    where, starts = pages(), (torch.tensor(starts_q), torch.tensor(starts_k))
    with pytest.raises(error, match=message):
        fl.flash_attn_varlen_func(
            *(torch.randn(4, 4, 16), where["k"], where["v"], *starts, starts_q[2] - starts_q[1], longest),
            block_table=where["block_table"],
        )


def test_caches_of_more_sequences_than_queries() -> None:
    q, cache = rows(1), torch.randn(5, 8, 4, 16)
    assert torch.equal(
        fl.flash_attn_with_kvcache(q, cache, cache), fl.flash_attn_func(q, cache[:2], cache[:2])
    )
    picked = fl.flash_attn_with_kvcache(q, cache, cache, cache_batch_idx=torch.tensor([3, 1]))
    torch.testing.assert_close(picked, fl.flash_attn_func(q, cache[[3, 1]], cache[[3, 1]]))


def test_a_window_wider_than_the_cache_turns_queries_as_none_does() -> None:
    x, cache = rows(3), rows(8)
    angles = torch.rand(8, 8)
    tables: dict[str, Any] = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin(), "cache_seqlens": 4}
    first, second, third = (
        fl.flash_attn_with_kvcache(x, cache.clone(), cache.clone(), x, x, window_size=window, **tables)
        for window in ((-1, -1), (8, 9), (7, 7))
    )
    assert torch.equal(first, second)
    assert not torch.allclose(first, third)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_seqlens": None}, "cache_seqlens must say where"),
        ({"block_table": torch.zeros(2, 1), "page_table": torch.zeros(2, 1)}, "two names of one"),
        (
            {"block_table": torch.tensor([[0], [1]]), "cache_leftpad": torch.zeros(2)},
            "cache_leftpad must be None",
        ),
        (
            {"page_table": torch.tensor([[0], [1]]), "cache_batch_idx": torch.zeros(2)},
            "cache_batch_idx must be None",
        ),
        ({"cache_batch_idx": torch.tensor([1, 1])}, r"cache_batch_idx must differ .*, got \[1, 1\]"),
        ({"cache_batch_idx": torch.tensor([[0], [1]])}, r"cache_batch_idx must have shape \(2,\)"),
        (
            {"cache_batch_idx": torch.tensor([1, 2]), "cache_leftpad": torch.tensor([0, 1])},
            "cache_batch_idx must hold rows of k_cache, from 0 to 1, got 2 for sequence 1",
        ),
        ({"cache_leftpad": torch.tensor([-1, 0])}, "cache_leftpad must be from 0"),
        ({"cache_leftpad": torch.tensor([1])}, r"cache_leftpad must have shape \(2,\)"),
        (
            {"cache_leftpad": torch.tensor([0, 10])},
            "cache_leftpad must be from 0 to k_cache's length 9, got 10",
        ),
        (
            {"cache_leftpad": torch.tensor([0, 1]), "cache_seqlens": torch.tensor([1, 2, 3])},
            r"cache_seqlens must have shape \(2,\), got \(3,\)",
        ),
        ({"block_table": torch.tensor([0, 1])}, r"block_table must have shape \(batch, slots\), got \(2,\)"),
        ({"rotary_cos": torch.ones(9), "rotary_sin": torch.ones(9)}, "rotary_cos must have shape"),
        ({"rotary_cos": torch.ones(9, 8)}, "rotary_cos and rotary_sin must be given together"),
        ({"rotary_cos": torch.ones(3, 8), "rotary_sin": torch.ones(3, 8)}, "rotary_cos has"),
        ({"cache_leftpad": torch.tensor([0, 1]), "alibi_slopes": torch.ones(3)}, "alibi_slopes"),
        ({"k": None, "v": None, "rotary_cos": torch.ones(9, 8)}, "go with new keys"),
        ({"v": None}, "new_value"),
    ],
)
def test_nothing_is_written_by_a_call_that_is_refused(options: dict[str, Any], message: str) -> None:
    q, new, cache = rows(3), rows(2), rows(9)
    before = cache.clone()
    with pytest.raises(ValueError, match=message):
        fl.flash_attn_with_kvcache(
            q, cache, cache.clone(), **{"k": new, "v": new, "cache_seqlens": 2, **options}
        )
    assert torch.equal(cache, before)


def test_caches_compute_no_gradients() -> None:
    q, cache = rows(1).requires_grad_(), rows(9)
    with pytest.raises(RuntimeError, match="grad"):
        fl.flash_attn_with_kvcache(q, cache, cache)
    with torch.no_grad():
        fl.flash_attn_with_kvcache(q, cache, cache)


def test_padding_is_taken_out_and_put_back() -> None:
    x = torch.randn(3, 4, 5, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1]])
    unused = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    loose, indices, cu_seqlens, longest, used = unpad_input(x, mask, unused)
    assert torch.equal(loose, torch.cat([x[0, :3], x[2, 1:]]))
    assert torch.equal(loose, index_first_axis(x.flatten(0, 1), indices))
    assert (cu_seqlens.tolist(), longest, used.tolist()) == ([0, 3, 3, 6], 3, [2, 0, 3])
    assert cu_seqlens.dtype == used.dtype == torch.int32
    padded = pad_input(loose, indices, 3, 4)
    kept = (mask + unused)[..., None].bool()
    assert torch.equal(padded, x * kept)
    assert torch.equal(padded, pad_input(loose, indices.int(), 3, 4))  # as transformers has them
    padded.sum().backward()
    assert torch.equal(x.grad, kept.expand_as(x).float())


def test_graphs_of_torch_compile() -> None:
    """Whole ones, of every function that does not look for pages."""
    q, k = rows(5), rows(5, 2)
    cu_seqlens = torch.tensor([0, 4, 10], dtype=torch.int32)

    def call(q: Tensor, k: Tensor, cu_seqlens: Tensor) -> Tensor:
        dense = fl.flash_attn_func(q, k, k, causal=True)
        loose = (q.flatten(0, 1), *[k.flatten(0, 1)] * 2, cu_seqlens, cu_seqlens, 6, 6)
        ragged = fl.flash_attn_varlen_func(*loose, causal=True).view_as(q)
        return dense + ragged + fl.flash_attn_with_kvcache(q, k, k.clone(), cache_seqlens=4)

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    assert torch.equal(compiled(q, k, cu_seqlens), call(q, k, cu_seqlens))
