"""Sequences behind one another: the bits of each alone, the oracle's numbers, and what callers get wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

import bounds
import fastattn as fa
import fastattn.torch
from bounds import as_float64
from fastattn import reference
from kernels import KERNELS, Kernel, assert_same_bits
from shapes import convert

# Lengths of queries and of keys: few queries and many, chunks of keys, key groups, nothing at all.
BATCHES = {
    "none": [],
    "one": [(40, 70)],
    "empty ones": [(0, 0), (3, 0), (0, 9), (5, 5), (0, 0)],
    "short and long": [(1, 1), (70, 70), (1, 300), (17, 17), (0, 40), (130, 130), (33, 9), (3, 500), (2, 2)],
    "a key group or more": [(40, 40), (150, 1100), (9, 9), (70, 600)],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "top left, window": {"causal": "top_left", "window": (20, None)},
    "all": {"causal": True, "window": (90, None), "softcap": 3.0, "scale": 0.3, "slopes": 1, "sinks": True},
    "slopes of each": {"slopes": 2},
}
batches = pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)


class Ragged:
    """A call: tensors, where their sequences lie, and options."""

    def __init__(
        self,
        lengths: list[tuple[int, int]],
        dtype: str,
        *,
        heads: int = 4,
        kv_heads: int = 2,
        dim: int = 24,
        slopes: int = 0,
        sinks: bool = False,
        **options: Any,
    ) -> None:
        rng = np.random.default_rng(len(lengths))
        self.lengths = lengths
        self.cu_seqlens = [[0, *np.cumsum([pair[at] for pair in lengths]).tolist()] for at in (0, 1)]
        rows, keys = (starts[-1] for starts in self.cu_seqlens)
        shapes = [
            (rows, heads, dim),
            (keys, kv_heads, dim),
            (keys, kv_heads, dim + 9),
            (rows, heads, dim + 9),
        ]
        *self.arrays, self.grad_out = (
            convert(rng.standard_normal(shape), dtype, "torch") for shape in shapes
        )
        self.grad_lse = torch.randn(heads, rows, dtype=torch.float64 if dtype == "float64" else torch.float32)
        self.options = options
        if slopes:
            shape = (heads,) if slopes == 1 else (len(lengths), heads)
            self.options["alibi_slopes"] = torch.from_numpy(rng.random(shape))
        if sinks:
            self.options["sinks"] = torch.from_numpy(rng.standard_normal(heads))

    def run(self, *tensors: torch.Tensor, **changes: Any) -> Any:
        return fa.attention_varlen(
            *(tensors or self.arrays), *self.cu_seqlens, **self.options, return_lse=True, **changes
        )

    def gradients(self, out: torch.Tensor, lse: torch.Tensor, leaves: Any, rows: Any = slice(None)) -> Any:
        grad_lse = torch.where(lse.isinf(), 0, self.grad_lse[:, rows].reshape(lse.shape))
        return torch.autograd.grad((out, lse), leaves, (self.grad_out[rows].reshape(out.shape), grad_lse))

    def alone(self) -> Any:
        """Of each sequence: its rows, its keys, its tensors with a batch axis, and its options."""
        for s, (start, key_start) in enumerate(
            zip(*(starts[:-1] for starts in self.cu_seqlens), strict=True)
        ):
            rows, keys = (
                slice(at, at + n) for at, n in zip((start, key_start), self.lengths[s], strict=True)
            )
            own = dict(self.options)
            if "alibi_slopes" in own and own["alibi_slopes"].ndim == 2:
                own["alibi_slopes"] = own["alibi_slopes"][s]
            parts = [x[at][None] for x, at in zip(self.arrays, (rows, keys, keys), strict=True)]
            yield rows, keys, parts, own


@batches
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_bits_of_each_alone(
    kernel: Kernel, lengths: list[tuple[int, int]], options: dict[str, Any]
) -> None:
    if kernel.isa == "scalar" and len(lengths) > 5:
        lengths = lengths[:5]
    call = Ragged(lengths, kernel.dtype, **options)
    leaves = [x.clone().requires_grad_() for x in call.arrays]
    out, lse = call.run(*leaves)
    grads = call.gradients(out, lse, leaves) if lengths else ()
    for rows, keys, parts, own in call.alone():
        parts = [x.clone().requires_grad_() for x in parts]
        alone, own_lse = fa.attention(*parts, layout="bshd", return_lse=True, **own)
        assert_same_bits(
            (out[rows].detach(), lse[:, rows].detach()), (alone[0].detach(), own_lse[0].detach())
        )
        own_grads = call.gradients(alone, own_lse, parts, rows)
        for grad, one, at in zip(grads, own_grads, (rows, keys, keys), strict=True):
            assert_same_bits(grad[at], one[0])


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_the_oracle(kernel: Kernel, dropout_p: float) -> None:
    """Dropout counts the heads of a sequence as those of a batch of as many."""
    call = Ragged(
        BATCHES["short and long"], kernel.dtype, dropout_p=dropout_p, dropout_seed=3, **OPTIONS["all"]
    )
    out, lse = (as_float64(x) for x in call.run())
    arrays = [x.float().numpy() if x.dtype == torch.bfloat16 else x.numpy() for x in call.arrays]
    batch = len(call.lengths)
    for s, (rows, keys, _, own) in enumerate(call.alone()):
        own = {name: x.numpy() if isinstance(x, torch.Tensor) else x for name, x in own.items()}
        tensors = [x[at].swapaxes(0, 1) for x, at in zip(arrays, (rows, keys, keys), strict=True)]
        everyone = [np.broadcast_to(x, (batch, *x.shape)) for x in tensors]
        expected = bounds.expect(*everyone, **own)
        expected = bounds.Expected(*(x[s : s + 1] for x in expected))
        error = abs(out[rows].swapaxes(0, 1) - expected.out[0])
        bounds.assert_within(error, bounds.allowed(kernel, expected, sharp=True)[0] / (1 - dropout_p))
        allowed = bounds.allowed_lse(kernel, expected, sharp=True)
        bounds.assert_lse_within(lse[:, rows][None], expected, allowed)


def test_dropout_of_a_padded_batch() -> None:
    """The same weights fall out, on the way there and back."""
    call = Ragged([(20, 20), (7, 7), (13, 13)], "float32", dropout_p=0.5, dropout_seed=1)
    leaves = [x.clone().requires_grad_() for x in call.arrays]
    out, lse = call.run(*leaves)
    grads = call.gradients(out, lse, leaves)
    padded = [torch.zeros(3, 20, *x.shape[1:]) for x in call.arrays]
    for s, (rows, _, parts, _) in enumerate(call.alone()):
        for whole, part in zip(padded, parts, strict=True):
            whole[s, : rows.stop - rows.start] = part[0]
    padded = [x.requires_grad_() for x in padded]
    lengths = [20, 7, 13]
    bits = {"dropout_p": 0.5, "dropout_seed": 1, "kv_lengths": lengths, "query_lengths": lengths}
    wide, wide_lse = fa.attention(*padded, layout="bshd", return_lse=True, **bits)
    grad_out, grad_lse = torch.zeros_like(wide), torch.zeros_like(wide_lse)
    for s, (rows, *_) in enumerate(call.alone()):
        n = rows.stop - rows.start
        torch.testing.assert_close(wide[s, :n], out[rows])
        grad_out[s, :n], grad_lse[s, :, :n] = call.grad_out[rows], call.grad_lse[:, rows]
    for grad, whole in zip(
        grads, torch.autograd.grad((wide, wide_lse), padded, (grad_out, grad_lse)), strict=True
    ):
        for s, (rows, *_) in enumerate(call.alone()):
            torch.testing.assert_close(whole[s, : rows.stop - rows.start], grad[rows], rtol=1e-4, atol=1e-5)


def test_threads_and_neighbours_change_no_bit(kernel: Kernel) -> None:
    lengths = BATCHES["short and long"]
    call = Ragged(lengths, kernel.dtype, causal=True)
    expected = call.run()
    try:
        for threads in (1, 2, 5):
            fa.set_num_threads(threads)
            assert_same_bits(call.run(), expected)
    finally:
        fa.set_num_threads(None)
    q, k = (starts[2:] for starts in call.cu_seqlens)
    rest = [x[at[0] :] for x, at in zip(call.arrays, (q, k, k), strict=True)]
    starts = [[at - s[0] for at in s] for s in (q, k)]
    alone = fa.attention_varlen(*rest, *starts, causal=True, return_lse=True)
    assert_same_bits(alone, (expected[0][q[0] :], expected[1][:, q[0] :]))


def test_more_sequences_than_are_made_ready_at_once() -> None:
    """Of 1 to 3 rows, in waves and groups of calls; lists, arrays and tensors of any integer type."""
    lengths = [(1 + s % 3, 1 + s % 4) for s in range(1100)]
    call = Ragged(lengths, "float32", heads=2, kv_heads=1, causal=True)
    out, lse = call.run()
    for rows, _, parts, own in list(call.alone())[::97]:
        alone, own_lse = fa.attention(*parts, layout="bshd", return_lse=True, **own)
        assert_same_bits((out[rows], lse[:, rows]), (alone[0], own_lse[0]))
    for dtype in torch.int32, torch.int64:
        starts = [torch.tensor(starts, dtype=dtype) for starts in call.cu_seqlens]
        assert_same_bits(fa.attention_varlen(*call.arrays, *starts, causal=True), out)
    arrays = [x.numpy() for x in call.arrays]
    for kind in np.int32, np.uint16:
        ours = fa.attention_varlen(*arrays, *(np.array(s, kind) for s in call.cu_seqlens), causal=True)
        assert_same_bits(ours, out.numpy())


@pytest.mark.parametrize("backend", ["reference", "math"])
def test_other_backends(backend: str) -> None:
    call = Ragged(BATCHES["empty ones"] + [(9, 20)], "float64", **OPTIONS["all"])
    for ours, theirs in zip(call.run(), call.run(backend=backend), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-12, atol=1e-13)


def test_gradcheck() -> None:
    """Of every argument that has a gradient; slopes are summed up over sequences, or are of each."""
    for slopes in 1, 2:
        call = Ragged([(3, 4), (0, 2), (4, 0), (2, 5)], "float64", dim=3, slopes=slopes, sinks=True)
        tensors = [*call.arrays, call.options.pop("alibi_slopes"), call.options.pop("sinks")]

        def outputs(query: Any, key: Any, value: Any, slopes: Any, sinks: Any, call: Any = call) -> Any:
            return call.run(query, key, value, alibi_slopes=slopes, sinks=sinks)

        leaves = tuple(x.clone().requires_grad_() for x in tensors)
        assert gradcheck(outputs, leaves, nondet_tol=0)


@pytest.mark.parametrize("name", ["causal", "all", "slopes of each"])
def test_compiled(name: str) -> None:
    """One graph, the bits of eager execution, and one graph more for any other lengths."""
    torch._dynamo.reset()
    calls = [Ragged(lengths, "float32", **OPTIONS[name]) for lengths in ([(5, 7), (3, 3)], [(9, 2), (1, 8)])]

    def function(query: Any, key: Any, value: Any, starts: Any, key_starts: Any, **options: Any) -> Any:
        out, lse = fa.attention_varlen(query, key, value, starts, key_starts, return_lse=True, **options)
        return out.square().sum() + torch.where(lse.isinf(), 0, lse).sum(), out

    once = torch.compile(function, backend="aot_eager", fullgraph=True)
    for call in calls:
        starts = [torch.tensor(starts) for starts in call.cu_seqlens]
        results = []
        for run in function, once:
            leaves = [x.clone().requires_grad_() for x in call.arrays]
            loss, out = run(*leaves, *starts, **call.options)
            results.append((out.detach(), *torch.autograd.grad(loss, leaves)))
        assert_same_bits(results[1], results[0])


def test_values_of_starts_are_checked_in_compiled_graphs() -> None:
    torch._dynamo.reset()
    call = Ragged([(5, 7), (3, 3)], "float32")
    once = torch.compile(fa.attention_varlen, backend="aot_eager", fullgraph=True)
    starts, wrong = torch.tensor([0, 5, 8]), torch.tensor([0, 9, 10])
    with pytest.raises(
        ValueError, match="cu_seqlens_k must end with the number of rows 10, got 11 at index 2"
    ):
        once(*call.arrays, starts, wrong + torch.tensor([0, 0, 1]))


def test_opcheck() -> None:
    from fastattn.torch_ops.arguments import flatten
    from test_torch_ops import DEFAULTS

    call = Ragged([(5, 7), (0, 2), (3, 3)], "float64", slopes=2)
    query, key, value = (x[None].requires_grad_() for x in call.arrays)
    slopes = call.options["alibi_slopes"].requires_grad_()
    options = DEFAULTS | {"layout": "bshd", "cu_seqlens": call.cu_seqlens, "alibi_slopes": slopes}
    operands, rules = flatten(query, **options)
    torch.library.opcheck(torch.ops.fastattn.forward.default, (query, key, value, *operands, *rules, False))


def test_out_is_written_and_returned() -> None:
    call = Ragged(BATCHES["short and long"], "float32")
    expected, lse = call.run()
    for arrays in call.arrays, [x.numpy() for x in call.arrays]:
        out = (
            arrays[0].new_empty(expected.shape)
            if isinstance(arrays[0], torch.Tensor)
            else np.empty(expected.shape, "f4")
        )
        written, own_lse = fa.attention_varlen(*arrays, *call.cu_seqlens, out=out, return_lse=True)
        assert written is out and fa.attention_varlen(*arrays, *call.cu_seqlens, out=out) is out
        assert_same_bits((torch.as_tensor(written), torch.as_tensor(own_lse)), (expected, lse))


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "start": ({"cu_seqlens_q": [1, 8]}, ValueError, "cu_seqlens_q must start at 0, got 1 at index 0"),
    "fall": (
        {"cu_seqlens_k": [0, 7, 6, 10]},
        ValueError,
        "cu_seqlens_k must never fall, got 6 after 7 at index 2",
    ),
    "end": (
        {"cu_seqlens_q": [0, 5, 9]},
        ValueError,
        "cu_seqlens_q must end with the number of rows 8, got 9 at index 2",
    ),
    "huge": (
        {"cu_seqlens_q": np.array([0, 2**64 - 1, 8], np.uint64)},
        ValueError,
        "got 8 after 1844674407370955",
    ),
    "negative": ({"cu_seqlens_q": [0, -1, 8]}, ValueError, "must never fall, got -1 after 0 at index 1"),
    "empty": (
        {"cu_seqlens_q": []},
        ValueError,
        r"cu_seqlens_q must have shape \(sequences \+ 1,\), got \(0,\)",
    ),
    "axes": ({"cu_seqlens_q": [[0, 8]]}, ValueError, r"cu_seqlens_q must have shape .*, got \(1, 2\)"),
    "floats": ({"cu_seqlens_k": [0.0, 10.0]}, TypeError, "cu_seqlens_k must hold integers, got float64"),
    "number": ({"cu_seqlens_k": 10}, TypeError, "cu_seqlens_k must be a NumPy array like the first argument"),
    "as many": (
        {"cu_seqlens_q": [0, 8]},
        ValueError,
        r"must have one shape \(sequences \+ 1,\), got \(2,\) and \(3,\)",
    ),
    "longest": (
        {"max_seqlen_q": 4},
        ValueError,
        "max_seqlen_q must be at least the longest sequence's 5, got 4",
    ),
    "longest type": ({"max_seqlen_k": 7.0}, TypeError, "max_seqlen_k must be an integer or None, got float"),
    "rank": ({"query": np.zeros((1, 8, 4, 8), "f4")}, ValueError, r"query must have 3 axes .*, got 4"),
    "list": ({"value": [1]}, TypeError, "value must be a NumPy array or a torch tensor, got list"),
    "slopes": (
        {"alibi_slopes": np.ones((3, 4))},
        ValueError,
        r"alibi_slopes must have shape \(4,\) or \(2, 4\), got \(3, 4\)",
    ),
}


@pytest.mark.parametrize(("changes", "error", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    call = {
        "query": np.zeros((8, 4, 8), "f4"),
        "key": np.zeros((10, 2, 8), "f4"),
        "value": np.zeros((10, 2, 8), "f4"),
        "cu_seqlens_q": [0, 5, 8],
        "cu_seqlens_k": [0, 7, 10],
    }
    with pytest.raises(error, match=message):
        fa.attention_varlen(**call | changes)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_neighbour_of_any_content(poison: float) -> None:
    """Sequences share tiles of memory, and nothing else."""
    lengths = [(37, 37), (41, 41), (5, 43)]
    for dtype in {kernel.dtype for kernel in KERNELS}:
        call = Ragged(lengths, dtype, causal=True)
        clean, _ = call.run()
        bad = [x.clone() for x in call.arrays]
        for x, starts in zip(bad, (call.cu_seqlens[0], call.cu_seqlens[1], call.cu_seqlens[1]), strict=True):
            x[starts[1] : starts[2]] = poison
        out, _ = call.run(*bad)
        assert_same_bits(out[:37], clean[:37])
        assert_same_bits(out[-5:], clean[-5:])


def test_reference_takes_sequences_apart() -> None:
    """What `sequences` yields has the numbers of the whole."""
    call = Ragged(BATCHES["short and long"], "float64", **OPTIONS["all"])
    out, lse = call.run(backend="reference")
    for rows, _, parts, own in call.alone():
        result = reference.attention(*parts, layout="bshd", **own)
        np.testing.assert_array_equal(out[rows].numpy(), result.out[0].swapaxes(0, 1))
        np.testing.assert_array_equal(lse[:, rows].numpy(), result.lse[0])
