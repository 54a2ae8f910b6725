"""Tiny random models of transformers, one for each kind of attention, and what goes into them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

VOCABULARY = 101
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
}
GROUPED = SMALL | {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}
# Of Bart and Whisper.
PAIRED: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2},
    **{
        "encoder_attention_heads": 3,
        "decoder_attention_heads": 3,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
    },
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2},
}
BATCH, LENGTH, WINDOW = 3, 21, 8
# Tokens of padding for each sequence, on the left or, where negative, on the right.
PADDING = {"none": (0, 0, 0), "left": (5, 0, 2), "right": (-5, 0, -2)}
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}


def llama(**options: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED, **options))


def mistral(**options: Any) -> Any:
    config = transformers.MistralConfig(**GROUPED, sliding_window=WINDOW, **options)
    return transformers.MistralForCausalLM(config)


def gemma2(**options: Any) -> Any:
    config = transformers.Gemma2Config(
        **GROUPED, sliding_window=WINDOW, attn_logit_softcapping=2.0, query_pre_attn_scalar=4, **options
    )
    return transformers.Gemma2ForCausalLM(config)


def gpt_oss(**options: Any) -> Any:
    config = transformers.GptOssConfig(
        **GROUPED, sliding_window=WINDOW, num_local_experts=2, num_experts_per_tok=1, **options
    )
    model = transformers.GptOssForCausalLM(config)
    for layer in model.model.layers:  # sinks that matter: initialised near zero, they would be hard to miss
        torch.nn.init.normal_(layer.self_attn.sinks, std=2.0)
    return model


def llama4(**options: Any) -> Any:
    config = transformers.Llama4TextConfig(
        **GROUPED, attention_chunk_size=WINDOW, num_local_experts=1, intermediate_size_mlp=64, **options
    )
    return transformers.Llama4ForCausalLM(config)


def bert(attention_dropout: float = 0.0) -> Any:
    config = transformers.BertConfig(
        **SMALL,
        num_attention_heads=6,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=attention_dropout,
    )
    return transformers.BertForMaskedLM(config)


def modern_bert(attention_dropout: float = 0.0) -> Any:
    """An encoder with windows to both sides."""
    config = transformers.ModernBertConfig(
        **SMALL,
        num_attention_heads=3,
        local_attention=WINDOW,
        global_attn_every_n_layers=2,
        attention_dropout=attention_dropout,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "cls_token_id"), 0),
        **dict.fromkeys(("eos_token_id", "sep_token_id"), 1),
    )
    return transformers.ModernBertForMaskedLM(config)


def bart(**options: Any) -> Any:
    config = transformers.BartConfig(**PAIRED, max_position_embeddings=64, **(NO_DROPOUT | options))
    return transformers.BartForConditionalGeneration(config)


def t5(attention_dropout: float = 0.0) -> Any:
    config = transformers.T5Config(
        **{"vocab_size": VOCABULARY, "d_model": 48, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 3},
        dropout_rate=attention_dropout,  # there is one for everything
        initializer_factor=0.25,  # scores are not scaled, and `build` spreads them
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def whisper(**options: Any) -> Any:
    config = transformers.WhisperConfig(
        **PAIRED,
        num_mel_bins=8,
        max_source_positions=LENGTH,
        max_target_positions=64,
        **(NO_DROPOUT | options),
    )
    config.suppress_tokens = config.begin_suppress_tokens = None
    return transformers.WhisperForConditionalGeneration(config)


def pegasus_x(**options: Any) -> Any:
    """A decoder whose layers do not know that they are causal."""
    config = transformers.PegasusXConfig(
        **PAIRED, max_position_embeddings=64, block_size=8, num_global_tokens=2, **(NO_DROPOUT | options)
    )
    return transformers.PegasusXForConditionalGeneration(config)


def nllb_moe(**options: Any) -> Any:
    """Routers that look at the mask."""
    config = transformers.NllbMoeConfig(
        **PAIRED,
        **{"num_experts": 2, "encoder_sparse_step": 2, "decoder_sparse_step": 2, "moe_token_dropout": 0.0},
        **{"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "max_position_embeddings": 64},
        **(NO_DROPOUT | options),
    )
    return transformers.NllbMoeForConditionalGeneration(config)


LATENT: dict[str, Any] = {
    **SMALL,
    **{"num_attention_heads": 6, "head_dim": 8, "q_lora_rank": 16, "pad_token_id": 0},
    **{"n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32},
}


def glm_moe_dsa(**options: Any) -> Any:
    """Layers that choose the keys of each query."""
    config = transformers.GlmMoeDsaConfig(
        **LATENT,
        **{"num_key_value_heads": 6, "kv_lora_rank": 16, "n_group": 1, "topk_group": 1, "index_topk": 6},
        **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
        **options,
    )
    return transformers.GlmMoeDsaForCausalLM(config)


def deepseek_v4(**options: Any) -> Any:
    """Layers that add keys, and columns to the mask."""
    config = transformers.DeepseekV4Config(
        **LATENT,
        **{"num_key_value_heads": 1, "num_local_experts": 2, "sliding_window": WINDOW},
        layer_types=["sliding_attention", "compressed_sparse_attention"],
        **options,
    )
    return transformers.DeepseekV4ForCausalLM(config)


# transformers 4 does not have these, or computes their attention without asking for a function.
FIVE = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="no attention function in transformers 4"
)
DECODERS = [llama, mistral, gemma2, gpt_oss, llama4]
ENCODERS = [pytest.param(make, marks=FIVE) for make in (bert, modern_bert)]
ENCODER_DECODERS = [bart, pytest.param(t5, marks=FIVE), whisper]
MODELS = [*DECODERS, *ENCODERS, *ENCODER_DECODERS]
# Those that do something with masks themselves.
PARTICULAR = [pegasus_x, nllb_moe, *[pytest.param(make, marks=FIVE) for make in (glm_moe_dsa, deepseek_v4)]]


def model_name(make: Any) -> str:
    return make.__name__


def build(make: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    model = make(**options).eval()
    for parameter in model.parameters():  # spread: the default initialisation makes attention nearly uniform
        if parameter.ndim > 1:
            parameter.data *= 4
    return model


def use(model: Any, implementation: str) -> Any:
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    return model


def tokens(padding: str = "none") -> tuple[torch.Tensor, torch.Tensor | None]:
    """(input_ids, attention_mask or None)."""
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    if padding == "none":
        return ids, None
    mask = torch.ones_like(ids)
    for row, count in zip(mask, PADDING[padding], strict=True):
        row[slice(0, count) if count >= 0 else slice(count, None)] = 0
    return ids, mask


def sources(model: Any, padding: str = "none") -> dict[str, Any]:
    """What a model reads: tokens, or a spectrum, which has no padding; and what its decoder reads."""
    ids, mask = tokens(padding)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if isinstance(model, transformers.WhisperForConditionalGeneration):
        generator = torch.Generator().manual_seed(2)
        inputs = {"input_features": torch.randn(BATCH, 8, 2 * LENGTH, generator=generator)}
    if model.config.is_encoder_decoder:  # of another length than the sources
        inputs["decoder_input_ids"] = ids[:, 3:-2]
        inputs["decoder_attention_mask"] = None if mask is None else mask[:, 3:-2]
    return inputs


def examples(model: Any, padding: str = "none") -> dict[str, Any]:
    """What a model learns from: its sources, and labels where it is not padding that predicts them."""
    inputs = sources(model, padding)
    which = "decoder_{}" if model.config.is_encoder_decoder else "{}"
    labels, mask = inputs[which.format("input_ids")].clone(), inputs[which.format("attention_mask")]
    if mask is not None:
        labels[mask == 0] = -100
        labels[:, 1:][mask[:, :-1] == 0] = -100  # decoders predict the first token from what is left of it
    return inputs | {"labels": labels}
