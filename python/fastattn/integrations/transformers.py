"""Attention of Hugging Face ``transformers`` models, computed by fastattn.

>>> from transformers import AutoModelForCausalLM
>>> from fastattn.integrations.transformers import register
>>> register()
>>> model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fastattn")

Two functions are registered under one name: the attention itself, and the maker of its mask
(`fastattn.integrations.transformers_masks`), which keeps a mask as a rule where a rule says it all.
"""

from __future__ import annotations

from typing import Any

import torch

from fastattn.functional import attention
from fastattn.integrations.torch_sdpa import as_autocast_would
from fastattn.varlen import attention_varlen

try:
    from transformers import AttentionInterface, AttentionMaskInterface

    from fastattn.integrations.transformers_cache import PagedCache, PagedStates
    from fastattn.integrations.transformers_masks import RuleMask, make_mask
except ImportError as error:
    raise ImportError(
        "fastattn.integrations.transformers needs transformers >= 4.57: pip install 'fastattn[hf]'"
    ) from error

__all__ = ["PagedCache", "RuleMask", "attention_forward", "make_mask", "register"]

# Arguments that models hand to every attention function and that change nothing here: bookkeeping of the
# caller, or (deterministic) a promise that always holds.
_HARMLESS = frozenset(
    {
        "cache_position",
        "deterministic",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "past_key_value",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "seq_idx",
        "use_cache",
    }
)
# Sequences packed into one row. A mask, where there is one, already keeps them apart; else the first two do.
_PACKED = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"})
_KNOWN = _HARMLESS | _PACKED
# Arguments of `fastattn.attention` that `fastattn.attention_with_kvcache` has, too.
_OF_CACHES = frozenset({"scale", "softcap", "sinks", "causal", "window"})
_PADDING = frozenset({"mask", "kv_starts", "kv_lengths"})  # how a rule says that keys are padding


def register(name: str = "fastattn") -> None:
    """Make ``attn_implementation=name`` known to transformers.

    Parameters
    ----------
    name : str
        The `attn_implementation` of ``from_pretrained`` and ``set_attn_implementation``.

    Notes
    -----
    Works with transformers 4.57 and 5. Registering again replaces the earlier registration.
    """
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, make_mask)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    head_mask: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention with the signature that transformers calls.

    Parameters
    ----------
    module : torch.nn.Module
        The calling layer; its ``is_causal``, if it has one, counts where no mask and no `is_causal` is given.
    query : torch.Tensor
        (B, Hq, Lq, D).
    key, value : torch.Tensor
        (B, Hkv, Lk, D) and (B, Hkv, Lk, Dv); Hq is a multiple of Hkv and nothing is repeated.
    attention_mask : torch.Tensor, optional
        What `make_mask` made, a bool mask (True = attend) or a float one (added to the scores), broadcastable
        to (B, Hq, Lq, Lk). It has the last word: the causal rule and `sliding_window` count only without it.
    scaling : float, optional
        Factor on the scores; 1 / sqrt(D) by default.
    dropout : float
        Share of the probabilities that are dropped while `module` is training.
    is_causal : bool, optional
        Overrides ``module.is_causal``. The last query is aligned with the last key.
    sliding_window : int, optional
        A query sees this many keys, its own included (on each side where attention is not causal).
    softcap : float, optional
        Scores become ``softcap * tanh(scores / softcap)``.
    s_aux : torch.Tensor, optional
        (Hq,) attention sinks: one more logit per head in the normaliser.
    position_bias : torch.Tensor, optional
        Added to the scores, as in T5.
    head_mask : torch.Tensor, optional
        (Hq,), (1, Hq, 1, 1) or (B, Hq, 1, 1) factors on the weights of each head; transformers 4 passes them.
    indices : torch.Tensor, optional
        (B, Lq, n) keys, the only ones that a query may attend to: DeepSeek's sparse attention.
    output_attentions : bool, optional
        Whether to return the weights, after dropout; that of ``module.config`` by default.
    **kwargs : Any
        Bookkeeping that transformers passes along. `cu_seq_lens_q` and `cu_seq_lens_k`, which say where the
        sequences of a batch of 1 start among its rows, count where there is no mask.

    Returns
    -------
    out : torch.Tensor
        (B, Lq, Hq, Dv), contiguous.
    weights : torch.Tensor or None
        (B, Hq, Lq, Lk) with `output_attentions`.

    Raises
    ------
    TypeError
        For an argument, not None, whose meaning is unknown here.
    ValueError
        For a mask that does not have four axes.

    Notes
    -----
    Gradients reach query, key, value, float masks, `s_aux`, `position_bias` and `head_mask`, from both
    results. Dropout draws from torch's default generator, whose state checkpointing keeps.
    """
    _refuse_unknown(kwargs)
    if query.shape[0] == 1 != key.shape[0]:  # learned queries, shared by the batch
        query = query.expand(key.shape[0], -1, -1, -1)
    query, key, value = as_autocast_would(query, key, value)  # rotary positions leave query and key float32

    arguments: dict[str, Any] = {"scale": scaling, "softcap": softcap or 0.0, "sinks": s_aux}
    if attention_mask is None:
        arguments |= _causal_arguments(module, is_causal, sliding_window)
    else:
        arguments |= _mask_arguments(attention_mask, query, key.shape[2])
    if position_bias is not None:
        bias = position_bias[..., : key.shape[2]]
        arguments["bias"] = _as_bias(bias + arguments["bias"] if "bias" in arguments else bias, query)
    if indices is not None:
        chosen = _chosen(indices, key.shape[2])
        arguments["mask"] = chosen & arguments["mask"] if "mask" in arguments else chosen

    packed: dict[str, Any] = {}
    if not _PACKED.isdisjoint(kwargs):
        packed = {name: given for name, given in kwargs.items() if name in _PACKED and given is not None}
    if packed and attention_mask is None:
        others = position_bias, indices, head_mask, output_attentions or None
        if query.shape[0] != 1 or any(other is not None for other in others):
            raise TypeError(
                f"fastattn takes packed sequences ({', '.join(sorted(packed))}) without a mask in a batch of "
                "1, and without position_bias, indices, head_mask and output_attentions"
            )
        return _attend_packed(query, key, value, packed, arguments, dropout if module.training else 0.0), None
    if output_attentions is None:
        output_attentions = _weights_are_wanted(module)
    if isinstance(key, PagedStates) and isinstance(value, PagedStates):
        drops = dropout and module.training
        plain = position_bias is indices is head_mask is None and not (output_attentions or drops)
        out = _over_pages(query, key, attention_mask, arguments) if plain else None
        if out is not None:
            return out, None
        key, value = key.dense(), value.dense()
    result = attention(
        *(rows.transpose(1, 2) for rows in (query, key, value)),
        layout="bshd",
        dropout_p=float(dropout) if module.training else 0.0,
        return_weights=bool(output_attentions),
        **arguments,
    )
    out, weights = result if output_attentions else (result, None)
    if head_mask is not None:  # a factor for all of a row, which its output has as well
        factors = head_mask.to(out.dtype).reshape(-1, query.shape[1], 1, 1)
        out = out * factors.transpose(1, 2)
        weights = None if weights is None else weights * factors
    return out, weights


def _refuse_unknown(kwargs: dict[str, Any]) -> None:
    """Raise for every argument that would be ignored although it changes what is computed."""
    if kwargs.keys() <= _KNOWN:
        return
    given = {name for name, argument in kwargs.items() if argument is not None} - _KNOWN
    if given:
        raise TypeError(
            f"fastattn does not know what these attention arguments mean: {', '.join(sorted(given))}"
        )


def _weights_are_wanted(module: torch.nn.Module) -> bool:
    """`output_attentions` of the module's config, past the lookup of names in Python that configs have."""
    config = getattr(module, "config", None)
    if torch.compiler.is_compiling():  # which cannot follow the way past it, and has no need to
        return bool(getattr(config, "output_attentions", False))
    try:
        return bool(object.__getattribute__(config, "__dict__")["_output_attentions"])
    except (AttributeError, KeyError):  # no config, or another's
        return bool(getattr(config, "output_attentions", False))


