"""fastattn under transformers gives what eager attention gives: tiny random models of every kind."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="4.57")

from transformers import masking_utils  # noqa: E402

from fastattn.integrations import transformers as integration  # noqa: E402
from transformers_models import (  # noqa: E402
    BATCH,
    DECODERS,
    ENCODER_DECODERS,
    LENGTH,
    MODELS,
    PADDING,
    WINDOW,
    bart,
    build,
    gpt_oss,
    llama,
    mistral,
    model_name,
    sources,
    tokens,
    use,
)


@pytest.fixture(scope="module", autouse=True)
def registered():
    integration.register()


@pytest.fixture(scope="module", params=MODELS, ids=model_name)
def model(request):
    return build(request.param)


@pytest.fixture(scope="module", params=DECODERS, ids=model_name)
def decoder(request):
    return build(request.param)


def under(model, implementation: str, **inputs: Any):
    with torch.no_grad():
        return use(model, implementation)(**inputs)


def real(inputs: dict[str, Any], which: str) -> torch.Tensor:
    """Where rows are no padding."""
    mask = inputs[which.format("attention_mask")]
    ids = inputs[which.format("input_ids")]
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()


# transformers 4 warns that only eager returns weights; here fastattn does.
OUTPUT_ATTENTIONS = pytest.mark.filterwarnings("ignore:.output_attentions=True. is not supported:UserWarning")


@OUTPUT_ATTENTIONS
@pytest.mark.parametrize("padding", PADDING)
def test_hidden_states_and_weights_are_those_of_eager(model, padding):
    inputs = sources(model, padding) | {"output_attentions": True}
    expected, actual = under(model, "eager", **inputs), under(model, "fastattn", **inputs)
    rows = {"attentions": "{}", "decoder_attentions": "decoder_{}", "cross_attentions": "decoder_{}"}
    if "input_ids" in inputs:
        rows["encoder_attentions"] = "{}"
    last = "decoder_{}" if model.config.is_encoder_decoder else "{}"
    at = real(inputs, last)
    torch.testing.assert_close(actual.logits[at], expected.logits[at], rtol=2e-5, atol=2e-5)
    compared = 0
    for kind, which in rows.items():
        for ours, theirs in zip(*(getattr(x, kind, None) or () for x in (actual, expected)), strict=True):
            at = real(inputs, which)
            ours, theirs = ours.transpose(1, 2)[at], theirs.transpose(1, 2)[at]
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)
            compared += 1
    assert compared >= model.config.num_hidden_layers


@OUTPUT_ATTENTIONS
def test_weights_that_the_configuration_asks_for():
    model = use(build(llama), "eager")
    model.config.output_attentions = True
    expected, actual = (under(model, name, input_ids=tokens()[0]) for name in ("eager", "fastattn"))
    torch.testing.assert_close(actual.attentions, expected.attentions, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("make", [llama, bart], ids=model_name)
def test_every_layer_calls_fastattn(make, monkeypatch):
    """Models that pass by the interface would agree with eager, too."""
    calls = []
    attention = integration.attention
    monkeypatch.setattr(
        integration, "attention", lambda *args, **kw: calls.append(1) or attention(*args, **kw)
    )
    model = build(make)
    under(model, "fastattn", **sources(model))
    assert len(calls) == {llama: 2, bart: 6}[make]


def test_a_layer_is_one_graph_of_torch_compile():
    layer = use(build(llama), "fastattn").model.layers[0].self_attn
    rows = torch.randn(1, 6, 5, 16, generator=torch.Generator().manual_seed(1))

    def call(rows: torch.Tensor) -> torch.Tensor:
        return integration.attention_forward(layer, rows, rows, rows, None)[0]

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    assert torch.equal(compiled(rows), call(rows))


def generate(model, implementation: str, **inputs: Any):
    return use(model, implementation).generate(
        **inputs,
        max_new_tokens=WINDOW + 4,
        min_new_tokens=WINDOW + 4,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )


@pytest.mark.parametrize("padding", ["none", "left"])  # on the right, text would go on from padding
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_text_is_that_of_eager(decoder, cache, padding):
    ids, mask = tokens(padding)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}
    expected, actual = (
        generate(decoder, implementation, **inputs, cache_implementation=cache)
        for implementation in ("eager", "fastattn")
    )
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=2e-5, atol=5e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("make", [mistral, gpt_oss], ids=model_name)
def test_sliding_caches(make, cache):
    """Of models with a window, caches that keep no more than it: the text above ran on those."""
    model = build(make)
    ids, _ = tokens()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "cache_implementation": cache}
    layers = generate(model, "fastattn", **inputs).past_key_values.layers
    sliding = [layer for layer in layers if "SlidingWindow" in type(layer).__name__]
    assert len(sliding) == {mistral: 2, gpt_oss: 1}[make]
    assert all(layer.keys.shape[2] <= WINDOW < LENGTH for layer in sliding)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("make", ENCODER_DECODERS, ids=model_name)
def test_text_of_an_encoder_and_a_decoder_is_that_of_eager(make, cache, padding):
    model = build(make)
    inputs = {
        name: value
        for name, value in sources(model, padding).items()
        if "decoder" not in name and value is not None
    }
    expected, actual = (
        generate(model, implementation, **inputs, cache_implementation=cache)
        for implementation in ("eager", "fastattn")
    )
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=2e-5, atol=5e-5)


def test_a_prompt_in_two_parts(decoder):
    """The second part's queries stand behind the keys of the first: bottom right."""
    ids, _ = tokens()
    whole = under(decoder, "fastattn", input_ids=ids).logits[:, 13:]
    cache = transformers.DynamicCache(config=decoder.config)
    under(decoder, "fastattn", input_ids=ids[:, :13], past_key_values=cache)
    part = under(decoder, "fastattn", input_ids=ids[:, 13:], past_key_values=cache).logits
    torch.testing.assert_close(part, whole, rtol=2e-5, atol=2e-5)


