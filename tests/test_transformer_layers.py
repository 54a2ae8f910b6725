"""The Transformer layers of fastattn.nn against torch's own."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils import prune

from fastattn.nn import (
    MultiheadAttention,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
    convert,
    multihead,
)
from fastattn.nn._common import attend
from modules import HEADS, WIDTH, agree, randn, shaken
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
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch-first": {"batch_first": True},
    "norm-first": {"norm_first": True, "batch_first": True},
    "gelu": {"activation": "gelu", "layer_norm_eps": 1e-3},
    "callable": {"activation": F.silu, "batch_first": True},
    "no-bias": {"bias": False, "norm_first": True},
}
EVERY_LAYER = pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
KINDS = {
    "encoder": (TransformerEncoderLayer, nn.TransformerEncoderLayer),
    "decoder": (TransformerDecoderLayer, nn.TransformerDecoderLayer),
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def layers(kind: str, dtype: torch.dtype = torch.float64, dropout: float = 0.0, **options: Any) -> Any:
    ours, theirs = KINDS[kind]
    other = shaken(theirs(WIDTH, HEADS, 24, dropout=dropout, dtype=dtype, **options))
    own = ours(WIDTH, HEADS, 24, dropout=dropout, dtype=dtype, **options)
    own.load_state_dict(other.state_dict(), strict=True)
    return own, other


def layer_inputs(kind: str, dtype: torch.dtype = torch.float64, **options: Any) -> list[Tensor]:
    target, memory, _ = inputs(dtype, **options)
    return [memory] if kind == "encoder" else [target, memory]


def layer_masks(kind: str) -> list[dict[str, Any]]:
    if kind == "encoder":
        square = causal(KEYS, KEYS)
        return [
            {},
            {"src_mask": square},
            {"src_mask": square, "is_causal": True},
            {"src_key_padding_mask": padding()},
        ]
    square, oblong = causal(QUERIES, QUERIES), forbidden(QUERIES, KEYS)
    return [
        {},
        {"tgt_mask": square, "tgt_is_causal": True, "memory_key_padding_mask": padding()},
        {"tgt_mask": square, "memory_mask": oblong},
    ]


@EVERY_KIND
@EVERY_LAYER
@DTYPES
def test_layers_are_torchs(kind: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    ours, theirs = layers(kind, dtype, **options)
    tensors = layer_inputs(kind, dtype, **options)
    for masks in layer_masks(kind):
        agree_with_gradients(
            ours, theirs, tensors, lambda module, *sources, masks=masks: [module(*sources, **masks)]
        )
        with torch.no_grad():  # torch may take its fast path here
            agree(ours.eval()(*tensors, **masks), theirs.eval()(*tensors, **masks))
        ours.train(), theirs.train()


@EVERY_KIND
@EVERY_LAYER
def test_layers_have_torchs_checkpoints_weights_and_copies(kind: str, options: dict[str, Any]) -> None:
    ours, theirs = layers(kind, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    shaken(ours)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    states = []
    for layer in KINDS[kind]:
        torch.manual_seed(3)
        states.append(layer(WIDTH, HEADS, 24, **options).state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    tensors = layer_inputs(kind, **options)
    for same in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(same(*tensors), ours(*tensors))


@EVERY_KIND
def test_layers_drop_out_in_training_alone(kind: str) -> None:
    ours, theirs = layers(kind, dropout=0.3)
    tensors = layer_inputs(kind)
    torch.manual_seed(0)
    first = ours(*tensors)
    assert not torch.equal(ours(*tensors), first)
    torch.manual_seed(0)
    assert torch.equal(ours(*tensors), first)
    agree(ours.eval()(*tensors), theirs.eval()(*tensors))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", ["nothing", "padding", "causal", "both"])
def test_encoder_of_torch(training: bool, masked: str) -> None:
    """In evaluation torch's encoder hands padded batches over as nested tensors."""
    ours, theirs = (
        nn.TransformerEncoder(layer, 3).train(training) for layer in layers("encoder", batch_first=True)
    )
    masks: dict[str, Any] = {}
    if masked in ("causal", "both"):
        masks["mask"] = causal(KEYS, KEYS)
    if masked in ("padding", "both"):
        masks["src_key_padding_mask"] = padding()
    with torch.set_grad_enabled(training):
        x = randn(BATCH, KEYS, WIDTH)
        agree(ours(x, **masks), theirs(x, **masks))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_input_of_a_layer() -> None:
    ours, _ = layers("encoder", batch_first=True)
    rows = [randn(4, WIDTH), randn(7, WIDTH)]
    nested = torch.nested.as_nested_tensor(rows)
    for got, alone in zip(ours(nested).unbind(), rows, strict=True):
        agree(got, ours(alone[None])[0])
    with pytest.raises(ValueError, match="src_key_padding_mask must be left out"):
        ours(nested, src_key_padding_mask=padding())