def _attend_packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: dict[str, Any],
    arguments: dict[str, Any],
    dropout: float,
) -> torch.Tensor:
    """Attention within the sequences of a batch of 1."""
    missing = {"cu_seq_lens_q", "cu_seq_lens_k"} - packed.keys()
    if missing:
        raise TypeError(f"fastattn needs {' and '.join(sorted(missing))} to tell packed sequences apart")
    query, key, value = (rows[0].transpose(0, 1) for rows in (query, key, value))
    out: torch.Tensor = attention_varlen(
        query,
        key,
        value,
        packed["cu_seq_lens_q"],
        packed["cu_seq_lens_k"],
        max_seqlen_q=packed.get("max_length_q"),
        max_seqlen_k=packed.get("max_length_k"),
        dropout_p=float(dropout),
        **arguments,
    )
    return out[None]


def _causal_arguments(
    module: torch.nn.Module, is_causal: bool | None, sliding_window: int | None
) -> dict[str, Any]:
    """Return what a call without a mask says as arguments of `fastattn.attention`."""
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    arguments: dict[str, Any] = {"causal": bool(causal)}
    if sliding_window is not None:
        arguments["window"] = (sliding_window - 1, sliding_window - 1)
    return arguments


def _mask_arguments(mask: torch.Tensor, query: torch.Tensor, seqlen_k: int) -> dict[str, Any]:
    """Return `mask` as arguments of `fastattn.attention`."""
    if isinstance(mask, RuleMask):
        if mask.rule is not None:
            return mask.rule.arguments()
        mask = mask.dense()
    if mask.ndim != 4:
        raise ValueError(
            f"attention_mask: expected four axes, (B, 1 or Hq, Lq, Lk), got shape {tuple(mask.shape)}"
        )
    mask = mask[..., :seqlen_k]  # transformers 4 sizes masks for a whole static cache
    if mask.dtype == torch.bool:
        return {"mask": mask}
    return {"bias": _as_bias(mask, query)}


def _over_pages(
    query: torch.Tensor, key: PagedStates, mask: torch.Tensor | None, arguments: dict[str, Any]
) -> torch.Tensor | None:
    """Attention to keys and values where they lie, or None where the call is more than pages know of."""
    rule = mask.rule if isinstance(mask, RuleMask) else None
    if rule is not None and rule.begins is not None:  # padding on the left, for which there are no pages
        arguments = {name: given for name, given in arguments.items() if name not in _PADDING}
    if not arguments.keys() <= _OF_CACHES:
        return None
    return key.appended.attend(query, None if rule is None else rule.begins, arguments)


def _chosen(indices: torch.Tensor, seqlen_k: int) -> torch.Tensor:
    """`indices` of keys as a mask, (B, 1, Lq, Lk)."""
    mask = torch.zeros(*indices.shape[:2], seqlen_k, dtype=torch.bool, device=indices.device)
    return mask.scatter_(-1, indices.long(), True).unsqueeze(1)


def _as_bias(bias: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """`bias` in a dtype that the operator takes beside `query`."""
    return bias if bias.dtype in (query.dtype, torch.float32) else bias.to(torch.float32)
