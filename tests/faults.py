"""Faults of the kind that a change might bring, each a small edit of one source file.

plant_faults.py plants them. `old` must stand in the file exactly once: where the source has moved on,
test_faults.py says so.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    name: str
    what: str
    file: str
    old: str
    new: str
    tests: str  # the files of tests that are tried first: <name>.py with test_ before the last part
    tier: str = "avx512"  # built and tried, beside scalar

    def files(self) -> list[str]:
        """Of the tests that are tried first."""
        parts = (name.rpartition("/") for name in self.tests.split())
        return [f"tests/{folder}{slash}test_{stem}.py" for folder, slash, stem in parts]


PANEL = "csrc/algorithm/panel.h"
SCORES = "csrc/algorithm/score_tile.h"
SHIFT = "csrc/algorithm/shift.h"
TILES = "csrc/algorithm/tile_context.h"
ROWS = "csrc/algorithm/row_softmax.h"
VALUES = "csrc/algorithm/value_tile.h"
FINISH = "csrc/algorithm/finish.h"
FORWARD = "csrc/algorithm/forward.h"
MASKS = "csrc/isa/avx512/mask_bits.h"
DENSE = "csrc/algorithm/dense_block.h"
BLOCK = "csrc/algorithm/block.h"
PLAN = "csrc/algorithm/plan.h"
OPERANDS = "csrc/algorithm/operands.h"
MATH = "csrc/algorithm/math.h"
SCALAR_ROWS = "csrc/scalar/rows.h"
GRADIENT_TILE = "csrc/algorithm/gradient_tile.h"
DROPOUT = "csrc/dropout.h"
BACKWARD = "csrc/algorithm/backward.h"
BACKWARD_HEAD = "csrc/algorithm/backward_head.h"
BACKWARD_PLAN = "csrc/algorithm/backward_plan.h"
BIAS_GRADIENT = "csrc/algorithm/bias_gradient.h"
PROBLEM = "python/fastattn/problem.py"
OUTPUTS = "python/fastattn/outputs.py"
CACHE_UPDATE = "csrc/cache_update.cpp"
BYTES = "csrc/algorithm/bytes.h"
CACHE_PROBLEM = "python/fastattn/cache_problem.py"

FAULTS = (
    # what a row sees
    Fault(
        "causal-trim",
        "the causal rule hides the diagonal itself",
        PANEL,
        "position + p.window_right + 1",
        "position + p.window_right",
        "rules",
    ),
    Fault(
        "window-edge",
        "the window's left bound is one key short",
        PANEL,
        "position - p.window_left, start",
        "position - p.window_left + 1, start",
        "rules",
    ),
    Fault(
        "kv-length",
        "one key past a length is seen",
        OPERANDS,
        "min64(p.kv_lengths[batch], p.seqlen_k)",
        "min64(p.kv_lengths[batch] + 1, p.seqlen_k)",
        "rules",
    ),
    Fault(
        "scalar-window",
        "the scalar tier's right bound is one key short",
        SCALAR_ROWS,
        "key > r.position + p.window_right",
        "key >= r.position + p.window_right",
        "rules",
        "avx2",
    ),
    Fault(
        "tail-mask",
        "a tile's mask lets one key past the last through",
        SCORES,
        "V::less(key, last)",
        "V::less_equal(key, last)",
        "exactness",
    ),
    Fault(
        "row-tail-mask",
        "the same where there are few queries",
        ROWS,
        "V::less(keys, last)",
        "V::less_equal(keys, last)",
        "exactness",
    ),
    Fault(
        "mask-transpose",
        "squares of eight rows and keys of a mask are not transposed",
        MASKS,
        "transpose_bits(transpose_bytes(_mm512_load_si512(keys + 8 * group)))",
        "transpose_bytes(_mm512_load_si512(keys + 8 * group))",
        "rules",
    ),
    Fault(
        "shared-table",
        "every batch reads the first one's transposed mask",
        FORWARD,
        "batch % plan.dense_batches * plan.dense_spans",
        "0 * batch",
        "bitwise",
    ),
    Fault(
        "bias-hides-nothing",
        "a bias of -inf is added, but hides no value",
        DENSE,
        "visible[key] &= ~hidden",
        "visible[key] &= ~0U",
        "poison",
    ),
    Fault(
        "whole-tile",
        "a tile counts as seen by all once it is seen by the row that sees most",
        BLOCK,
        "key + E::kKeys <= panel.last_min",
        "key + E::kKeys <= panel.last_max",
        "exactness",
    ),
    # where things lie
    Fault(
        "value-stride",
        "the batch and head strides of keys and values are swapped",
        OPERANDS,
        "return batch * strides[0] + head * strides[1] + key * strides[2];",
        "return batch * strides[1] + head * strides[0] + key * strides[2];",
        "exactness",
    ),
    Fault(
        "out-stride",
        "the output's batch stride is the heads'",
        FINISH,
        "batch * p.out_strides[0]",
        "batch * p.out_strides[1]",
        "exactness",
    ),
    Fault(
        "bias-stride",
        "bias is read with the strides of heads and rows swapped",
        PANEL,
        "head * p.bias_strides[1] + row * p.bias_strides[2]",
        "head * p.bias_strides[2] + row * p.bias_strides[1]",
        "rules",
    ),
    Fault(
        "bias-shared",
        "a panel takes all rows' bias for one row's",
        PANEL,
        "panel.bias_row[lane] == panel.bias_row[0]",
        "panel.bias_row[lane] != nullptr",
        "rules",
    ),
    Fault(
        "row-after-head",
        "rows of the next head begin one late",
        PANEL,
        "++row == p.seqlen_q",
        "++row > p.seqlen_q",
        "bitwise",
    ),
    Fault(
        "plain-offset",
        "plain calls put the causal diagonal at the first key",
        "csrc/bindings/plain_call.cpp",
        "c.params.seqlen_k - c.params.seqlen_q",
        "0",
        "plain",
    ),
    Fault(
        "plain-lse-gradient",
        "plain calls leave the gradient of the log-sum-exp out",
        "csrc/bindings/plain_call.cpp",
        "b.grad_lse = grad_lse.data;",
        "b.grad_lse = nullptr;",
        "plain",
    ),
    Fault(
        "head-mapping",
        "query heads are dealt out to key heads in turn",
        PANEL,
        "range.kv_head * group + begin / p.seqlen_q",
        "range.kv_head + begin / p.seqlen_q * p.kv_heads",
        "bitwise",
    ),
    Fault(
        "reads-past-values",
        "the last columns of values are read by whole vectors",
        VALUES,
        "kPartial && v == kVectors - 1",
        "false && kPartial && v == kVectors - 1",
        "views fences fuzz",
    ),
    Fault(
        "writes-past-out",
        "the last columns of the output are written by whole vectors",
        FINISH,
        "V::store_partial(out + d, V::mul(V::load(row + d), factor), static_cast<int>(count - d))",
        "V::store(out + d, V::mul(V::load(row + d), factor))",
        "views",
    ),
    Fault(
        "shared-scratch",
        "all threads have the first one's scratch",
        FORWARD,
        "call.scratch + thread * plan.thread_bytes",
        "call.scratch + 0 * thread * plan.thread_bytes",
        "bitwise",
    ),
    # the softmax
    Fault(
        "sum-not-rescaled",
        "the sum keeps its scale when the maximum rises",
        SHIFT,
        "panel.sum[lane] *= scales[lane];",
        "",
        "exactness",
    ),
    Fault(
        "output-not-rescaled",
        "the output keeps its scale when the maximum rises",
        SHIFT,
        "output[d] *= scale;",
        "output[d] *= 1;",
        "exactness",
    ),
    Fault(
        "block-not-rescaled",
        "the probabilities of the running block keep theirs",
        SHIFT,
        "V::store(prob, E::Product::scale_probabilities(V::load(prob), scale))",
        "V::store(prob, V::load(prob))",
        "exactness",
    ),
    Fault(
        "maximum-not-followed",
        "the maximum is followed only once it has risen by 4096, to base 2, not by 8",
        SHIFT,
        "panel.limit[lane] = level + rise",
        "panel.limit[lane] = level + 512 * rise",
        "exactness",
    ),
    Fault(
        "neighbours-move-together",
        "a row whose maximum rose at all follows it when a neighbour does",
        SHIFT,
        "V::less(V::load(panel.limit + at), V::load(peak + at))",
        "V::less(V::sub(V::load(panel.limit + at), V::set1(rise)), V::load(peak + at))",
        "poison",
    ),
    Fault(
        "hidden-nan",
        "values are not searched for NaN",
        BLOCK,
        "extent.poisoned |= finite.tiles[tile] == Tile::nonfinite;",
        "extent.poisoned |= finite.tiles[tile] == Tile::unknown;",
        "poison",
    ),
    Fault(
        "nan-reaches-all",
        "a value of NaN is added to the rows that do not see it, too",
        VALUES,
        "if (!sees(lane, key)) {",
        "if (false && !sees(lane, key)) {",
        "poison",
    ),
    Fault(
        "lse-base",
        "the maximum enters lse to base 2",
        TILES,
        "natural ? 1.0 : kLn2",
        "natural ? 1.0 : 1.0",
        "exactness",
    ),
    Fault(
        "sink-in-sum",
        "the sink takes no share of the weight",
        FINISH,
        "1 / (sum + ::exp(sink - shift))",
        "1 / sum",
        "exactness",
    ),
    Fault(
        "sink-in-lse",
        "the sink does not enter lse",
        FINISH,
        "high + ::log(::exp(own - high) + ::exp(sink - high))",
        "high == sink ? own : own",
        "exactness",
    ),
    Fault(
        "exp2-coefficient",
        "a coefficient of exp2 is off by one in its sixth decimal",
        MATH,
        "0.055858385F",
        "0.055859385F",
        "exp2 exactness",
    ),
    Fault(
        "exp2-floor",
        "exp2 does not stop at the smallest power",
        MATH,
        "V::max(V::set1(V::kZeroPower), x)",
        "x",
        "exactness",
    ),
    # what is added to scores
    Fault(
        "softcap-skipped",
        "tiles of scores are not capped",
        SCORES,
        "s[r][v] = softcap_near<V>(scale_score<E>(rules, s[r][v]), inverse);",
        "s[r][v] = scale_score<E>(rules, s[r][v]);",
        "exactness",
    ),
    Fault(
        "alibi-sign",
        "ALiBi is added",
        SCORES,
        "const auto falling = V::sub(V::zero(), V::load(panel.slope",
        "const auto falling = V::add(V::zero(), V::load(panel.slope",
        "exactness",
    ),
    Fault(
        "alibi-beyond",
        "distances from positions past the keys count from the nearest key",
        PANEL,
        "panel.beyond[lane] = -slope * panel.overshoot(lane);",
        "",
        "rules extremes",
    ),
    Fault(
        "weights-left-over",
        "hidden weights keep what the scratch held",
        FORWARD,
        "memset(context.probs, 0, sizeof(Scalar) * E::kPlanes * kPlaneSize<E>);",
        "",
        "rules exactness",
    ),
    # products of 16-bit numbers
    Fault(
        "negative-scale",
        "a product that does not scale its query forgets the sign",
        PLAN,
        "(factor < 0 ? -1.0 : 1.0)",
        "1.0",
        "exactness",
        "avx512_bf16",
    ),
    Fault(
        "odd-key",
        "the last of an odd number of keys has no pair and is dropped",
        VALUES,
        "(seen.last - seen.first + E::kDepth - 1) / E::kDepth",
        "(seen.last - seen.first) / E::kDepth",
        "exactness",
        "avx512_bf16",
    ),
    Fault(
        "seventeenth-row",
        "a matrix unit's second tile of queries needs two rows to count",
        BLOCK,
        "context.panel.live > E::kWidth;",
        "context.panel.live > E::kWidth + 1;",
        "exactness",
        "amx_bf16",
    ),
    # Python
    Fault(
        "default-offset",
        "without an offset the diagonal starts at the first key",
        PROBLEM,
        "0 if top_left else seqlen_k - seqlen_q",
        "0",
        "problem rules",
    ),
    Fault(
        "overlap-unseen",
        "an output over the values is taken",
        OUTPUTS,
        '("query", "key", "value", "mask", "bias", "key_scale", "value_scale")',
        '("query", "key", "mask", "bias", "key_scale", "value_scale")',
        "errors",
    ),
    # caches
    Fault(
        "cache-turn",
        "new keys turn the other way",
        CACHE_UPDATE,
        "row[i * step] = first * c - second * s;",
        "row[i * step] = first * c + second * s;",
        "kvcache",
    ),
    Fault(
        "cache-largest",
        "the last column alone fixes the scale of a quantised row",
        CACHE_UPDATE,
        "largest = magnitude > largest ? magnitude : largest;",
        "largest = magnitude;",
        "kvcache",
    ),
    Fault(
        "cache-tie",
        "a tie between two float8 goes to the larger one",
        BYTES,
        "magnitude + 0x7ffffU + ((magnitude >> 20) & 1U)",
        "magnitude + 0x80000U",
        "float8",
    ),
    Fault(
        "cache-position",
        "queries are turned as if they stood where the new keys do",
        CACHE_PROBLEM,
        "            lengths - seqlen_q,\n            int(bool(causal)",
        "            start,\n            int(bool(causal)",
        "kvcache",
    ),
    Fault(
        "cache-ring",
        "positions of a ring that is not full yet are moved on by one round",
        CACHE_PROBLEM,
        "lengths - begins * (begins > 0)",
        "lengths - begins",
        "kvcache",
    ),
    Fault(
        "cache-place",
        "two new rows in one place are taken",
        CACHE_PROBLEM,
        "    if same.size:",
        "    if same.size > 99:",
        "kvcache_errors",
    ),
    # the way back
    Fault(
        "gradient-mean",
        "the mean of a row's gradients is not taken away",
        GRADIENT_TILE,
        "V::mul(prob, V::sub(grad, delta))",
        "V::mul(prob, grad)",
        "backward",
    ),
    Fault(
        "gradient-hidden",
        "a hidden pair is as likely as its normaliser says",
        GRADIENT_TILE,
        "prob = V::select(V::less_equal(s[r][v], lowest), V::zero(), prob);",
        "prob = V::select(V::less(s[r][v], lowest), V::zero(), prob);",
        "backward",
    ),
    Fault(
        "key-group-lost",
        "dQ leaves out what the second group of keys gives",
        BACKWARD,
        "for (int64_t group = 1; group < plan.key_groups; ++group) {",
        "for (int64_t group = 2; group < plan.key_groups; ++group) {",
        "backward",
    ),
    Fault(
        "bias-gradient-sum",
        "one row of a bias gets the gradient of its first lane",
        BIAS_GRADIENT,
        "for (int i = lane; i < end; ++i) {",
        "for (int i = lane; i < lane + 1; ++i) {",
        "backward",
    ),
    Fault(
        "gradient-softcap",
        "gradients pass a cap as if it were not there",
        GRADIENT_TILE,
        "V::sub(V::set1(1), V::mul(ratio, ratio))",
        "V::set1(1)",
        "backward",
    ),
    Fault(
        "gradient-dropout",
        "dV gets the probabilities as they were before dropout",
        GRADIENT_TILE,
        "V::store(probs + at, V::mul(prob, V::load(context.kept + at)));",
        "V::store(probs + at, prob);",
        "backward",
    ),
    Fault(
        "key-pairs",
        "the two keys of a pair change places on the way to dQ",
        GRADIENT_TILE,
        "{rows[r][v], rows[r + 1][v]}",
        "{rows[r + 1][v], rows[r][v]}",
        "backward",
        "avx512_bf16",
    ),
    Fault(
        "gradient-lse",
        "the gradient of lse is added to a row's mean, not taken from it",
        BACKWARD_HEAD,
        "sum -= b.grad_lse != nullptr",
        "sum += b.grad_lse != nullptr",
        "backward",
    ),
    Fault(
        "first-head",
        "queries of a group are those of its first head, where they are not copied",
        BACKWARD_HEAD,
        "const int64_t head = kv_head * (p().query_heads / p().kv_heads) + span;",
        "const int64_t head = kv_head * (p().query_heads / p().kv_heads);",
        "backward",
    ),
    Fault(
        "gradient-left-over",
        "dK keeps what the block before it left",
        BACKWARD,
        "memset(grad_key, 0, sizeof(Scalar) * static_cast<size_t>(rows * plan.head_dim));",
        "",
        "backward",
    ),
    Fault(
        "gradient-nan",
        "rows are not searched for NaN",
        BACKWARD,
        "if (search_bytes(p) > 0) {",
        "if (search_bytes(p) < 0) {",
        "backward",
    ),
    Fault(
        "groups-by-threads",
        "keys fall into as many groups as there are threads",
        BACKWARD_PLAN,
        "clamp64(p.seqlen_k / kKeysOfGroup, 1, kMaxKeyGroups)",
        "clamp64(p.num_threads, 1, kMaxKeyGroups)",
        "backward",
    ),
    Fault(
        "philox-key",
        "the key of dropout's random numbers stays the same from round to round",
        DROPOUT,
        "low += 0x9E3779B9;",
        "low += 0;",
        "backward",
    ),
)
