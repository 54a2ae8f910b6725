"""fastattn.nn.MultiheadAttention against torch's own module."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from fastattn.nn import MultiheadAttention
from modules import HEADS, INF, WIDTH, agree, randn, shaken
from torch_modules import (
    BATCH,
    KEYS,
    QUERIES,
    agree_with_gradients,
    causal,
    forbidden,
    inputs,
    padding,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def pair(
    dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[MultiheadAttention, nn.MultiheadAttention]:
    theirs = shaken(nn.MultiheadAttention(WIDTH, HEADS, dtype=dtype, **options))
    ours = MultiheadAttention(WIDTH, HEADS, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


CONSTRUCTORS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch-first": {"batch_first": True},
    "widths": {"kdim": 12, "vdim": 20, "batch_first": True},
    "no-bias": {"bias": False},
    "bias-kv": {"add_bias_kv": True},
    "zero": {"add_zero_attn": True, "batch_first": True},
    "everything": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 12, "vdim": 12},
}
EVERY_CONSTRUCTOR = pytest.mark.parametrize("options", CONSTRUCTORS.values(), ids=CONSTRUCTORS)


def as_float(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, -INF)


MASKS: dict[str, dict[str, Tensor]] = {
    "none": {},
    "bool-2d": {"attn_mask": forbidden(QUERIES, KEYS)},
    "bool-3d": {"attn_mask": forbidden(BATCH * HEADS, QUERIES, KEYS)},
    "float-2d": {"attn_mask": randn(QUERIES, KEYS)},
    "float-3d": {"attn_mask": randn(BATCH * HEADS, QUERIES, KEYS)},
    "padding": {"key_padding_mask": padding()},
    "padding-float": {"key_padding_mask": randn(BATCH, KEYS)},
    "both-bool": {"attn_mask": forbidden(QUERIES, KEYS), "key_padding_mask": padding()},
    "both-float": {"attn_mask": randn(QUERIES, KEYS), "key_padding_mask": as_float(padding())},
}
EVERY_MASK = pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)


def in_dtype(masks: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: mask if mask.dtype == torch.bool else mask.to(dtype) for name, mask in masks.items()}


# Against torch's module


@EVERY_MASK
@EVERY_CONSTRUCTOR
@DTYPES
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "out"])
def test_forward_and_gradients_are_torchs(
    options: dict[str, Any], masks: dict[str, Tensor], dtype: torch.dtype, need_weights: bool
) -> None:
    ours, theirs = pair(dtype, **options)
    arguments = {**in_dtype(masks, dtype), "need_weights": need_weights, "average_attn_weights": False}
    agree_with_gradients(
        ours, theirs, inputs(dtype, **options), lambda module, *tensors: module(*tensors, **arguments)
    )


@pytest.mark.parametrize("shared", ["all", "key and value", "query and key"])
@EVERY_MASK
def test_sources_that_are_the_same(shared: str, masks: dict[str, Tensor]) -> None:
    ours, theirs = pair(batch_first=True)
    x, other = randn(BATCH, KEYS, WIDTH), randn(BATCH, KEYS, WIDTH, seed=1)
    masks = {name: mask for name, mask in masks.items() if mask.shape[-2] != QUERIES}
    sources = {"all": (0, 0, 0), "key and value": (0, 1, 1), "query and key": (0, 0, 1)}[shared]

    def call(module: nn.Module, *tensors: Tensor) -> Any:
        return module(*[tensors[index] for index in sources], **masks)

    agree_with_gradients(ours, theirs, [x, other], call)


@EVERY_CONSTRUCTOR
@pytest.mark.parametrize("average", [True, False])
def test_unbatched(options: dict[str, Any], average: bool) -> None:
    ours, theirs = pair(**options)
    tensors = [tensor.select(0 if options.get("batch_first") else 1, 1) for tensor in inputs(**options)]
    for masks in (
        {},
        {"key_padding_mask": padding()[1]},
        {"attn_mask": forbidden(QUERIES, KEYS)},
        {"attn_mask": forbidden(HEADS, QUERIES, KEYS)},
    ):
        agree_with_gradients(
            ours,
            theirs,
            tensors,
            lambda module, *sources, masks=masks: module(*sources, average_attn_weights=average, **masks),
        )


def test_averaged_weights_have_torchs_shape_and_values() -> None:
    ours, theirs = pair(batch_first=True)
    tensors = inputs(batch_first=True)
    agree(ours(*tensors)[1], theirs(*tensors)[1])
    assert ours(*tensors)[1].shape == (BATCH, QUERIES, KEYS)
    assert ours(*tensors, need_weights=False)[1] is None


def test_gradient_of_a_learned_mask() -> None:
    ours, theirs = pair()
    tensors = [*inputs(), randn(BATCH * HEADS, QUERIES, KEYS), randn(BATCH, KEYS)]

    def call(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, pad: Tensor) -> Any:
        return module(query, key, value, attn_mask=mask, key_padding_mask=pad)

    agree_with_gradients(ours, theirs, tensors, call)


def test_mixed_masks() -> None:
    """torch takes a bool and a float mask together, and warns."""
    ours, theirs = pair()
    for masks in (
        {"attn_mask": randn(QUERIES, KEYS), "key_padding_mask": padding()},
        {"attn_mask": forbidden(QUERIES, KEYS), "key_padding_mask": randn(BATCH, KEYS)},
    ):
        with pytest.warns(UserWarning, match="mismatched"):
            want = theirs(*inputs(), **masks)
        for got, expected in zip(ours(*inputs(), **masks), want, strict=True):
            agree(got, expected)


@EVERY_MASK
def test_evaluation_is_torchs_fast_path(masks: dict[str, Tensor]) -> None:
    ours, theirs = pair(batch_first=True)
    x = randn(BATCH, KEYS, WIDTH)
    masks = {name: mask for name, mask in masks.items() if mask.shape[-2] != QUERIES}
    with torch.no_grad():
        for got, want in zip(ours.eval()(x, x, x, **masks), theirs.eval()(x, x, x, **masks), strict=True):
            agree(got, want)


# Where torch has rules of its own


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("honest", [True, False])
def test_is_causal(options: dict[str, Any], need_weights: bool, padded: bool, honest: bool) -> None:
    """A hint, which is believed where nothing else is asked for, whatever attn_mask says."""
    ours, theirs = pair(**options)
    arguments: dict[str, Any] = {"is_causal": True, "need_weights": need_weights}
    arguments["attn_mask"] = causal() if honest else forbidden(QUERIES, KEYS)
    if padded:
        arguments["key_padding_mask"] = padding()
    agree_with_gradients(ours, theirs, inputs(), lambda module, *tensors: module(*tensors, **arguments))


def test_is_causal_needs_the_mask() -> None:
    ours, theirs = pair()
    for module in (ours, theirs):
        with pytest.raises(RuntimeError, match="attn_mask"):
            module(*inputs(), is_causal=True)


def test_a_row_without_keys_is_no_nan() -> None:
    ours, theirs = pair(batch_first=True)
    masks = {"key_padding_mask": torch.tensor([False, True, False])[:, None].expand(BATCH, KEYS)}
    tensors = [tensor.requires_grad_() for tensor in inputs(batch_first=True)]
    out, weights = ours(*tensors, **masks)
    assert torch.equal(out[1], ours.out_proj.bias.expand(QUERIES, WIDTH))
    assert not weights[1].any()
    out.sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in tensors)
    assert theirs(*tensors, **masks)[0][1].isnan().all(), "torch changed: say so in the docs"
    others = [0, 2]
    agree(out[others], theirs(*tensors, **masks)[0][others])


def test_padding_may_hold_anything() -> None:
    ours, _ = pair(batch_first=True, bias=False)
    query, key, value = inputs(batch_first=True)
    clean = ours(query, key, value, key_padding_mask=padding())[0]
    rubbish = torch.where(padding()[..., None], torch.nan, 0)
    assert torch.equal(ours(query, key + rubbish, value + rubbish, key_padding_mask=padding())[0], clean)


def test_dropout() -> None:
    ours, theirs = pair(dropout=0.5, batch_first=True)
    x = randn(2, 64, WIDTH)
    torch.manual_seed(0)
    out, weights = ours(x, x, x, average_attn_weights=False)
    kept = theirs.eval()(x, x, x, average_attn_weights=False)[1]
    dropped = weights == 0
    assert 0.47 < dropped.double().mean() < 0.53
    agree(weights, torch.where(dropped, 0, 2 * kept))
    torch.manual_seed(0)
    assert torch.equal(ours(x, x, x)[0], out)
    assert not torch.equal(ours(x, x, x)[0], out)
    agree(ours.eval()(x, x, x)[0], theirs(x, x, x)[0])


# Checkpoints and the habits of a module


@EVERY_CONSTRUCTOR
def test_state_dicts_go_both_ways(options: dict[str, Any]) -> None:
    ours, theirs = pair(**options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    shaken(ours)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name


@EVERY_CONSTRUCTOR
def test_one_seed_gives_torchs_weights(options: dict[str, Any]) -> None:
    states = []
    for kind in (MultiheadAttention, nn.MultiheadAttention):
        torch.manual_seed(3)
        states.append(kind(WIDTH, HEADS, **options).state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@EVERY_CONSTRUCTOR
def test_from_torch_shares_parameters(options: dict[str, Any]) -> None:
    _, theirs = pair(dropout=0.25, **options)
    ours = MultiheadAttention.from_torch(theirs.eval())
    assert isinstance(ours, nn.MultiheadAttention)
    assert not ours.training
    assert ours.dropout == 0.25
    own, shared = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert own.keys() == shared.keys()
    assert all(own[name] is shared[name] for name in own)
    tensors = inputs(**options)
    for got, want in zip(ours(*tensors), theirs(*tensors), strict=True):
        agree(got, want)


CHANGES = {
    "pruned": (lambda module, name: prune.l1_unstructured(module, name, 0.5), prune.remove),
    "parametrized": (parametrizations.weight_norm, parametrize.remove_parametrizations),
}


@EVERY_CONSTRUCTOR
@pytest.mark.parametrize("change, undo", CHANGES.values(), ids=CHANGES)
def test_from_torch_of_weights_that_are_computed(options: dict[str, Any], change: Any, undo: Any) -> None:
    """Refused while the weight is no parameter: the new module would read memory that nobody wrote."""
    _, theirs = pair(**options)
    name = "q_proj_weight" if "kdim" in options else "in_proj_weight"
    change(theirs, name)
    with pytest.raises(ValueError, match=rf"module must have the parameters .*{name}.* pruned"):
        MultiheadAttention.from_torch(theirs)
    undo(theirs, name)
    change(theirs.out_proj, "weight")  # a module that both share, hooks included
    tensors = inputs(**options)
    for got, want in zip(MultiheadAttention.from_torch(theirs)(*tensors), theirs(*tensors), strict=True):
        agree(got, want)


@EVERY_CONSTRUCTOR
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies(options: dict[str, Any], duplicate: Any) -> None:
    ours, _ = pair(**options)
    tensors = inputs(**options)
    assert torch.equal(duplicate(ours)(*tensors)[0], ours(*tensors)[0])


def test_outputs_are_contiguous() -> None:
    for batch_first in (True, False):
        ours, _ = pair(batch_first=batch_first)
        assert ours(*inputs(batch_first=batch_first))[0].is_contiguous()


def test_what_it_says_of_itself() -> None:
    text = repr(MultiheadAttention(8, 2, 0.5, False, True, True, kdim=4, backend="math"))
    for part in ("8, 2", "kdim=4, vdim=8", "dropout=0.5", "bias=False", "add_bias_kv=True", "'math'"):
        assert part in text
    assert "add_bias_kv" not in repr(MultiheadAttention(8, 2))


def test_half_precision_and_autocast() -> None:
    ours, theirs = pair(torch.float32)
    tensors = inputs(torch.float32)
    want = theirs(*tensors)[0]
    half = copy.deepcopy(ours).bfloat16()(*[tensor.bfloat16() for tensor in tensors])[0]
    assert half.dtype == torch.bfloat16
    assert (half.float() - want).abs().max() < 0.05
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = ours(*tensors, attn_mask=torch.zeros(QUERIES, KEYS))[0]
    assert cast.dtype == torch.bfloat16
    assert (cast.float() - want).abs().max() < 0.05


def test_gradients_of_gradients_by_name() -> None:
    ours = MultiheadAttention(4, 2, dtype=torch.float64, backend="math")
    x = randn(3, 1, 4).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: ours(x, x, x, need_weights=False)[0], x)


def build(*arguments: Any, **options: Any) -> Any:
    return lambda: MultiheadAttention(*arguments, **options)


def call(*shapes: tuple[int, ...], **arguments: Any) -> Any:
    return lambda: MultiheadAttention(8, 2)(*[torch.zeros(shape) for shape in shapes], **arguments)


X = (5, 3, 8)
ERRORS: list[tuple[Any, type[Exception], str]] = [
    (build(10, 4), ValueError, "embed_dim must be a multiple of num_heads = 4, got 10"),
    (build(0, 1), ValueError, "embed_dim must be at least 1, got 0"),
    (build(8.0, 2), TypeError, "embed_dim must be an integer, got float"),
    (build(8, 0), ValueError, "num_heads must be at least 1, got 0"),
    (build(8, 2, kdim=0), ValueError, "kdim must be at least 1, got 0"),
    (build(8, 2, dropout=1.5), ValueError, "dropout must be a finite number in [0, 1], got 1.5"),
    (build(8, 2, backend=3), TypeError, "backend must be a name or None, got int"),
    (
        lambda: MultiheadAttention.from_torch(nn.Linear(2, 2)),
        TypeError,
        "module must be a torch.nn.Multihead",
    ),
    (call((5, 3, 9), X, X), ValueError, "query must have shape (L, N, 8), got (5, 3, 9)"),
    (call((5, 8), X, X), ValueError, "key must have shape (L, 8), got (5, 3, 8)"),
    (call((1, 5, 3, 8), X, X), ValueError, "query must have shape (L, 8), got (1, 5, 3, 8)"),
    (call(X, X, (4, 3, 8)), ValueError, "key and value must have the same length and batch"),
    (call(X, (5, 2, 8), (5, 2, 8)), ValueError, "query and key must have one batch size, got 3 and 2"),
    (lambda: MultiheadAttention(8, 2)(None, None, None), TypeError, "query must be a torch.Tensor"),
    (call(X, X, X, attn_mask=torch.zeros(5, 4)), ValueError, "attn_mask must have shape (5, 5) or (6, 5, 5)"),
    (call(X, X, X, attn_mask=torch.zeros(5, 5, dtype=torch.long)), TypeError, "attn_mask must be bool"),
    (
        call(X, X, X, attn_mask=torch.zeros(5, 5, device="meta")),
        RuntimeError,
        "attn_mask is on device 'meta', expected 'cpu'",
    ),
    (
        call(X, X, X, key_padding_mask=torch.zeros(3, 5, device="meta")),
        RuntimeError,
        "key_padding_mask is on device 'meta', expected 'cpu'",
    ),
    (call(X, X, X, attn_mask=[[True]]), TypeError, "attn_mask must be a torch.Tensor, got list"),
    (
        call(X, X, X, key_padding_mask=torch.zeros(5, 3)),
        ValueError,
        "key_padding_mask must have shape (3, 5)",
    ),
]


@pytest.mark.parametrize("wrong, error, message", ERRORS, ids=[message for *_, message in ERRORS])
def test_errors(wrong: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        wrong()
    assert message in str(caught.value)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused() -> None:
    nested = torch.nested.as_nested_tensor([torch.zeros(2, 8), torch.zeros(3, 8)])
    with pytest.raises(TypeError, match="query must be a dense tensor"):
        MultiheadAttention(8, 2)(nested, nested, nested)
