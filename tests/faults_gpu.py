"""Faults of the portable kernels for GPUs, which their interpreted tests have to notice."""

from __future__ import annotations

from faults import Fault


def _fault(name: str, what: str, file: str, old: str, new: str, tests: str) -> Fault:
    named = " ".join(f"gpu/interpreted/{test}" for test in tests.split())
    return Fault(name, what, f"python/fastattn/gpu/{file}.py", old, new, named)


GPU_FAULTS = (
    _fault(
        "gpu-causal",
        "the right bound hides the last key that a query may see",
        "tile",
        "keys <= clamped(rows, offset, rules.right, -1, count - 1)",
        "keys < clamped(rows, offset, rules.right, -1, count - 1)",
        "forward",
    ),
    _fault(
        "gpu-whole-tile",
        "a tile counts as seen by all once it is seen by the row that sees most",
        "tile",
        "inner_end = clamped(first, offset + 1, right, 0, count)",
        "inner_end = clamped(last, offset + 1, right, 0, count)",
        "forward",
    ),
    _fault(
        "gpu-length",
        "one key past a length is seen",
        "tile",
        "tl.minimum(tl.maximum(tl.load(lengths + batch), 0), most)",
        "tl.minimum(tl.maximum(tl.load(lengths + batch) + 1, 0), most)",
        "forward",
    ),
    _fault(
        "gpu-start",
        "the first key behind the padding on the left is hidden",
        "tile",
        "seen &= keys >= tl.load(rules.starts + batch)",
        "seen &= keys > tl.load(rules.starts + batch)",
        "padding",
    ),
    _fault(
        "gpu-documents",
        "the last span of keys that may hold a document's ids is passed by",
        "segments",
        "tl.minimum(end, far)",
        "tl.minimum(end, far - SPAN_)",
        "padding",
    ),
    _fault(
        "gpu-schedule",
        "the first block of every sequence but the first is left out",
        "schedule",
        "blocks.gather(0, sequence) - 1 - rank",
        "blocks.gather(0, sequence) - 1 - rank + (sequence > 0)",
        "ragged",
    ),
    _fault(
        "gpu-scales",
        "values are multiplied by the scales of keys",
        "forward",
        "load_scales(rules.value_scales,",
        "load_scales(rules.key_scales,",
        "caches",
    ),
    _fault(
        "gpu-ties",
        "halves between two codes are always rounded up",
        "append",
        "((magnitude >> DROPPED) & 1)",
        "1",
        "caches",
    ),
    _fault(
        "gpu-words",
        "the words of dropout's random numbers change places",
        "tile",
        "tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))",
        "tl.interleave(tl.interleave(w0, w1), tl.interleave(w2, w3))",
        "forward",
    ),
    _fault(
        "gpu-far-slope",
        "ALiBi measures from the last key where a query stands on an earlier one",
        "tile",
        "apart = tl.abs(nearest(rows, offset, count) - keys).to(tl.float32)",
        "apart = tl.abs(count - 1 - keys).to(tl.float32)",
        "forward",
    ),
    _fault(
        "gpu-not-rescaled",
        "the output keeps its scale when the maximum rises",
        "forward",
        "acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)",
        "acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)",
        "forward",
    ),
    _fault(
        "gpu-lowest",
        "scores are brought to base 2 before the maximum is taken from them",
        "forward",
        "p = tl.exp2((scores - reference[:, None]) * factor)",
        "p = tl.exp2(scores * factor - (reference * factor)[:, None])",
        "forward",
    ),
    _fault(
        "gpu-sink",
        "the sink takes no share of the weight",
        "forward",
        "return highest, shrink, tl.exp2((sink - reference) * LOG2E)",
        "return highest, shrink, 0.0",
        "forward",
    ),
    _fault(
        "gpu-chunk-end",
        "the last tile of every chunk of keys is left out",
        "decode",
        "low, high = chunk * CHUNK, chunk * CHUNK + CHUNK",
        "low, high = chunk * CHUNK, chunk * CHUNK + CHUNK - BLOCK_N",
        "decode",
    ),
    _fault(
        "gpu-packed-head",
        "rows that share keys are dealt to the group's heads in turn of queries",
        "decode",
        "head = kv_head * GROUP + packed % GROUP",
        "head = kv_head * GROUP + packed // GROUP % GROUP",
        "decode",
    ),
    _fault(
        "gpu-gradient-mean",
        "the mean of a row's gradients is not taken away",
        "score_gradient",
        "grads = p * (weight_grads - delta)",
        "grads = p * weight_grads",
        "backward_kernels",
    ),
    _fault(
        "gpu-gradient-softcap",
        "gradients pass a cap as if it were not there",
        "score_gradient",
        "grads *= 1 - ratio * ratio",
        "grads *= 1",
        "backward_kernels",
    ),
    _fault(
        "gpu-gradient-lse",
        "the gradient of lse is added to a row's mean, not taken from it",
        "row_terms",
        "delta -= tl.load(grad_lse + at, mask=inside, other=0.0)",
        "delta += tl.load(grad_lse + at, mask=inside, other=0.0)",
        "backward_kernels",
    ),
)