def test_packed_sequences_stay_apart(decoder):
    ids, _ = tokens()
    position_ids = torch.cat([torch.arange(9), torch.arange(12)])[None]
    inputs = {"input_ids": ids[:1], "position_ids": position_ids, "use_cache": False}
    expected, actual = under(decoder, "eager", **inputs), under(decoder, "fastattn", **inputs)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("value", [float("-inf"), torch.finfo(torch.float32).min, -1.5])
def test_a_float_mask_is_added(value):
    ids, _ = tokens()
    mask = torch.zeros(BATCH, 1, LENGTH, LENGTH)
    mask[..., 1::2] = value
    inputs = {"input_ids": ids, "attention_mask": mask}
    decoder = build(llama)
    expected, actual = under(decoder, "eager", **inputs), under(decoder, "fastattn", **inputs)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=2e-5, atol=2e-5)


# --- masks -------------------------------------------------------------------------------------------------

CAUSAL = masking_utils.causal_mask_function
SLIDING = masking_utils.sliding_window_causal_mask_function(WINDOW)


def masks(function, q_length, kv_length, q_offset, kv_offset, padding, local_size=None):
    """(ours, the dense mask of transformers)."""
    position = torch.arange(q_length) + q_offset
    # The same call for transformers 4 and 5.
    common = {
        "batch_size": 2,
        "cache_position": position,
        "kv_length": kv_length,
        "kv_offset": kv_offset,
        "mask_function": function,
        "attention_mask": padding,
        "local_size": local_size,
    }
    where = {"q_length": q_length, "q_offset": q_offset}
    dense = masking_utils.sdpa_mask(**common, **where, allow_is_causal_skip=False)
    five = (
        "q_length"
        in masking_utils.sdpa_mask.__code__.co_varnames[: masking_utils.sdpa_mask.__code__.co_argcount]
    )
    if five:
        common.pop("cache_position")
        common |= where
    return integration.make_mask(**common), dense


@pytest.mark.parametrize("function", [CAUSAL, SLIDING], ids=["causal", "sliding"])
@pytest.mark.parametrize("padding", ["none", "left", "right", "holes", "short"])
@pytest.mark.parametrize(
    ("q_length", "kv_length", "q_offset", "kv_offset"),
    [
        (12, 12, 0, 0),
        (12, 20, 0, 0),
        (1, 20, 19, 0),
        (1, 20, 9, 0),
        (5, 20, 15, 0),
        (5, 20, 8, 0),
        (3, 10, 12, 5),
    ],
    ids=["prefill", "static prefill", "decode", "static decode", "chunk", "static chunk", "sliding cache"],
)
def test_a_rule_mask_has_the_elements_of_the_dense_one(
    function, padding, q_length, kv_length, q_offset, kv_offset
):
    pad = None if padding == "none" else torch.ones(2, kv_offset + kv_length, dtype=torch.bool)
    if padding == "left":
        pad[1, : kv_offset + 2] = False
    elif padding == "right":
        pad[1, -2:] = False
    elif padding == "holes":
        pad[0, 1::3] = False
    elif padding == "short":  # a static cache: the keys to come are not mentioned
        pad = pad[:, : q_offset + q_length]
    ours, dense = masks(function, q_length, kv_length, q_offset, kv_offset, pad)
    assert ours.shape == dense.shape and ours.rule is not None
    assert torch.equal(ours & True, dense)


