"""fastattn under transformers gives what eager attention gives: tiny random models of every kind."""

from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="4.57")

from transformers import masking_utils  # noqa: E402

from fastattn.integrations import transformers as integration  # noqa: E402

VOCABULARY = 101
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
GROUPED = SMALL | {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}
BATCH, LENGTH, WINDOW = 3, 21, 8


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED))


def mistral():
    return transformers.MistralForCausalLM(transformers.MistralConfig(**GROUPED, sliding_window=WINDOW))


def gemma2():
    config = transformers.Gemma2Config(
        **GROUPED, sliding_window=WINDOW, attn_logit_softcapping=2.0, query_pre_attn_scalar=4
    )
    return transformers.Gemma2ForCausalLM(config)


def gpt_oss():
    config = transformers.GptOssConfig(
        **GROUPED, sliding_window=WINDOW, num_local_experts=2, num_experts_per_tok=1
    )
    model = transformers.GptOssForCausalLM(config)
    for layer in model.model.layers:  # sinks that matter: initialised near zero, they would be hard to miss
        torch.nn.init.normal_(layer.self_attn.sinks, std=2.0)
    return model


def llama4():
    config = transformers.Llama4TextConfig(
        **GROUPED, attention_chunk_size=WINDOW, num_local_experts=1, intermediate_size_mlp=64
    )
    return transformers.Llama4ForCausalLM(config)


def bert():
    return transformers.BertModel(transformers.BertConfig(**SMALL, num_attention_heads=6))


DECODERS = [llama, mistral, gemma2, gpt_oss, llama4]
PADDING = {"none": (0, 0, 0), "left": (5, 0, 2), "right": (-5, 0, -2)}


@pytest.fixture(scope="module", autouse=True)
def registered():
    integration.register()


@pytest.fixture(scope="module", params=[*DECODERS, bert], ids=lambda make: make.__name__)
def model(request):
    return build(request.param)


@pytest.fixture(scope="module", params=DECODERS, ids=lambda make: make.__name__)
def decoder(request):
    return build(request.param)


def build(make: Callable):
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():  # spread: the default initialisation makes attention nearly uniform
        if parameter.ndim > 1:
            parameter.data *= 4
    return model


def tokens(padding: str = "none"):
    """(input_ids, attention_mask or None); padding counts from the left, or from the right where negative."""
    ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    if padding == "none":
        return ids, None
    mask = torch.ones_like(ids)
    for row, count in zip(mask, PADDING[padding], strict=True):
        row[slice(0, count) if count >= 0 else slice(count, None)] = 0
    return ids, mask


def under(model, name: str, **inputs):
    model.set_attn_implementation(name)
    with torch.no_grad():
        return model(**inputs)


# transformers 4 warns that only eager returns weights; here fastattn does.
@pytest.mark.filterwarnings("ignore:.output_attentions=True. is not supported:UserWarning")
@pytest.mark.parametrize("padding", PADDING)
def test_hidden_states_and_weights_are_those_of_eager(model, padding):
    ids, mask = tokens(padding)
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    inputs = {"input_ids": ids, "attention_mask": mask, "output_attentions": True}
    expected, actual = under(model, "eager", **inputs), under(model, "fastattn", **inputs)
    torch.testing.assert_close(actual[0][real], expected[0][real], rtol=2e-5, atol=2e-5)
    assert len(actual.attentions) == len(expected.attentions) == model.config.num_hidden_layers
    for ours, theirs in zip(actual.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(
            ours.transpose(1, 2)[real], theirs.transpose(1, 2)[real], rtol=2e-5, atol=1e-6
        )


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_text_is_that_of_eager(decoder, cache, padding):
    ids, mask = tokens(padding)
    texts = []
    for name in ("eager", "fastattn"):
        decoder.set_attn_implementation(name)
        mask_given = torch.ones_like(ids) if mask is None else mask
        texts.append(
            decoder.generate(
                input_ids=ids,
                attention_mask=mask_given,
                max_new_tokens=WINDOW + 4,
                do_sample=False,
                cache_implementation=cache,
                pad_token_id=0,
                eos_token_id=None,
            )
        )
    assert torch.equal(*texts)


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


@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="T5 calls no attention interface")
def test_position_bias_of_t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=48,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=3,
        decoder_start_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    ids, mask = tokens("right")
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :9]}
    expected, actual = under(model, "eager", **inputs), under(model, "fastattn", **inputs)
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
    if ours is None:
        ours = (torch.arange(q_length)[:, None] + kv_length - q_length >= torch.arange(kv_length)).expand(
            dense.shape
        )
    else:
        assert ours.shape == dense.shape and ours.rule is not None
    assert torch.equal(ours & True, dense)


def test_what_is_not_a_band_is_dense():
    chunked = masking_utils.chunked_causal_mask_function(WINDOW, torch.zeros(2, dtype=torch.int64))
    ours, dense = masks(chunked, 12, 12, 0, 0, None, local_size=WINDOW)
    assert type(ours) is torch.Tensor and torch.equal(ours, dense)


def test_the_plain_causal_rule_needs_no_mask():
    assert masks(CAUSAL, 12, 12, 0, 0, torch.ones(2, 12, dtype=torch.bool))[0] is None
    assert masks(SLIDING, WINDOW, WINDOW, 0, 0, None)[0] is None


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
        TypeError, match="does not know what these attention arguments mean: head_mask, unheard_of"
    ):
        call(unheard_of=1, head_mask=torch.ones(2))


def test_packed_sequences_without_a_mask_are_refused():
    cumulative = torch.tensor([0, 2, 4])
    with pytest.raises(TypeError, match="no mask that keeps them apart"):
        call(cu_seq_lens_q=cumulative, cu_seq_lens_k=cumulative)
    call(mask=torch.ones(1, 1, 4, 4, dtype=torch.bool), cu_seq_lens_q=cumulative, cu_seq_lens_k=cumulative)


def test_dropout_in_training_is_refused():
    call(dropout=0.1)  # not training: eager ignores it too
    with pytest.raises(
        NotImplementedError, match=r"no dropout yet, got dropout=0\.1 while Module is training"
    ):
        call(torch.nn.Module().train(), dropout=0.1)


def test_a_mask_needs_four_axes():
    with pytest.raises(ValueError, match=r"expected four axes, .* got shape \(1, 4\)"):
        call(mask=torch.ones(1, 4, dtype=torch.bool))


def test_the_output_is_contiguous_with_heads_inside():
    out, weights = call()
    assert out.shape == (1, 4, 2, 8) and out.is_contiguous() and weights is None