def test_decoder_and_transformer_of_torch() -> None:
    ours, theirs = (nn.TransformerDecoder(layer, 2) for layer in layers("decoder", batch_first=True))
    target, memory = layer_inputs("decoder", batch_first=True)
    masks = {"tgt_mask": causal(QUERIES, QUERIES), "memory_key_padding_mask": padding()}
    agree(ours(target, memory, **masks), theirs(target, memory, **masks))
    encoders = [nn.TransformerEncoder(layer, 2) for layer in layers("encoder", batch_first=True)]
    options: dict[str, Any] = {"d_model": WIDTH, "nhead": HEADS, "batch_first": True}
    whole = [
        nn.Transformer(custom_encoder=encoder, custom_decoder=decoder, **options)
        for encoder, decoder in zip(encoders, (ours, theirs), strict=True)
    ]
    whole[0].load_state_dict(whole[1].state_dict())  # the constructor draws weights anew
    agree(whole[0](memory, target), whole[1](memory, target))


def test_hooks_run_in_evaluation() -> None:
    ours, _ = layers("encoder", batch_first=True)
    calls = []
    ours.eval().self_attn.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        ours(randn(BATCH, KEYS, WIDTH))
    assert calls == [1]


# A model that is built already


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("training", [True, False])
def test_convert_in_place(monkeypatch: pytest.MonkeyPatch, training: bool) -> None:
    """Every layer calls fastattn, in evaluation too, and everything stays the object that it was."""
    model = shaken(
        nn.Transformer(WIDTH, HEADS, 2, 3, 24, 0.0, batch_first=True, dtype=torch.float64).train(training)
    )
    source, target = randn(BATCH, KEYS, WIDTH), randn(BATCH, QUERIES, WIDTH)
    masks = {"src_key_padding_mask": padding(), "memory_key_padding_mask": padding()}
    modules, parameters = list(model.modules()), list(model.parameters())
    hooked: list[nn.Module] = []
    handle = model.encoder.layers[1].self_attn.register_forward_hook(lambda module, *_: hooked.append(module))
    calls: list[Any] = []
    monkeypatch.setattr(
        multihead, "attend", lambda *args, **kwargs: calls.append(kwargs) or attend(*args, **kwargs)
    )
    with torch.set_grad_enabled(training):
        want = model(source, target, **masks)
        assert not calls
        hooked.clear()
        assert convert(convert(model, backend="math")) is model
        agree(model(source, target, **masks), want)
    assert [call["backend"] for call in calls] == ["math"] * (2 + 2 * 3)
    assert hooked == [model.encoder.layers[1].self_attn]
    handle.remove()
    for before, after in ((modules, model.modules()), (parameters, model.parameters())):
        assert all(one is other for one, other in zip(before, after, strict=True))
    duplicate = copy.deepcopy(model)
    assert type(duplicate.decoder.layers[0]) is TransformerDecoderLayer
    assert duplicate.decoder.layers[0].multihead_attn.backend == "math"


def test_convert_of_attention_alone() -> None:
    """The model may be attention itself; pruning goes on; a subclass may compute something else."""
    x = randn(BATCH, KEYS, WIDTH)
    pruned = nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.float64)
    prune.l1_unstructured(pruned, "in_proj_weight", 0.5)
    want = pruned(x, x, x)
    assert type(convert(pruned)) is MultiheadAttention
    for got, expected in zip(pruned(x, x, x), want, strict=True):
        agree(got, expected)

    class Other(nn.MultiheadAttention):
        pass

    pair = nn.ModuleList([Other(WIDTH, HEADS), nn.MultiheadAttention(WIDTH, HEADS)])
    assert [type(module) for module in convert(pair)] == [Other, MultiheadAttention]
    with pytest.raises(ValueError, match=r"model must have a module of torch.nn to convert .*, got none"):
        convert(pair[0])
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        convert([pair])
    with pytest.raises(TypeError, match="backend must be a name or None, got int"):
        convert(pair, backend=1)


ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"d_model": 10}, ValueError, "d_model must be a multiple of nhead = 4, got 10"),
    ({"nhead": 0}, ValueError, "nhead must be at least 1, got 0"),
    ({"dim_feedforward": 2.5}, TypeError, "dim_feedforward must be an integer, got float"),
    ({"dropout": -0.1}, ValueError, "dropout must be a finite number in [0, 1], got -0.1"),
    ({"layer_norm_eps": "1"}, TypeError, "layer_norm_eps must be a real number, got str"),
    ({"activation": "tanh"}, RuntimeError, "tanh"),
    ({"backend": 1}, TypeError, "backend must be a name or None, got int"),
]


@EVERY_KIND
@pytest.mark.parametrize("wrong, error, message", ERRORS, ids=[message for *_, message in ERRORS])
def test_layer_errors(kind: str, wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        KINDS[kind][0](**{"d_model": WIDTH, "nhead": HEADS, **wrong})
    assert message in str(caught.value)