def test_what_is_not_a_band_is_dense():
    chunked = masking_utils.chunked_causal_mask_function(WINDOW, torch.zeros(2, dtype=torch.int64))
    ours, dense = masks(chunked, 12, 12, 0, 0, None, local_size=WINDOW)
    assert type(ours) is torch.Tensor and torch.equal(ours, dense)


def test_the_plain_causal_rule_is_the_plain_argument():
    """Calls of nothing but the causal rule take the short way."""
    real = torch.ones(2, 12, dtype=torch.bool)
    for mask, _ in (
        masks(CAUSAL, 12, 12, 0, 0, real),
        masks(CAUSAL, 1, 12, 11, 0, real),
        masks(SLIDING, WINDOW, WINDOW, 0, 0, None),
    ):
        assert mask.rule.arguments() == {"causal": True}


def test_a_rule_mask_that_was_written_to_is_what_was_written():
    mask, _ = masks(CAUSAL, 12, 20, 0, 0, None)
    mask[:, :, 3] = False
    assert mask.rule is None
    assert not mask[:, :, 3].any() and mask[:, :, 2, :3].all()
    assert "RuleMask" in repr(mask)


# --- refusals ----------------------------------------------------------------------------------------------


def call(module=None, mask=None, **arguments):
    query = torch.randn(1, 2, 4, 8)
    module = torch.nn.Module().eval() if module is None else module
    return integration.attention_forward(module, query, query, query, mask, **arguments)


def test_an_argument_without_a_meaning_here_is_refused():
    call(position_ids=torch.arange(4), unheard_of=None)
    with pytest.raises(
        TypeError, match="does not know what these attention arguments mean: sinks, unheard_of"
    ):
        call(unheard_of=1, sinks=torch.ones(2))


def test_packed_sequences_without_a_mask():
    query, key, value = (torch.randn(1, heads, 9, 8) for heads in (4, 2, 2))
    starts = torch.tensor([0, 2, 9], dtype=torch.int32)
    bounds = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 7, "max_length_k": 7}
    module = torch.nn.Module().eval()
    out, weights = integration.attention_forward(
        module, query, key, value, None, is_causal=True, sliding_window=3, **bounds
    )
    assert weights is None and out.shape == (1, 9, 4, 8)
    for rows in slice(0, 2), slice(2, 9):
        parts = (x[:, :, rows] for x in (query, key, value))
        alone, _ = integration.attention_forward(module, *parts, None, is_causal=True, sliding_window=3)
        assert torch.equal(out[:, rows], alone)


def test_packed_sequences_that_cannot_be_told_apart_are_refused():
    cumulative = torch.tensor([0, 2, 4])
    with pytest.raises(TypeError, match="needs cu_seq_lens_k to tell packed sequences apart"):
        call(cu_seq_lens_q=cumulative)
    with pytest.raises(TypeError, match="without a mask in a batch of"):
        call(cu_seq_lens_q=cumulative, cu_seq_lens_k=cumulative, output_attentions=True)
    call(mask=torch.ones(1, 1, 4, 4, dtype=torch.bool), cu_seq_lens_q=cumulative, cu_seq_lens_k=cumulative)


def test_a_mask_needs_four_axes():
    with pytest.raises(ValueError, match=r"expected four axes, .* got shape \(1, 4\)"):
        call(mask=torch.ones(1, 4, dtype=torch.bool))


def test_the_output_is_contiguous_with_heads_inside():
    out, weights = call()
    assert out.shape == (1, 4, 2, 8) and out.is_contiguous() and weights is None


@pytest.mark.parametrize("shape", [(2,), (1, 2, 1, 1), (3, 2, 1, 1)], ids=str)
def test_a_head_mask_is_a_factor(shape):
    """As of eager attention in transformers 4; gradients reach it."""
    query, key, value = (torch.randn(3, 2, 4, 8, dtype=torch.float64) for _ in range(3))
    factors = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    out, weights = integration.attention_forward(
        torch.nn.Module(), query, key, value, None, is_causal=False, head_mask=factors, output_attentions=True
    )
    expected = (query @ key.mT / 8**0.5).softmax(-1) * factors.view(-1, 2, 1, 1)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(out, (expected @ value).transpose(1, 2))
    assert torch.autograd.grad(out.sum(), factors)[0].shape == shape
