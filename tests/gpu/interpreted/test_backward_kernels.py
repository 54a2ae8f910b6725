"""The portable backward beside operations of torch in float64, which differentiate themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import shapes
from fastattn.gpu.backward import backward
from fastattn.gpu.call import Call, Gradients
from fastattn.gpu.forward import forward
from fastattn.gpu.weights import weights
from fastattn.torch_ops.graph import with_weights
from portable import call_of
from shapes import Case, convert
from test_backward import NAMES, assert_close, expected, gradients, leaves, widened

LARGEST = 256  # head dimension of the portable kernels
CASES = tuple(case for case in shapes.SMALL if max(case.head_dim, case.value_dim) <= LARGEST)
# The last option is all of them at once, in a fifth of its tiles; CASES has it whole.
SMALLER = {"seqlen_q": 40, "seqlen_k": 90, "batch": 2, "query_heads": 4, "window": (30, 0)}
OPTIONS = (*shapes.OPTIONS[:-1], replace(shapes.OPTIONS[-1], name="everything at once", **SMALLER))
QUICK = (*shapes.TINY, *shapes.EMPTY, *OPTIONS, *shapes.LENGTHS[:4], shapes.GROUPS[2])
SHORT = (shapes.TINY[1], shapes.GROUPS[2], shapes.LENGTHS[2], *OPTIONS[-2:])
WIDE = Case("wide", 37, 83, 24, batch=2, query_heads=4, kv_heads=2)
ALL = "out lse weights"

# float16 differs from bfloat16 in its digits alone.
QUICK_DTYPES = ("float32", pytest.param("float16", marks=pytest.mark.gpu_slow), "bfloat16")
dtypes = pytest.mark.parametrize("dtype", QUICK_DTYPES)


def unexpanded(call: Call) -> tuple[int, ...]:
    assert call.bias is not None
    shape = zip(call.bias.shape, call.bias.stride(), strict=True)
    return tuple(1 if stride == 0 else size for size, stride in shape)


def memory(call: Call) -> Gradients:
    """Room for every gradient that the call can have, which holds NaN."""

    def like(tensor: Tensor) -> Tensor:
        return torch.full(tensor.shape, torch.nan, dtype=tensor.dtype)

    return Gradients(
        like(call.query),
        like(call.key),
        like(call.value),
        None if call.bias is None else torch.full(unexpanded(call), torch.nan),
        None if call.alibi_slopes is None else torch.full(call.query.shape[:2], torch.nan),
        None if call.sinks is None else like(call.sinks),
    )


def differentiate(
    call: Call, *, outputs: str = "out", atomic: bool = False, wanted: Gradients | None = None, seed: int = 0
) -> Gradients:
    """The kernels' gradients of the loss that `test_backward.gradients` differentiates."""
    shape = call.query.shape[:3]
    out = torch.full((*shape, call.value.shape[3]), torch.nan, dtype=call.query.dtype)
    lse = torch.full(shape, torch.nan)
    forward(call, out, lse)
    generator = torch.Generator().manual_seed(seed)
    grads = dict.fromkeys(ALL.split())
    for name, size in ("out", out.shape), ("lse", shape), ("weights", (*shape, call.key.shape[2])):
        if name in outputs.split():
            noise = torch.randn(size, generator=generator, dtype=torch.float64)
            grads[name] = noise.to(lse.dtype if name == "lse" else out.dtype)
    if grads["lse"] is not None:
        grads["lse"] = grads["lse"].masked_fill(lse.isinf(), 0)
    if grads["weights"] is not None:
        probabilities = torch.empty_like(grads["weights"])
        weights(call, lse, probabilities)
        grads["lse"] = with_weights(lse, probabilities, grads["lse"], grads["weights"])
    results = memory(call) if wanted is None else wanted
    backward(call, out, lse, grads["out"], grads["lse"], grads["weights"], results, atomic=atomic)
    return results


def named(results: Gradients, given: dict[str, Any]) -> dict[str, Tensor]:
    """Those of tensors among the arguments, in their shapes."""
    found = {}
    for name in NAMES:
        grad = getattr(results, name)
        if isinstance(given.get(name), Tensor):
            if name == "alibi_slopes" and given[name].ndim == 1:
                grad = grad.sum(0)
            found[name] = grad.reshape(given[name].shape).to(given[name].dtype)
    return found


def check(
    dtype: str, given: dict[str, Any], wanted: Any, *, outputs: str = "out", atomic: bool = False
) -> None:
    call = call_of(**{name: value.detach() if name in NAMES else value for name, value in given.items()})
    assert_close(named(differentiate(call, outputs=outputs, atomic=atomic), given), wanted, dtype)


def check_case(case: Case, dtype: str, **how: Any) -> None:
    check(dtype, leaves(case, dtype), expected(case, dtype, ALL), outputs=ALL, **how)


def check_options(case: Case, dtype: str, **options: Any) -> None:
    """A case, and further arguments of its call."""
    given = leaves(case, dtype) | options
    check(dtype, given, gradients(widened(given), outputs="out lse"), outputs="out lse")


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_every_feature(case: Case) -> None:
    check_case(case, "float32")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", SHORT, ids=str)
