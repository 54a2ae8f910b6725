"""FlexAttention, compiled: rules are functions of positions, and blocks that they hide are skipped."""

from __future__ import annotations

from typing import Any

from bench.peers.base import OFFSET_CAUSAL, Call, Peer, Run, register


@register
class Flex(Peer):
    name = "flex"
    does = frozenset(
        {"causal", OFFSET_CAUSAL, "masks", "biases", "windows", "softcap", "ALiBi", "grouped heads"}
    )

    def load(self, threads: int) -> str:
        import torch

        torch.set_num_threads(threads)
        return f"torch {torch.__version__}"

    def prepare(self, call: Call) -> Run:
        import torch
        from torch.nn.attention.flex_attention import flex_attention

        torch._dynamo.reset()  # each row compiles anew, and none counts against the limit of the next
        attention = torch.compile(flex_attention, dynamic=False)
        options = {
            "score_mod": _score_mod(call),
            "block_mask": _block_mask(call),
            "enable_gqa": call.case.query_heads != call.case.kv_heads,
        }
        query, key, value = call.query, call.key, call.value

        def run() -> Any:
            with torch.no_grad():
                return attention(query, key, value, **options)

        return run


def _score_mod(call: Call) -> Any:
    """What changes scores that are seen: a cap, a bias or ALiBi (a case has one of them)."""
    import torch

    case, bias, slopes = call.case, call.options.get("bias"), call.options.get("alibi_slopes")
    offset = case.seqlen_k - case.seqlen_q
    if case.softcap:
        return lambda score, b, h, i, j: case.softcap * torch.tanh(score / case.softcap)
    if bias is not None:
        return lambda score, b, h, i, j: score + bias[0, 0, i, j]
    if slopes is not None:
        return lambda score, b, h, i, j: score - slopes[h] * (i + offset - j).abs()
    return None


def _block_mask(call: Call) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    case, mask = call.case, call.options.get("mask")
    offset = case.seqlen_k - case.seqlen_q
    left, right = case.window or (None, None)
    rules: list[Any] = []
    if call.causal:
        rules.append(lambda b, h, i, j: j <= i + offset)
    if left is not None:
        rules.append(lambda b, h, i, j: j >= i + offset - left)
    if right is not None:
        rules.append(lambda b, h, i, j: j <= i + offset + right)
    if mask is not None:
        rules.append(lambda b, h, i, j: mask[0, 0, i, j])
    if not rules:
        return None

    def seen(b: Any, h: Any, i: Any, j: Any) -> Any:
        result = rules[0](b, h, i, j)
        for rule in rules[1:]:
            result = result & rule(b, h, i, j)
        return result

    return create_block_mask(seen, None, None, case.seqlen_q, case.seqlen_k, device="cpu")