def test_short_numbers(case: Case, dtype: str) -> None:
    check_case(case, dtype)


@pytest.mark.gpu_slow
@dtypes
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_shape(case: Case, dtype: str) -> None:
    check_case(case, dtype)


@pytest.mark.parametrize("case", [*shapes.EMPTY[:3], *SHORT], ids=str)
def test_queries_by_atomic_additions(case: Case) -> None:
    check_case(case, "float32", atomic=True)


@pytest.mark.gpu_slow
@dtypes
@pytest.mark.parametrize("case", [*shapes.OPTIONS, *shapes.GROUPS, *shapes.LENGTHS], ids=str)
def test_atomic_additions_in_every_shape(case: Case, dtype: str) -> None:
    check_case(case, dtype, atomic=True)


@pytest.mark.parametrize("outputs", ["out", "out lse", "out weights"])
def test_losses(outputs: str) -> None:
    case = Case("losses", 40, 90, 24, 40, batch=2, query_heads=6, kv_heads=2, causal=True)
    check("float32", leaves(case, "float32"), expected(case, "float32", outputs), outputs=outputs)


class TestWindow:
    """Tiles that all, some or none of the keys are seen in, on either side."""

    @pytest.mark.parametrize(
        "window", [(0, 0), (5, 0), (0, 5), (13, 29), (None, 3), (3, None), (70, 70)], ids=str
    )
    @pytest.mark.parametrize("offset", [45, -30, 2**60])
    def test_both_sides(self, window: Any, offset: int) -> None:
        check_options(Case("band", 70, 120, 16), "float32", window=window, query_offset=offset)

    @pytest.mark.parametrize("causal", [True, "top_left"])
    @pytest.mark.parametrize("offsets", [None, [3, -20], [2**60, -(2**60)]], ids=str)
    def test_offsets_of_sequences(self, causal: bool | str, offsets: list[int] | None) -> None:
        case = Case("offsets", 70, 120, 16, batch=2, arrays=("kv_lengths",))
        check_options(case, "float32", causal=causal, query_offset=offsets, window=(33, 4))


BIASES = ((83,), (37, 1), (4, 1, 83), (2, 1, 37, 83), (2, 4, 1, 1), (1, 4, 37, 83), (2, 4, 37, 83))


class TestBias:
    @pytest.mark.parametrize("shape", BIASES, ids=str)
    def test_is_summed_over_what_it_was_broadcast_to(
        self, shape: tuple[int, ...], rng: np.random.Generator, dtype: str = "float32"
    ) -> None:
        bias = rng.standard_normal(shape) * 3
        bias[bias < -3] = -np.inf
        check_options(WIDE, dtype, bias=convert(bias, "float32", "torch").requires_grad_())

    @pytest.mark.parametrize(
        "shape",
        [pytest.param(x, marks=() if x in BIASES[2:4] else pytest.mark.gpu_slow) for x in BIASES],
        ids=str,
    )
    def test_is_summed_beside_shorter_numbers(self, shape: tuple[int, ...], rng: np.random.Generator) -> None:
        self.test_is_summed_over_what_it_was_broadcast_to(shape, rng, "bfloat16")

    @dtypes
    def test_rows_of_the_lowest_number(self, dtype: str) -> None:
        """lse cannot tell how many keys share such a row: it is the bias, whatever their number."""
        bias = torch.zeros(37, 83, dtype=getattr(torch, dtype))
        bias[::3] = torch.finfo(bias.dtype).min
        bias[1::3, :70] = torch.finfo(bias.dtype).min
        bias[5] = -torch.inf
        check_options(WIDE, dtype, bias=bias.requires_grad_())
        check_options(
            WIDE, dtype, bias=bias.detach().requires_grad_(), sinks=torch.ones(4, requires_grad=True)
        )

    @pytest.mark.parametrize("slope", [1e3, 1e5, -1e4])
    def test_slopes_that_leave_lse_few_digits(self, slope: float) -> None:
        slopes = torch.tensor([slope, 0.1, slope / 7, 0.0], requires_grad=True)
        case = replace(WIDE, causal=True)
        check_options(case, "float32", alibi_slopes=slopes, query_offset=200)


class TestNothingToSee:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_rows_and_keys_that_meet_nobody_have_no_gradient(self, dtype: str) -> None:
        case = replace(WIDE, seqlen_q=83, seqlen_k=37, causal=True)  # the first rows see nothing
        lengths = torch.tensor([0, 20])
        call = call_of(*case.tensors(dtype, "torch"), causal=True, kv_lengths=lengths)
        for atomic in False, True:
            results = differentiate(call, atomic=atomic)
            assert not results.query[0].any() and not results.query[1, :, :46].any()
            assert results.query[1, :, 47:].any(-1).all()
            for grad in results.key, results.value:
                assert not grad[0].any() and not grad[1, :, 20:].any()
                assert grad[1, :, :20].any(-1).all()

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_what_lies_past_a_length_changes_nothing(self, dtype: str) -> None:
        query, key, value = WIDE.tensors(dtype, "torch")
        lengths = torch.tensor([50, 64])
        clean = differentiate(call_of(query, key, value, kv_lengths=lengths))
        for tensor in key, value:
            tensor[0, :, 50:] = torch.nan
            tensor[1, :, 64:] = torch.inf
        dirty = differentiate(call_of(query, key, value, kv_lengths=lengths))
        for one, other in zip(clean[:3], dirty[:3], strict=True):
            assert torch.equal(one, other)

    @pytest.mark.parametrize("softcap", [0.0, 2.0])
    @pytest.mark.parametrize(
        ("options", "hidden"),
        [
            ({"window": (10, 0), "query_offset": 90}, slice(0, 64)),
            ({"causal": True, "query_offset": 10}, slice(64, None)),  # seen by rows past the last alone
        ],
        ids=["window", "causal"],
    )
    def test_what_lies_in_tiles_that_no_row_sees_changes_nothing(
        self, options: dict[str, Any], hidden: slice, softcap: float
    ) -> None:
        case = Case("hidden", 40, 130, 24, batch=2, query_heads=4, kv_heads=2)
        query, key, value = case.tensors("float32", "torch")
        clean = differentiate(call_of(query, key, value, softcap=softcap, **options), outputs="out lse")
        key[:, :, hidden] = value[:, :, hidden] = torch.nan
        dirty = differentiate(call_of(query, key, value, softcap=softcap, **options), outputs="out lse")
        for one, other in zip(clean[:3], dirty[:3], strict=True):
            assert torch.equal(one, other)

    @pytest.mark.parametrize(
        ("p", "dtype"),
        [
            (0.3, "bfloat16"),
            (1.0, "float32"),
            *(
                pytest.param(p, dtype, marks=pytest.mark.gpu_slow)
                for p, dtype in [(0.3, "float32"), (1.0, "bfloat16"), (0.3, "float16"), (1.0, "float16")]
            ),
        ],
    )
    def test_weights_that_dropout_takes_away(self, p: float, dtype: str) -> None:
        arrays = ("mask", "bias", "alibi_slopes", "sinks")
        case = Case("dropout", 40, 70, 24, 40, batch=2, query_heads=4, kv_heads=2, softcap=2.0, arrays=arrays)
        check_options(case, dtype, dropout_p=p, dropout_seed=2**63 + 5, dropout_offset=7)

    def test_hidden_weights_hide_what_comes_in_for_them(self) -> None:
        call = call_of(*WIDE.tensors("float32", "torch"), causal=True)
        out, lse = torch.empty(2, 4, 37, 24), torch.empty(2, 4, 37)
        forward(call, out, lse)
        incoming = torch.full((2, 4, 37, 83), torch.nan).triu(83 - 37 + 1)
        for grads in (results := memory(call)), (plain := memory(call)):
            backward(call, out, lse, out, None, incoming if grads is results else None, grads)
        for one, other in zip(results[:3], plain[:3], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


class TestMemory:
    def test_any_strides(self) -> None:
        """Operands and gradients that are views: rows apart, columns far from each other."""
        case = Case("strides", 40, 50, 16, 24, batch=2, query_heads=4, kv_heads=2, causal=True)
        call = call_of(*case.tensors("float32", "torch"), causal=True)

        def apart(tensor: Tensor) -> Tensor:
            batch, heads, rows, dim = tensor.shape
            room = torch.full((heads, dim, 2 * rows, batch + 1), torch.nan)
            view = room.permute(3, 0, 2, 1)[1:, :, ::2]
            return view.copy_(tensor)

        plain = differentiate(call)
        views = call._replace(**{name: apart(getattr(call, name)) for name in ("query", "key", "value")})
        wanted = Gradients(*(apart(torch.full(grad.shape, torch.nan)) for grad in plain[:3]))
        for one, other in zip(differentiate(views, wanted=wanted)[:3], plain[:3], strict=True):
            assert torch.equal(one, other)

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("atomic", [False, True])
    def test_only_what_is_wanted(self, name: str, atomic: bool) -> None:
        case = Case("some", 40, 50, 16, query_heads=2, arrays=("bias", "alibi_slopes", "sinks"))
        call = call_of(*case.tensors("float32", "torch"), **case.options("float32", "torch"))
        together = differentiate(call)
        alone = differentiate(call, wanted=Gradients(**{name: getattr(memory(call), name)}), atomic=atomic)
        torch.testing.assert_close(getattr(alone, name), getattr(together, name), rtol=1e-5, atol=1e-6)

    def test_every_run_gives_the_same_bits_whatever_else_is_in_the_batch(self) -> None:
        case = Case("bits", 70, 90, 32, batch=3, query_heads=4, kv_heads=2, causal=True)
        tensors = case.tensors("bfloat16", "torch")
        together = differentiate(call_of(*tensors, causal=True))
        again = differentiate(call_of(*tensors, causal=True))
        for one, other in zip(together[:3], again[:3], strict=True):
            assert torch.equal(one, other)
